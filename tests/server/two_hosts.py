"""Two hosts on one machine: network namespaces with a cable between them, and Ray on both."""

from __future__ import annotations

import ctypes
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vllm_tokenselect.tools.common.watcher import Watcher

RAY = Path(sys.executable).parent / "ray"
RAY_PORT = 6379
# If the tests are killed, which leaves nobody to end what runs there.
REMOVE_HOSTS = """
for name; do
    kill -s KILL $(ip netns pids "$name")
    ip netns delete "$name"
done
"""
CLONE_NEWNET = 0x40000000


@dataclass(frozen=True)
class Host:
    """A network namespace with one interface, `eth0`."""

    name: str
    address: str

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Be on this host: this thread, and whatever it starts meanwhile."""
        with Path("/proc/thread-self/ns/net").open() as before:
            _enter(Path("/run/netns", self.name))
            try:
                yield
            finally:
                _set_namespace(before.fileno())

    def processes(self) -> list[int]:
        return [int(pid) for pid in _ip("netns", "pids", self.name).split()]

    def lose_power(self) -> None:
        """Kill everything that runs on the host."""
        for pid in self.processes():
            try:
                os.kill(pid, 9)
            except ProcessLookupError:
                continue


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Make them, and remove them with all that still runs there. Takes the rights of root."""
    one, other = (Host(f"tokenselect-{os.getpid()}-{i}", f"10.213.0.{i}") for i in (1, 2))
    watcher = Watcher(REMOVE_HOSTS, one.name, other.name)
    try:
        for host in (one, other):
            _ip("netns", "add", host.name)
            _ip("-n", host.name, "link", "set", "lo", "up")
        cable = ("link", "add", "eth0", "netns", one.name, "type", "veth")
        _ip(*cable, "peer", "name", "eth0", "netns", other.name)
        for host in (one, other):
            _ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", "eth0")
            _ip("-n", host.name, "link", "set", "eth0", "up")
        yield one, other
    finally:
        for host in (one, other):
            if Path("/run/netns", host.name).exists():
                host.lose_power()
                _ip("netns", "delete", host.name)
        watcher.dismiss()


class RayCluster:
    """Ray on both hosts, each with a place for one worker; whoever has no token is turned away.

    Attributes:
        env: what a process needs to take part.

    Args:
        folder: for Ray's files, of a short name: sockets are among them.
    """

    def __init__(self, hosts: tuple[Host, Host], folder: Path, env: dict[str, str]) -> None:
        self.hosts, self.folder = hosts, folder
        self.env = {
            **env,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_ADDRESS": f"{hosts[0].address}:{RAY_PORT}",
            "GLOO_SOCKET_IFNAME": "eth0",
        }

    def start(self) -> None:
        head, node = self.hosts
        folder = ("--temp-dir", str(self.folder), "--include-dashboard", "false")
        self._start(head, "--head", "--port", str(RAY_PORT), *folder)
        self._start(node, "--address", self.env["RAY_ADDRESS"])

    def _start(self, host: Host, *arguments: str) -> None:
        own = ("--node-ip-address", host.address, "--num-cpus", "1", "--num-gpus", "1")
        env = {**os.environ, **self.env, "VLLM_HOST_IP": host.address}
        env.pop("RAY_ADDRESS")  # `ray start` takes it for the cluster that it should join
        with host.entered():
            done = subprocess.run(
                [RAY, "start", *arguments, *own, "--disable-usage-stats"],
                env=env,
                check=False,
                capture_output=True,
                text=True,
                timeout=120,
            )
        if done.returncode:
            raise OSError(f"ray start: {done.stdout}{done.stderr}")

    def refuses_a_wrong_token(self) -> bool:
        """Whether somebody on the network is turned away who has another token, and nobody else."""
        right, wrong = (
            self._status({**os.environ, **self.env, **other})
            for other in ({}, {"RAY_AUTH_TOKEN": secrets.token_hex(32)})
        )
        return right.returncode == 0 and wrong.returncode != 0 and "token" in wrong.stderr.lower()

    def _status(self, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
        with self.hosts[1].entered():
            return subprocess.run(
                [RAY, "status", "--address", self.env["RAY_ADDRESS"]],
                env=env,
                check=False,
                capture_output=True,
                text=True,
                timeout=60,
            )


def _ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def _enter(namespace: Path) -> None:
    with namespace.open() as opened:
        _set_namespace(opened.fileno())


def _set_namespace(descriptor: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")
