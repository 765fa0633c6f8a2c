"""The compose file is valid, puts every file where it is looked for, and opens nothing but localhost."""

import json
import shlex
import shutil
import subprocess
from pathlib import Path, PurePosixPath

import jsonschema
import pytest
import yaml

from tests.deploy.dockerfile import values
from tests.deploy.tools import REPOSITORY
from tests.metrics.alarms import ALARMS
from tests.metrics.prometheus_process import Prometheus

FOLDER = REPOSITORY / "deploy/compose"
COMPOSE = yaml.safe_load((FOLDER / "compose.yaml").read_text())
SERVICES = COMPOSE["services"]
SCHEMA = json.loads((Path(__file__).parent / "schemas/compose.json").read_text())


def files_of(service: str) -> dict[PurePosixPath, Path]:
    """What a container sees where, of the files of this repository."""
    mounts = [mount.split(":") for mount in SERVICES[service].get("volumes", [])]
    return {
        PurePosixPath(mount[1]): FOLDER / mount[0] for mount in mounts if mount[0].startswith(".")
    }


def provisioned(folder: str) -> dict:
    """The file that Grafana reads at its start from a folder."""
    [path] = [
        path
        for inside, path in files_of("grafana").items()
        if inside.parent == PurePosixPath("/etc/grafana/provisioning", folder)
    ]
    return yaml.safe_load(path.read_text())


def test_it_is_what_the_compose_specification_allows():
    jsonschema.Draft7Validator(SCHEMA).validate(COMPOSE)


@pytest.mark.parametrize("place", [(), ("services", "vllm"), ("services", "vllm", "build")])
def test_a_misspelt_field_is_refused(place):
    wrong = json.loads(json.dumps(COMPOSE))
    found = wrong
    for step in place:
        found = found[step]
    found["imagee"] = "a"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft7Validator(SCHEMA).validate(wrong)


@pytest.mark.parametrize("service", SERVICES)
def test_files_are_there_and_cannot_be_changed_and_volumes_are_declared(service):
    for mount in SERVICES[service]["volumes"]:
        source, _, options = mount.partition(":")
        if source.startswith("."):
            assert (FOLDER / source).is_file()
            assert options.endswith(":ro")
        else:
            assert source in COMPOSE["volumes"]


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_listens_on_localhost_alone_and_without_rights(service):
    assert SERVICES[service]["ports"]
    assert all(port.startswith("127.0.0.1:") for port in SERVICES[service]["ports"])
    assert SERVICES[service]["cap_drop"] == ["ALL"]
    assert SERVICES[service]["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "network_mode", "pid", "ipc"} & set(SERVICES[service])


def test_the_server_is_the_image_for_cpus_and_has_time_to_finish_its_requests():
    server = SERVICES["vllm"]
    assert (FOLDER / server["build"]["context"] / "Dockerfile").resolve().is_file()
    assert server["image"] == f"vllm-tokenselect:{server['build']['target']}"
    [arguments] = values(server["build"]["target"], "CMD")[-1:]
    shutdown = int(json.loads(arguments)[json.loads(arguments).index("--shutdown-timeout") + 1])
    assert int(server["stop_grace_period"].removesuffix("s")) > shutdown
    [home] = server["volumes"]
    assert home.partition(":")[2] == values("cpu", "WORKDIR")[0]


def test_whoever_asks_another_service_finds_it():
    [scraped] = prometheus_configuration()["scrape_configs"]
    assert scraped["static_configs"] == [{"targets": ["vllm:8000"]}]
    assert values("cpu", "EXPOSE") == ["8000"]
    [source] = provisioned("datasources")["datasources"]
    assert source["url"] == "http://prometheus:9090"
    assert {"vllm", "prometheus"} <= set(SERVICES)
    interval = prometheus_configuration()["global"]["scrape_interval"]
    assert source["jsonData"]["timeInterval"] == interval


def prometheus_configuration() -> dict:
    [argument] = [
        word for word in SERVICES["prometheus"]["command"] if word.startswith("--config.file=")
    ]
    path = files_of("prometheus")[PurePosixPath(argument.partition("=")[2])]
    return yaml.safe_load(path.read_text())


def test_grafana_finds_the_dashboard_and_shows_it_first():
    [provider] = provisioned("dashboards")["providers"]
    dashboards = PurePosixPath(provider["options"]["path"])
    first = SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert PurePosixPath(first).parent == dashboards
    path = files_of("grafana")[PurePosixPath(first)]
    assert path.resolve() == REPOSITORY / "deploy/grafana/tokenselect.json"


@pytest.fixture
def container(tmp_path) -> Path:
    """The files of Prometheus's container, as they are mounted."""
    for inside, path in files_of("prometheus").items():
        copy = tmp_path / inside.relative_to("/")
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    return tmp_path


def test_prometheus_finds_its_rules(container):
    names = prometheus_configuration()["rule_files"]
    assert [(container / "etc/prometheus" / name).is_file() for name in names] == [True]


@pytest.mark.endurance
def test_a_prometheus_that_reads_these_files_has_all_alarms(container):
    configuration = container / "etc/prometheus/prometheus.yaml"
    assert shutil.which("promtool"), "install promtool (Debian's package prometheus)"
    command = shlex.split(f"promtool check config {configuration}")
    checked = subprocess.run(command, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    with Prometheus(configuration) as prometheus:
        assert prometheus.alarms() == set(ALARMS)
