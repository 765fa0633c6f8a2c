"""A seam of vLLM that is not what its hook expects stops the server, by name."""

import importlib.util

import pytest

from vllm_tokenselect.hooks import all_seams, engine_config, platform_backend
from vllm_tokenselect.hooks.seam import Seam, SeamBroken

HELD = """
class Engine:
    @classmethod
    def step(cls, batch, budget=None):
        batch.append(
            budget,
        )
"""

SEAM = Seam(
    name="made_up",
    module="vllm.engine",
    qualname="Engine.step",
    parameters=("cls", "batch"),
    contains=("batch.append(budget,)",),
    why="adds to the batch",
)


def test_a_seam_holds_whatever_the_line_breaks_and_further_parameters():
    assert SEAM.check_source(HELD).status == "holds"


BROKEN = {
    "parameter renamed": (
        HELD.replace("batch,", "rows,", 1),
        "expected parameters ['cls', 'batch'], found ['cls', 'rows', 'budget']",
    ),
    "parameters swapped": (HELD.replace("cls, batch", "batch, cls"), "expected parameters"),
    "fragment gone": (
        HELD.replace("append", "extend"),
        "its body no longer contains `batch.append(budget,)`",
    ),
    "fragment only in a neighbor": (
        "class Engine:\n    def step(cls, batch): pass\n    def add(cls): batch.append(budget,)\n",
        "its body no longer contains",
    ),
    "function gone": (HELD.replace("def step", "def run"), "Engine.step does not exist"),
    "class gone": (HELD.replace("Engine", "Motor"), "Engine.step does not exist"),
    "not Python": ("class Engine(:", "vllm.engine cannot be parsed"),
}


@pytest.mark.parametrize(("source", "detail"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_seam_stops_the_server_and_says_where_and_what(source, detail, installed_vllm):
    installed_vllm({"vllm/engine.py": source})
    with pytest.raises(SeamBroken) as stopped:
        SEAM.require()
    assert "vllm.engine:Engine.step" in str(stopped.value)
    assert detail in str(stopped.value)
    assert "0.32 or 0.33" in str(stopped.value)


def test_a_module_that_is_gone_stops_the_server(installed_vllm):
    installed_vllm({"vllm/motor.py": HELD})
    with pytest.raises(SeamBroken, match=r"vllm\.engine does not exist"):
        SEAM.require()


def test_a_function_that_calls_us_itself_is_patched(installed_vllm):
    call = "        from vllm_tokenselect.hooks.made_up import step\n"
    installed_vllm({"vllm/engine.py": HELD + call})
    assert SEAM.require() == "patched"


def test_the_mark_of_a_neighbor_does_not_make_a_function_patched(installed_vllm):
    neighbor = "    def other(cls):\n        import vllm_tokenselect\n"
    installed_vllm({"vllm/engine.py": HELD + neighbor})
    assert SEAM.require() == "holds"


@pytest.mark.parametrize("hook", [platform_backend, engine_config])
def test_a_hook_leaves_a_vllm_that_it_does_not_know_as_it_is(hook, installed_vllm):
    installed_vllm({"vllm/platforms/cpu.py": "class CpuPlatform: pass"})
    platform = type("CpuPlatform", (), {"device_type": "cpu", "device_name": "cpu"})
    before = dict(vars(platform))
    with pytest.raises(SeamBroken, match=r"vllm\.platforms\.cpu:CpuPlatform"):
        hook.install(platform)
    assert dict(vars(platform)) == before


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
@pytest.mark.parametrize("seam", all_seams(), ids=lambda seam: f"{seam.name}-{seam.target}")
def test_every_seam_holds_on_the_installed_vllm(seam):
    finding = seam.check_installed()
    assert finding.status == "holds", finding.detail
