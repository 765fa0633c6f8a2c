"""Every way to deploy on Kubernetes builds, is valid, runs without rights and opens one port."""

import re
import tomllib

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.deploy.dockerfile import values
from tests.deploy.kuberay_schema import RAY_CLUSTER
from tests.deploy.manifests import (
    ROOT,
    VARIANTS,
    build,
    config_map,
    objects,
    pod_templates,
    serve_settings,
    server,
)
from tests.deploy.tools import REPOSITORY

# The oldest with the preStop hook `sleep` in every cluster, and the newest that is known.
KUBERNETES = ["1.30", "1.36"]
OTHERS = {"RayCluster", "PodMonitor"}
AUTOSCALED = [name for name in VARIANTS if "autoscaled" in name]
MONITORED = [name for name in VARIANTS if "monitored" in name or "autoscaled" in name]

every_variant = pytest.mark.parametrize("variant", VARIANTS)


@every_variant
@pytest.mark.parametrize("version", KUBERNETES)
def test_objects_are_what_kubernetes_accepts(variant, version):
    for manifest in build(variant):
        if manifest["kind"] not in OTHERS:
            kubernetes_validate.validate(manifest, version, strict=True)


@pytest.mark.parametrize("version", KUBERNETES)
def test_ray_clusters_are_what_kuberay_and_kubernetes_accept(version):
    [cluster] = objects("kuberay", "RayCluster")
    jsonschema.validate(cluster, RAY_CLUSTER)
    for template in pod_templates("kuberay"):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {}, **template}
        kubernetes_validate.validate(pod, version, strict=True)


@every_variant
def test_pods_run_without_rights(variant):
    for template in pod_templates(variant):
        pod = template["spec"]
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        for container in pod["containers"]:
            rights = container["securityContext"]
            assert rights["capabilities"] == {"drop": ["ALL"]}
            assert rights["readOnlyRootFilesystem"]
            assert rights["allowPrivilegeEscalation"] is False


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
    # KubeRay adds these two to the head.
    labels = {"ray.io/cluster": "vllm-tokenselect", "ray.io/node-type": "head"}
    labels |= pod_templates(variant)[0]["metadata"]["labels"]
    selectors = [service["spec"]["selector"]]
    for kind in ("NetworkPolicy", "PodDisruptionBudget", "PodMonitor"):
        for manifest in objects(variant, kind):
            spec = manifest["spec"]
            selectors.append((spec.get("podSelector") or spec["selector"])["matchLabels"])
    assert all(selector.items() <= labels.items() for selector in selectors)


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
        for target in rule["to"]:
            assert "ipBlock" not in target or "169.254.0.0/16" in target["ipBlock"]["except"]


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


def test_the_autoscalers_metric_is_what_the_adapter_makes_of_vllms_queue_length():
    adapter = yaml.safe_load((ROOT / "components/autoscaling/prometheus-adapter.yaml").read_text())
    [rule] = adapter["rules"]["custom"]
    series = rule["seriesQuery"].partition("{")[0]
    pattern = rule["name"]["matches"]
    offered = re.sub(pattern, rule["name"]["as"].replace("$1", r"\1"), series)
    [autoscaler] = objects("gpu, autoscaled", "HorizontalPodAutoscaler")
    [metric] = autoscaler["spec"]["metrics"]
    assert series == "vllm:num_requests_waiting"
    assert metric["pods"]["metric"]["name"] == offered


@pytest.mark.parametrize("variant", MONITORED)
def test_metrics_are_read_from_the_servers_port(variant):
    [monitor] = objects(variant, "PodMonitor")
    [endpoint] = monitor["spec"]["podMetricsEndpoints"]
    assert (endpoint["port"], endpoint["path"]) == ("http", "/metrics")


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
