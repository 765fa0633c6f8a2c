"""Each alarm is the same for Prometheus and its operator, is explained, and is tried by promtool."""

import importlib.util
import re
import shutil
import subprocess

import pytest
import yaml

from tests.docs.pages import anchors, rows
from tests.metrics.alarms import ALARMS, REPOSITORY, RULES

PAGE = "docs/alarms.md"
PROMTOOL_TESTS = REPOSITORY / "tests/metrics/alarms.promtool.yaml"

every_alarm = pytest.mark.parametrize("alarm", ALARMS)


def test_the_operators_rule_has_the_same_alarms():
    path = REPOSITORY / "deploy/prometheus/operator_rule.py"
    spec = importlib.util.spec_from_file_location("operator_rule", path)
    written = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(written)
    rule = written.OPERATOR_RULE.read_text()
    assert rule == written.operator_rule(RULES.read_text()), "run `make alarms`"
    assert yaml.safe_load(rule)["spec"] == yaml.safe_load(RULES.read_text())


@every_alarm
def test_an_alarm_says_where_how_bad_and_what_to_do(alarm):
    rule = ALARMS[alarm]
    assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
    assert rule["labels"]["severity"] in ("info", "warning")
    assert "{{ $labels.instance }}" in rule["annotations"]["summary"]
    page, _, section = rule["annotations"]["runbook_url"].partition("#")
    assert page == PAGE
    assert section == alarm.lower()


def test_the_page_has_a_section_for_each_alarm_and_no_other():
    assert anchors(PAGE) - {"answer-an-alarm"} == {alarm.lower() for alarm in ALARMS}
    sections = (REPOSITORY / PAGE).read_text().split("\n## ")[1:]
    for section in sections:
        marks = re.findall(r"^\*\*(.+?):\*\*", section, re.MULTILINE)
        assert marks == ["It means", "Confirm", "Do"], section


def test_the_list_of_alarms_is_whole():
    listed = [row[0] for row in rows("docs/operating.md", "alarm")]
    assert listed == list(ALARMS)


@every_alarm
def test_an_alarm_tells_replicas_apart_wherever_it_adds_up(alarm):
    for labels in re.findall(r"\bby \((.*?)\)", ALARMS[alarm]["expr"]):
        assert labels == "namespace, pod, instance, model_name"


@every_alarm
def test_an_alarm_is_seen_to_fire_and_not_to_fire(alarm):
    """Where there is no promtool, at least its tests are there."""
    tests = yaml.safe_load(PROMTOOL_TESTS.read_text())["tests"]
    checks = [check for test in tests for check in test["promql_expr_test"]]
    fired = {
        labels
        for check in checks
        for sample in check["exp_samples"]
        for labels in re.findall(r'alertname="(\w+)"', sample["labels"])
    }
    assert alarm in fired
    assert "healthy, with long prompts" in [test["name"] for test in tests]


@pytest.mark.endurance
@pytest.mark.parametrize("command", [("check", RULES), ("test", PROMTOOL_TESTS)])
def test_prometheus_takes_the_rules_and_they_fire_when_they_should(command):
    assert shutil.which("promtool"), "install promtool (Debian's package prometheus)"
    what, file = command
    done = subprocess.run(["promtool", what, "rules", file], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
