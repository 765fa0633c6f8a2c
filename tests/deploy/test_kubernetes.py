"""Every way to deploy on Kubernetes builds, is valid, runs without rights and opens one port."""

import copy
import re
import shutil
import tomllib
from ipaddress import ip_address, ip_network

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.deploy.accepted import check, check_restricted
from tests.deploy.dockerfile import values
from tests.deploy.manifests import (
    ROOT,
    VARIANTS,
    build,
    combinations,
    combine,
    config_map,
    kustomize,
    objects,
    pod_templates,
    serve_settings,
    server,
    templates_of,
    uncomment,
)
from tests.deploy.tools import REPOSITORY

# The oldest with the preStop hook `sleep` in every cluster, and the newest that is known.
KUBERNETES = ["1.30", "1.36"]
NODE_LOCAL_DNS, METADATA_SERVICE = "169.254.20.10", "169.254.169.254"
AUTOSCALED = [name for name in VARIANTS if "autoscaled" in name]
DOWNLOADING = [name for name in VARIANTS if not name.startswith("cpu")]
MONITORED = [name for name in VARIANTS if "monitored" in name or "autoscaled" in name]

every_variant = pytest.mark.parametrize("variant", VARIANTS)


def test_every_overlay_is_tried_with_every_component_that_it_offers():
    assert len(combinations()) == 2 + 5 + 5 + 2
    assert {chosen for _, chosen in combinations()} >= {(), ("monitoring",), ("autoscaling",)}


@pytest.mark.parametrize(("folder", "components"), combinations())
@pytest.mark.parametrize("version", KUBERNETES)
def test_every_combination_of_components_is_what_a_cluster_accepts(folder, components, version):
    manifests = combine(folder, components)
    check(manifests, version)
    kinds = {manifest["kind"] for manifest in manifests}
    assert ({"PodMonitor", "PrometheusRule"} <= kinds) == ("monitoring" in components)
    assert ("HorizontalPodAutoscaler" in kinds) == ("autoscaling" in components)


@pytest.mark.parametrize(("folder", "components"), combinations())
def test_pods_run_without_rights(folder, components):
    """As "restricted" asks, with a read-only root file system beside it."""
    for template in templates_of(combine(folder, components)):
        check_restricted(template)


