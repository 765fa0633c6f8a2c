"""The Job of the page on deployment is what a cluster takes, and fits what the manifests make."""

import kubernetes_validate
import yaml

from tests.docs.pages import REPOSITORY, blocks

BASE = REPOSITORY / "deploy/kubernetes/base"


def test_the_job_that_verifies_a_deployment_fits_its_names_its_secret_and_its_network_policy():
    [block] = [block for block in blocks("docs/deployment.md") if block.language == "yaml"]
    job = yaml.safe_load(block.text)
    kubernetes_validate.validate(job, "1.36", strict=True)
    pod = job["spec"]["template"]
    [container] = pod["spec"]["containers"]
    service = yaml.safe_load((BASE / "service.yaml").read_text())
    port = service["spec"]["ports"][0]["port"]
    assert container["command"][-1] == f"http://{service['metadata']['name']}:{port}"
    policy = yaml.safe_load((BASE / "networkpolicy.yaml").read_text())
    [clients] = policy["spec"]["ingress"][0]["from"]
    assert pod["metadata"]["labels"] == clients["podSelector"]["matchLabels"]
    [server] = yaml.safe_load((BASE / "deployment.yaml").read_text())["spec"]["template"]["spec"][
        "containers"
    ]
    keys = {entry["name"]: entry.get("valueFrom") for entry in server["env"]}
    assert container["env"][0]["valueFrom"] == keys["VLLM_API_KEY"]
