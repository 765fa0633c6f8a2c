"""A real Prometheus, and a configuration with which time passes sixty times faster."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import yaml

from tests.metrics.alarms import RULES
from vllm_tokenselect.tools.common.server import free_port

# Of a rule: how far an expression looks back (`[10m]`), and how long an alarm waits (`for: 10m`).
_DURATION = re.compile(r"(\[|for: )(\d+)([mh])\b")
_SIXTY_TIMES_FASTER = {"m": "s", "h": "m"}


def faster(rules: str) -> str:
    """The rules with seconds in the place of minutes, and minutes in the place of hours."""
    return _DURATION.sub(lambda d: d[1] + d[2] + _SIXTY_TIMES_FASTER[d[3]], rules)


def configure(folder: Path, ports: list[int]) -> Path:
    """Write the configuration of a Prometheus that looks once a second, by rules of a faster time.

    Args:
        folder: where it goes, and the rules.
        ports: of the servers that it watches, on this machine. They need not be there yet.
    """
    (folder / "rules.yaml").write_text(faster(RULES.read_text()))
    targets = [f"127.0.0.1:{port}" for port in ports]
    configuration = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": ["rules.yaml"],
        "scrape_configs": [{"job_name": "vllm", "static_configs": [{"targets": targets}]}],
    }
    path = folder / "prometheus.yaml"
    path.write_text(yaml.safe_dump(configuration))
    return path


class Prometheus:
    """Debian's Prometheus, which runs while the block does.

    Args:
        configuration: its file. Data and the log go beside it.
    """

    def __init__(self, configuration: Path) -> None:
        self._configuration = configuration
        self._log = configuration.with_suffix(".log")
        self._address = f"127.0.0.1:{free_port()}"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        assert shutil.which("prometheus"), "install prometheus (Debian's package of this name)"
        command = ["prometheus", f"--config.file={self._configuration}"]
        command += [f"--storage.tsdb.path={self._configuration.with_suffix('.data')}"]
        command += [f"--web.listen-address={self._address}"]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        self.wait_for(self._is_ready, 30)
        return self

    def __exit__(self, *failure: object) -> None:
        assert self._process is not None
        self._process.terminate()
        self._process.wait(30)

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The series that an expression has now, each with its labels (`metric`) and `value`."""
        asked = urllib.parse.urlencode({"query": expression})
        return self._get(f"query?{asked}")["result"]

    def alarms(self) -> set[str]:
        """Alarms of the rules that it has read."""
        return {rule["name"] for group in self._get("rules")["groups"] for rule in group["rules"]}

    def firing(self, port: int) -> dict[str, float]:
        """Alarms of a server that fire now, with the value of their expressions."""
        return {
            alarm["labels"]["alertname"]: float(alarm["value"])
            for alarm in self._get("alerts")["alerts"]
            if alarm["state"] == "firing" and alarm["labels"]["instance"] == f"127.0.0.1:{port}"
        }

    def wait_for(self, what: Callable[[], object], seconds: float) -> None:
        """Wait until something is so.

        Raises:
            AssertionError: when it is not so in time, or Prometheus has ended.
        """
        assert self._process is not None
        deadline = time.monotonic() + seconds
        while not what():
            assert self._process.poll() is None, self._log.read_text()
            assert time.monotonic() < deadline, f"not within {seconds} s"
            time.sleep(0.25)

    def _is_ready(self) -> bool:
        with suppress(urllib.error.URLError):
            urllib.request.urlopen(f"http://{self._address}/-/ready", timeout=5).close()
            return True
        return False

    def _get(self, path: str) -> dict[str, Any]:
        with urllib.request.urlopen(f"http://{self._address}/api/v1/{path}", timeout=30) as answer:
            data: dict[str, Any] = json.load(answer)["data"]
        return data
