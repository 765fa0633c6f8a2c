"""A seam that is not what its hook expects stops the server, by name; one that is, is wrapped once."""

import functools
import importlib.util
import inspect
import sys
from types import ModuleType

import pytest

from vllm_tokenselect.hooks import all_seams, engine_config, platform_backend
from vllm_tokenselect.hooks.seam import Seam, SeamBroken, is_wrapped, wrap_function

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
    retired_by="vLLM adds to the batch itself",
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


MADE_UP = """
def load(path: str, *, mode: str = "r") -> tuple:
    "Load a file."
    return "loaded", path, mode

class Engine:
    @classmethod
    def step(cls, batch, budget=None):
        "Take a step."
        batch.append(budget,)
        return cls, batch

    def load_model(self):
        return load("weights")

class FastEngine(Engine):
    pass
"""
LOAD = Seam(
    name="made_up",
    module="vllm.engine",
    qualname="load",
    parameters=("path",),
    why="sees what is loaded",
    retired_by="vLLM says what it loads",
)
LOAD_MODEL = Seam(
    name="made_up",
    module="vllm.engine",
    qualname="Engine.load_model",
    parameters=("self",),
    contains=('load("weights")',),
    calls="load",
    why="sees which weights are loaded",
    retired_by="vLLM says what it loads",
)


@pytest.fixture
def engine(installed_vllm, monkeypatch):
    """The module of an installed vLLM, and another that has imported its function."""
    installed_vllm({"vllm/engine.py": MADE_UP})
    module, user = ModuleType("vllm.engine"), ModuleType("vllm.user")
    exec(MADE_UP, vars(module))
    user.load = module.load
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(sys.modules, user.__name__, user)
    module.user = user
    return module


def note(calls: list, original, *args, **kwargs):
    calls.append((args, kwargs))
    return original(*args, **kwargs)


@pytest.mark.parametrize("times", [1, 2, 3])
def test_a_call_passes_the_hook_once_however_often_it_was_installed(engine, times):
    calls = []
    for _ in range(times):
        SEAM.wrap(functools.partial(note, calls))
        LOAD.wrap(functools.partial(note, calls))
    assert engine.load("here", mode="w") == ("loaded", "here", "w")
    assert calls == [(("here",), {"mode": "w"})]
    assert engine.Engine.step([1], budget=2) == (engine.Engine, [1, 2])
    assert calls[1:] == [((engine.Engine, [1, 2]), {"budget": 2})]


def test_a_class_method_is_told_the_class_that_it_was_called_on(engine):
    calls = []
    SEAM.wrap(functools.partial(note, calls))
    assert engine.FastEngine().step([], 1) == (engine.FastEngine, [1])
    assert calls[0][0][0] is engine.FastEngine


def test_a_class_can_be_wrapped_without_the_one_that_it_inherits_from(engine):
    calls = []
    for _ in range(2):
        SEAM.wrap(functools.partial(note, calls), engine.FastEngine)
    engine.Engine.step([])
    assert calls == []
    engine.FastEngine.step([])
    assert len(calls) == 1


def test_what_a_wrapped_class_hands_down_is_not_wrapped_again(engine):
    calls = []
    for owner in (engine.Engine, engine.FastEngine):
        SEAM.wrap(functools.partial(note, calls), owner)
    engine.FastEngine.step([])
    assert len(calls) == 1


def test_a_wrapped_function_looks_like_the_original_which_can_be_reached(engine):
    load, step = engine.load, vars(engine.Engine)["step"].__func__
    for seam in (LOAD, SEAM):
        seam.wrap(functools.partial(note, []))
    for wrapped, original in ((engine.load, load), (engine.Engine.step.__func__, step)):
        assert wrapped is not original
        assert wrapped.__wrapped__ is original
        assert wrapped.__name__ == original.__name__
        assert wrapped.__doc__ == original.__doc__
        assert inspect.signature(wrapped) == inspect.signature(original)
    assert isinstance(vars(engine.Engine)["step"], classmethod)


def test_a_function_is_wrapped_wherever_it_was_imported(engine):
    LOAD.wrap(lambda load, path: ("wrapped", path))
    assert engine.user.load("here") == ("wrapped", "here")
    assert engine.Engine().load_model() == ("wrapped", "weights")


def test_what_a_function_calls_is_wrapped_there_alone(engine):
    LOAD_MODEL.wrap(lambda load, path: ("wrapped", path))
    assert engine.Engine().load_model() == ("wrapped", "weights")
    assert engine.user.load("here") == ("loaded", "here", "r")


@pytest.mark.parametrize("seam", [SEAM, LOAD], ids=["method", "function"])
def test_a_vllm_with_our_diff_is_left_alone(seam, engine, installed_vllm):
    marked = MADE_UP.replace("return ", "import vllm_tokenselect; return ")
    installed_vllm({"vllm/engine.py": marked})
    before = engine.load, vars(engine.Engine)["step"]
    seam.wrap(lambda *args: pytest.fail("wrapped"))
    assert (engine.load, vars(engine.Engine)["step"]) == before


def test_a_broken_seam_stops_with_its_message_and_wraps_nothing(engine, installed_vllm):
    installed_vllm({"vllm/engine.py": MADE_UP.replace("append", "extend")})
    with pytest.raises(SeamBroken, match=r"no longer contains `batch\.append"):
        SEAM.wrap(lambda *args: None)
    assert not is_wrapped(engine.Engine, "step")


def test_a_class_that_is_gone_stops_with_the_seams_message(engine, installed_vllm):
    installed_vllm({"vllm/engine.py": MADE_UP.replace("Engine", "Motor")})
    del engine.Engine
    with pytest.raises(SeamBroken, match=r"Engine\.step does not exist"):
        SEAM.wrap(lambda *args: None)


def test_a_class_without_a_seam_is_wrapped_once_too(engine):
    calls = []
    for _ in range(2):
        wrap_function(engine.Engine, "load_model", functools.partial(note, calls))
    assert engine.Engine().load_model() == ("loaded", "weights", "r")
    assert len(calls) == 1


@pytest.mark.parametrize("seam", all_seams(), ids=lambda seam: f"{seam.name}-{seam.target}")
def test_every_seam_says_what_it_is_for_and_what_would_retire_it(seam):
    assert seam.why.strip()
    assert seam.retired_by.startswith("vLLM ")


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