MISTAKES = {
    "Deployment": ["spec", "replica"],
    "HorizontalPodAutoscaler": ["spec", "maxReplica"],
    "NetworkPolicy": ["spec", "policyType"],
    "PodMonitor": ["spec", "podMetricsEndpoints", 0, "intervall"],
    "PrometheusRule": ["spec", "groups", 0, "rules", 0, "expression"],
    "RayCluster": ["spec", "headGroupSpec", "headService", "spec", "clusterIp"],
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_misspelt_field_is_refused(kind):
    variant = "kuberay, monitored" if kind == "RayCluster" else "gpu, autoscaled"
    manifest = copy.deepcopy(objects(variant, kind)[0])
    *path, field = MISTAKES[kind]
    place = manifest
    for step in path:
        place = place[step]
    place[field] = 1
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        check((manifest,), KUBERNETES[1])


@pytest.mark.parametrize(
    "change",
    [
        {"hostNetwork": True},
        {"securityContext": {"runAsNonRoot": False}},
        {"automountServiceAccountToken": True},
        {"volumes": [{"name": "host", "hostPath": {"path": "/"}}]},
        {"containers": [{"securityContext": {"privileged": True}}]},
    ],
    ids=str,
)
def test_a_pod_with_more_rights_is_refused(change):
    template = {"spec": {**pod_templates("cpu")[0]["spec"], **change}}
    with pytest.raises(AssertionError):
        check_restricted(template)


@every_variant
def test_a_shared_volume_belongs_to_the_pods_group_and_is_looked_through_once(variant):
    for template in pod_templates(variant):
        rights = template["spec"]["securityContext"]
        assert rights["fsGroup"] == rights["runAsGroup"] == 2000
        assert rights["fsGroupChangePolicy"] == "OnRootMismatch"


@every_variant
def test_pods_run_as_the_images_user_in_its_home(variant):
    assert values("cpu", "USER") == ["2000"]
    for template in pod_templates(variant):
        assert template["spec"]["securityContext"]["runAsUser"] == 2000
    assert {values(image, "WORKDIR")[0] for image in ("cpu", "gpu")} == {"/home/vllm"}


@every_variant
def test_what_is_written_has_a_writable_volume(variant):
    for template in pod_templates(variant):
        volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
        [container] = template["spec"]["containers"]
        mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
        assert {"/home/vllm", "/tmp", "/dev/shm", "/models"} <= set(mounts)
        assert {mount["name"] for mount in mounts.values()} == set(volumes)
        assert volumes[mounts["/dev/shm"]["name"]]["emptyDir"]["medium"] == "Memory"
        environment = {variable["name"]: variable for variable in container["env"]}
        assert environment["HF_HOME"]["value"] == "/models"


@every_variant
def test_the_server_may_take_an_hour_to_start_and_is_then_watched(variant):
    probe = server(variant)["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] >= 3600
    readiness, liveness = (server(variant)[f"{name}Probe"] for name in ("readiness", "liveness"))
    patience = [p["periodSeconds"] * p["failureThreshold"] for p in (readiness, liveness)]
    assert patience[0] < patience[1]


@every_variant
def test_the_server_has_time_to_finish_its_requests(variant):
    pause = server(variant).get("lifecycle", {}).get("preStop", {}).get("sleep", {"seconds": 0})
    needed = pause["seconds"] + serve_settings(variant)["shutdown-timeout"]
    assert pod_templates(variant)[0]["spec"]["terminationGracePeriodSeconds"] > needed


@every_variant
def test_the_api_key_comes_from_a_secret_of_the_users(variant):
    environment = {variable["name"]: variable for variable in server(variant)["env"]}
    key = environment["VLLM_API_KEY"]["valueFrom"]["secretKeyRef"]
    assert key == {"name": "vllm-api-key", "key": "key"}
    assert not objects(variant, "Secret")
    assert "kubectl create secret generic vllm-api-key" in (ROOT / "README.md").read_text()


@every_variant
def test_services_and_policies_select_the_server_and_its_port(variant):
    [service] = objects(variant, "Service")
    assert service["spec"]["ports"][0]["targetPort"] == "http"
    assert [port["name"] for port in server(variant)["ports"]] == ["http"]
    labels = pod_templates(variant)[0]["metadata"]["labels"]
    selectors = [service["spec"]["selector"]]
    for kind in ("NetworkPolicy", "PodDisruptionBudget", "PodMonitor"):
        for manifest in objects(variant, kind):
            spec = manifest["spec"]
            selectors.append((spec.get("podSelector") or spec["selector"])["matchLabels"])
    assert all(selector.items() <= labels.items() for selector in selectors)


SELECTORS = {
    "Deployment": lambda spec: spec["selector"]["matchLabels"],
    "NetworkPolicy": lambda spec: spec["podSelector"]["matchLabels"],
    "PodDisruptionBudget": lambda spec: spec["selector"]["matchLabels"],
    "PodMonitor": lambda spec: spec["selector"]["matchLabels"],
    "Service": lambda spec: spec["selector"],
}


@every_variant
def test_two_installations_of_one_namespace_select_their_own_pods(variant):
    for own, other in (("", "-b"), ("-b", "")):
        ours, theirs = (
            [template["metadata"]["labels"].items() for template in pod_templates(variant, suffix)]
            for suffix in (own, other)
        )
        for manifest in build(variant, own):
            if selector := SELECTORS.get(manifest["kind"]):
                wanted = selector(manifest["spec"]).items()
                assert any(wanted <= labels for labels in ours), manifest
                assert not any(wanted <= labels for labels in theirs), manifest


@every_variant
def test_a_suffix_changes_names_where_they_stand(variant):
    """The claims, settings and pods that an installation names are its own; clients are anybody's."""
    installed = {(m["kind"], m["metadata"]["name"]) for m in build(variant, "-b")}
    for template in pod_templates(variant, "-b"):
        for volume in template["spec"]["volumes"]:
            if claim := volume.get("persistentVolumeClaim"):
                assert ("PersistentVolumeClaim", claim["claimName"]) in installed
            if settings := volume.get("configMap"):
                assert ("ConfigMap", settings["name"]) in installed
    for autoscaler in objects(variant, "HorizontalPodAutoscaler", "-b"):
        assert ("Deployment", autoscaler["spec"]["scaleTargetRef"]["name"]) in installed
    [policy] = [p for p in objects(variant, "NetworkPolicy", "-b") if "egress" in p["spec"]]
    clients = {"podSelector": {"matchLabels": {"vllm-tokenselect/client": "true"}}}
    own = {"podSelector": policy["spec"]["podSelector"]}
    for rule in policy["spec"]["ingress"]:
        assert rule["from"] in ([clients], [own])


@pytest.fixture(scope="module")
def uncommented(tmp_path_factory):
    """The folders of a user who has taken every offer."""
    copy = tmp_path_factory.mktemp("deploy") / "kubernetes"
    shutil.copytree(ROOT, copy)
    uncomment(copy)
    return copy


@pytest.mark.parametrize("folder", ["overlays/cpu", "overlays/gpu", "overlays/gpu-tp", "kuberay"])
@pytest.mark.parametrize("version", KUBERNETES)
def test_everything_that_is_offered_as_a_comment_works_together(uncommented, folder, version):
    manifests = kustomize(uncommented / folder)
    kinds = {manifest["kind"] for manifest in manifests}
    assert {"PodMonitor", "PrometheusRule"} <= kinds
    assert ("HorizontalPodAutoscaler" in kinds) == ("gpu" in folder)
    check(manifests, version)
    for template in templates_of(manifests):
        check_restricted(template)
        on_gpus = "cpu" not in folder
        assert template["spec"].get("runtimeClassName") == ("nvidia" if on_gpus else None)
        assert ("nodeSelector" in template["spec"]) == on_gpus
        for spread in template["spec"].get("topologySpreadConstraints", []):
            selector = spread["labelSelector"]["matchLabels"]
            assert selector.items() <= template["metadata"]["labels"].items()
    assert "topologySpreadConstraints" in templates_of(manifests)[0]["spec"] or folder == "kuberay"


@every_variant
def test_nothing_but_the_api_is_open_to_other_pods(variant):
    policies = objects(variant, "NetworkPolicy")
    assert any(policy["spec"]["policyTypes"] == ["Ingress", "Egress"] for policy in policies)
    for policy in policies:
        own = policy["spec"]["podSelector"]
        for rule in policy["spec"]["ingress"]:
            assert rule["from"]
            if rule["from"] != [{"podSelector": own}]:
                assert rule["ports"] == [{"port": "http", "protocol": "TCP"}]


@every_variant
def test_only_names_the_cluster_itself_and_public_https_can_be_reached(variant):
    [policy] = [p for p in objects(variant, "NetworkPolicy") if "egress" in p["spec"]]
    for rule in policy["spec"]["egress"]:
        own = rule["to"] == [{"podSelector": policy["spec"]["podSelector"]}]
        assert own or {port["port"] for port in rule["ports"]} <= {53, 443}
    for port in (53, 80, 443):
        assert not lets_out(policy, METADATA_SERVICE, port)


@pytest.mark.parametrize("variant", DOWNLOADING)
@pytest.mark.parametrize("protocol", ["UDP", "TCP"])
def test_names_are_resolved_by_a_cache_on_the_node_as_well(variant, protocol):
    [policy] = [p for p in objects(variant, "NetworkPolicy") if "egress" in p["spec"]]
    assert lets_out(policy, NODE_LOCAL_DNS, 53, protocol)
    assert not lets_out(policy, NODE_LOCAL_DNS, 443, protocol)


def lets_out(policy: dict, address: str, port: int, protocol: str = "TCP") -> bool:
    """Whether a policy allows a connection to an address that is no pod's."""
    for rule in policy["spec"]["egress"]:
        if {"port": port, "protocol": protocol} in rule.get("ports", []):
            for block in (target["ipBlock"] for target in rule["to"] if "ipBlock" in target):
                inside = [ip_network(net) for net in (block["cidr"], *block.get("except", []))]
                if [ip_address(address) in network for network in inside].count(True) == 1:
                    return ip_address(address) in inside[0]
    return False


def test_the_image_for_cpus_needs_no_connection_to_the_outside():
    [policy] = objects("cpu", "NetworkPolicy")
    assert policy["spec"]["egress"] == []
    assert serve_settings("cpu")["model"] == "/opt/models/smollm2-135m-instruct"
    assert any('"/opt/models"' in step for step in values("cpu", "RUN"))


@every_variant
def test_as_many_gpus_as_workers(variant):
    gpus = 0
    for template in pod_templates(variant):
        [container] = template["spec"]["containers"]
        gpus += int(container["resources"]["limits"].get("nvidia.com/gpu", 0))
    on_cpu = variant.startswith("cpu")
    assert gpus == (0 if on_cpu else serve_settings(variant).get("tensor-parallel-size", 1))


@every_variant
def test_tags_of_images_are_those_that_the_readme_builds(variant):
    version = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["version"]
    tags = {"cpu": "cpu", "kuberay": f"{version}-ray"}
    expected = f"vllm-tokenselect:{tags.get(variant.split(',')[0], version)}"
    for template in pod_templates(variant):
        assert template["spec"]["containers"][0]["image"] == expected
    assert re.search(rf"docker build -t {expected}\s", (ROOT / "README.md").read_text())


def test_a_change_of_the_settings_replaces_the_pods():
    """The ConfigMap's name has a hash of its contents, and the pods name it."""
    for variant in ("cpu", "gpu", "gpu-tp", "kuberay"):
        [found] = objects(variant, "ConfigMap")
        assert re.fullmatch(r"vllm-[a-z0-9]{10}", found["metadata"]["name"])
        assert config_map(variant) == found["data"]


@pytest.mark.parametrize("variant", AUTOSCALED)
def test_the_autoscaler_decides_on_the_number_of_replicas_alone(variant):
    [deployment] = objects(variant, "Deployment")
    [autoscaler] = objects(variant, "HorizontalPodAutoscaler")
    assert "replicas" not in deployment["spec"]
    assert autoscaler["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    [claim] = objects(variant, "PersistentVolumeClaim")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]


def test_the_autoscalers_metrics_are_what_the_adapter_makes_of_vllms():
    """Requests that wait, and the KV cache in use: long prompts fill it while nothing waits."""
    adapter = yaml.safe_load((ROOT / "components/autoscaling/prometheus-adapter.yaml").read_text())
    offered = {}
    for rule in adapter["rules"]["custom"]:
        series = rule["seriesQuery"].partition("{")[0]
        name = re.sub(rule["name"]["matches"], rule["name"]["as"].replace("$1", r"\1"), series)
        offered[name] = series
    [autoscaler] = objects("gpu, autoscaled", "HorizontalPodAutoscaler")
    asked = [metric["pods"]["metric"]["name"] for metric in autoscaler["spec"]["metrics"]]
    assert [offered[name] for name in asked] == [
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
    ]


def test_a_replica_is_added_before_the_kv_cache_of_the_others_is_full():
    [autoscaler] = objects("gpu, autoscaled", "HorizontalPodAutoscaler")
    target = autoscaler["spec"]["metrics"][1]["pods"]["target"]
    assert target == {"type": "AverageValue", "averageValue": "800m"}


@pytest.mark.parametrize("folder", ["gpu", "gpu-tp"])
def test_autoscaling_is_turned_on_later_without_a_change_of_what_cannot_be_changed(folder):
    """The selector of a Deployment and the access mode of a claim stay as they were created."""
    before, after = (
        {(m["kind"], m["metadata"]["name"]): m["spec"] for m in build(variant) if "spec" in m}
        for variant in (f"{folder}, monitored", f"{folder}, autoscaled")
    )
    for kind, name in before.keys() & after.keys():
        if kind == "PersistentVolumeClaim":
            assert before[kind, name] == after[kind, name]
        elif kind == "Deployment":
            assert before[kind, name]["selector"] == after[kind, name]["selector"]


@pytest.mark.parametrize("variant", MONITORED)
def test_metrics_are_read_from_the_servers_port(variant):
    [monitor] = objects(variant, "PodMonitor")
    [endpoint] = monitor["spec"]["podMetricsEndpoints"]
    assert (endpoint["port"], endpoint["path"]) == ("http", "/metrics")


def test_the_image_and_the_cluster_have_the_ray_that_was_tested():
    [tested] = re.findall("^ray==(.+)$", (REPOSITORY / "constraints/gpu.txt").read_text(), re.M)
    [cluster] = objects("kuberay", "RayCluster")
    assert cluster["spec"]["rayVersion"] == tested
    [installation] = values("gpu", "RUN")
    assert "grep '^ray==' /src/constraints/gpu.txt >> /tmp/installed.txt" in installation
    assert "rayVersion" in (REPOSITORY / "constraints/renew").read_text()


def test_workers_find_a_head_that_waits_for_them():
    """The head is ready only when vLLM answers, and vLLM waits for the workers."""
    assert server("kuberay")["readinessProbe"]["httpGet"]["path"] == "/health"
    [cluster] = objects("kuberay", "RayCluster")
    service = cluster["spec"]["headGroupSpec"]["headService"]["spec"]
    assert service == {"clusterIP": "None", "publishNotReadyAddresses": True}


def test_ray_asks_for_its_token_and_keeps_its_dashboard_to_itself():
    [cluster] = objects("kuberay", "RayCluster")
    assert cluster["spec"]["authOptions"] == {"mode": "token"}
    assert cluster["spec"]["headGroupSpec"]["rayStartParams"]["dashboard-host"] == "127.0.0.1"


def test_rays_head_starts_ray_and_then_the_server():
    head = pod_templates("kuberay")[0]
    assert head["metadata"]["annotations"]["ray.io/overwrite-container-cmd"] == "true"
    [script] = [word for word in server("kuberay")["command"] if word.endswith(".sh")]
    lines = config_map("kuberay")[script.rpartition("/")[2]].splitlines()
    assert lines[-1] == "exec vllm serve --config /etc/tokenselect/vllm.yaml"
    assert any("KUBERAY_GEN_RAY_START_CMD" in line for line in lines)
