"""What is wrong with the plugin stops nobody who did not choose it; whoever did is told the reason."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import vllm_tokenselect
from tests.hooks.conftest import TINY_LLAMA

pytest.importorskip("vllm")

# What is wrong, and what is said about it. The last leaves hooks behind that are installed already.
WRONG = {
    "the next release of vLLM": (
        'vllm.__version__ = "0.34.0+cpu"',
        "supports vLLM 0.32 and 0.33, but vLLM 0.34.0+cpu is installed",
    ),
    "a missing module": (
        'vllm.__version__ = release; sys.modules["vllm_tokenselect.hooks"] = None',
        "vllm_tokenselect.hooks",
    ),
    "a broken seam": (
        'del sys.modules["vllm_tokenselect.hooks"]\n'
        "from vllm_tokenselect.hooks import engine_config\n"
        'seam = replace(engine_config.SEAMS["cpu"], contains=("nothing like it",))\n'
        'engine_config.SEAMS["cpu"] = seam',
        "CpuPlatform.check_and_update_config: its body no longer contains `nothing like it`",
    ),
}

# Engines are configured as by the command line and as by an offline LLM.
CONFIGURE = """
import contextlib, io, json, os, subprocess, sys
from dataclasses import replace
import vllm
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm_tokenselect.plugin import register

model, wrong = json.loads(sys.argv[1])
release = vllm.__version__

def serve(*options):
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    arguments = parser.parse_args(["--model", model, "--skip-tokenizer-init", *options])
    return AsyncEngineArgs.from_cli_args(arguments).create_engine_config()

def offline(**options):
    return EngineArgs(model=model, skip_tokenizer_init=True, **options).create_engine_config()

def refused(configure, *arguments, **options):
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            configure(*arguments, **options)
    except Exception as error:
        return str(error)
    except SystemExit:
        return said.getvalue()
    return "not refused"

def configure():
    return {
        "plain": serve().attention_config.backend is None,
        "other": offline(attention_backend="CPU_ATTN").attention_config.backend.name,
        "refused": [
            refused(serve, "--attention-backend", "TOKENSELECT"),
            refused(serve, "-ac.backend", "tokenselect"),
            refused(offline, attention_backend="TOKENSELECT"),
            refused(offline, attention_config={"backend_per_kind": {"full_attention": "TOKENSELECT"}}),
        ],
    }

found, members = {}, dict(AttentionBackendEnum._member_map_)
for name, (code, _) in wrong.items():
    type.__setattr__(AttentionBackendEnum, "_member_map_", dict(members))  # as in a new process
    os.environ.pop("TOKENSELECT_WITHDRAWAL_WARNED", None)
    exec(code)
    register()
    register()  # as in a process that vLLM starts, which inherits the environment
    found[name] = configure()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def configured(tmp_path_factory):
    """What came of configuring engines in a new process, for each kind of wrong, and its log."""
    model = tmp_path_factory.mktemp("tiny-llama")
    (model / "config.json").write_text(json.dumps(TINY_LLAMA))
    process = subprocess.run(
        [sys.executable, "-c", CONFIGURE, json.dumps([str(model), WRONG])],
        env=os.environ
        | {
            "PYTHONPATH": str(Path(vllm_tokenselect.__file__).parents[1]),
            "VLLM_PLUGINS": "",  # not by itself: each kind of wrong comes first
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    *log, found = process.stdout.splitlines()
    return json.loads(found), [*log, *process.stderr.splitlines()]


@pytest.mark.parametrize("wrong", WRONG)
def test_an_engine_on_another_backend_is_configured_as_without_the_plugin(configured, wrong):
    found = configured[0][wrong]
    assert found["plain"]
    assert found["other"] == "CPU_ATTN"


@pytest.mark.parametrize("wrong", WRONG)
def test_it_is_warned_of_once_by_a_server_and_the_processes_that_it_starts(configured, wrong):
    reason = WRONG[wrong][1]
    warnings = [line for line in configured[1] if reason in line]
    assert len(warnings) == 1, warnings
    assert "TOKENSELECT is not available; everything else is" in warnings[0]


@pytest.mark.parametrize("wrong", WRONG)
def test_choosing_tokenselect_is_refused_with_the_reason_however_it_is_chosen(configured, wrong):
    for message in configured[0][wrong]["refused"]:
        assert "TOKENSELECT is not available" in message
        assert WRONG[wrong][1] in message
