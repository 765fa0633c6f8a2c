"""What the manifests and the image hand to `vllm serve` is what vLLM and TOKENSELECT accept."""

from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.entrypoints.serve.instrumentator.health import router as health
from vllm.utils.argparse_utils import FlexibleArgumentParser

from tests.deploy.dockerfile import command
from tests.deploy.manifests import VARIANTS, config_map, objects, server
from vllm_tokenselect.config import TokenSelectConfig
from vllm_tokenselect.guard import ClientsOnly

DEFAULT_BLOCK_SIZES = (16, 128)  # of a GPU and of a CPU
every_variant = pytest.mark.parametrize("variant", VARIANTS)


@pytest.fixture(scope="module")
def parser():
    """The parser of `vllm`, with the one subcommand that is used."""
    parser = FlexibleArgumentParser()
    ServeSubcommand().subparser_init(parser.add_subparsers(dest="subparser"))
    return parser


@pytest.fixture
def served(parser, tmp_path):
    """Parsed arguments of a variant's server; vLLM ends the test at an argument that it does not know."""

    def parse(variant: str):
        settings = tmp_path / "vllm.yaml"
        settings.write_text(config_map(variant)["vllm.yaml"])
        arguments = server(variant).get("args", ["--config", "/etc/tokenselect/vllm.yaml"])
        assert arguments == ["--config", "/etc/tokenselect/vllm.yaml"]
        return parser.parse_args(["serve", "--config", str(settings)])

    return parse


@every_variant
def test_the_settings_are_arguments_of_vllm_serve_and_choose_tokenselect(served, variant):
    arguments = served(variant)
    assert str(arguments.attention_backend).endswith("TOKENSELECT")
    assert arguments.model


@every_variant
def test_tokenselect_accepts_its_settings_and_the_size_of_a_step(served, variant):
    arguments = served(variant)
    assert set(arguments.additional_config) == {"tokenselect"}
    config = TokenSelectConfig.from_mapping(arguments.additional_config["tokenselect"])
    for block_size in DEFAULT_BLOCK_SIZES:
        config.check_engine(
            block_size=block_size,
            max_num_batched_tokens=arguments.max_num_batched_tokens,
            max_num_seqs=arguments.max_num_seqs,
        )


@every_variant
def test_paths_that_no_key_guards_are_closed(served, variant):
    assert served(variant).middleware == [f"{ClientsOnly.__module__}.{ClientsOnly.__name__}"]


def test_the_image_for_cpus_serves_by_arguments_of_vllm_serve(parser):
    arguments = parser.parse_args(command("cpu")[1:])
    assert arguments.model_tag == "/opt/models/smollm2-135m-instruct"


@every_variant
def test_probes_ask_a_path_that_vllm_answers(variant):
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert server(variant)[name]["httpGet"]["path"] in {route.path for route in health.routes}


def test_metrics_are_where_vllm_shows_them_under_the_name_that_it_gives_them():
    [package] = find_spec("vllm").submodule_search_locations
    route = Path(package, "entrypoints/serve/instrumentator/metrics.py").read_text()
    [monitor] = objects("gpu, monitored", "PodMonitor")
    assert f'Mount("{monitor["spec"]["podMetricsEndpoints"][0]["path"]}"' in route
    loggers = Path(package, "v1/metrics/loggers.py").read_text()
    for name in ("num_requests_waiting", "kv_cache_usage_perc"):
        assert f'name="vllm:{name}"' in loggers
