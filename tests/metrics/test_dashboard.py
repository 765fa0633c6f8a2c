"""The dashboard and the alarms ask for nothing that does not exist, and for everything that we count."""

import itertools
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from tests.metrics.alarms import ALARMS, REPOSITORY, metrics, selectors
from tests.metrics.dashboard import EXPRESSIONS, PANELS, VARIABLES
from vllm_tokenselect.metrics import TokenSelectCollector

# From the widest to the narrowest: each offers what is within those before it.
CHOICES = ["namespace", "pod", "instance", "model_name"]
SERIES = {"gauge": ("",), "counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}


def series_of(described) -> set[str]:
    return {name + suffix for kind, name in described for suffix in SERIES[kind]}


def vllms_series() -> set[str]:
    """What vLLM's logger creates, read from its source."""
    [package] = find_spec("vllm").submodule_search_locations
    source = Path(package, "v1/metrics/loggers.py").read_text()
    created = re.findall(r'_(gauge|counter|histogram)_cls\(\s*name="(vllm:\w+)"', source)
    assert created
    return series_of(created)


def our_series() -> set[str]:
    return series_of((metric.type, metric.name) for metric in TokenSelectCollector().describe())


def test_every_metric_of_the_dashboard_exists():
    queries = [*EXPRESSIONS, *(VARIABLES[name]["query"]["query"] for name in CHOICES)]
    asked = set().union(*map(metrics, queries))
    assert asked
    assert asked <= vllms_series() | our_series()


def test_every_metric_of_the_alarms_exists():
    asked = set().union(*(metrics(alarm["expr"]) for alarm in ALARMS.values()))
    assert our_series() <= asked
    assert asked <= vllms_series() | our_series()


def test_every_metric_of_the_page_about_watching_exists():
    named = metrics((REPOSITORY / "docs/operating.md").read_text())
    assert our_series() <= named <= vllms_series() | our_series()


def test_every_metric_of_ours_is_shown():
    assert our_series() <= set().union(*map(metrics, EXPRESSIONS))


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_an_expression_is_about_the_chosen_servers_and_models(expression):
    chosen = ", ".join(f'{name}=~"${name}"' for name in CHOICES)
    assert all(s.partition("{")[2].startswith(chosen) for s in selectors(expression))


@pytest.mark.parametrize("name", CHOICES)
def test_all_servers_are_shown_at_first_those_without_kubernetes_labels_too(name):
    """`.*` is also true of a label that is not there."""
    variable = VARIABLES[name]
    assert variable["includeAll"]
    assert variable["allValue"] == ".*"
    assert variable["current"]["value"] == ["$__all"]
    before = CHOICES[: CHOICES.index(name)]
    chosen = ", ".join(f'{other}=~"${other}"' for other in before)
    series = "vllm:num_requests_running" + (f"{{{chosen}}}" if chosen else "")
    assert variable["query"]["query"] == variable["definition"] == f"label_values({series}, {name})"


def test_what_an_alarm_points_to_is_a_panel_of_this_name():
    page = (REPOSITORY / "docs/alarms.md").read_text()
    named = set(re.findall(r'(?<!\w)"([A-Z][^"]+)"', page))
    assert named
    assert named <= {panel["title"] for panel in PANELS}


def test_everything_reads_the_chosen_data_source():
    assert VARIABLES["datasource"]["type"] == "datasource"
    assert VARIABLES["datasource"]["query"] == "prometheus"
    targets = [target for panel in PANELS for target in panel["targets"]]
    choices = [VARIABLES[name] for name in CHOICES]
    sources = [user["datasource"]["uid"] for user in (*PANELS, *targets, *choices)]
    assert set(sources) == {"${datasource}"}


def test_panels_have_ids_of_their_own_and_do_not_overlap():
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    for one, other in itertools.combinations([panel["gridPos"] for panel in PANELS], 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        below = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or below, (one, other)
    assert max(panel["gridPos"]["x"] + panel["gridPos"]["w"] for panel in PANELS) <= 24
