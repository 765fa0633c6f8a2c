"""The name TOKENSELECT is known in every process, also before plugins are loaded."""

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import vllm_tokenselect
from vllm_tokenselect.hooks.registration import (
    BACKEND_NAME,
    BACKEND_PATH,
    backend_member,
    install,
    is_selected,
)

pytest.importorskip("vllm")


def test_the_member_is_unpickled_in_a_process_that_loads_no_plugin():
    unpickle = (
        "import pickle, sys\n"
        "configured = pickle.load(sys.stdin.buffer)\n"
        "from vllm.v1.attention.backends.registry import AttentionBackendEnum\n"
        f"assert configured['backend'] is AttentionBackendEnum[{BACKEND_NAME!r}]\n"
        "print('path:', configured['backend'].get_path())\n"
    )
    root = str(Path(vllm_tokenselect.__file__).parents[1])
    child = subprocess.run(
        [sys.executable, "-c", unpickle],
        input=pickle.dumps({"backend": backend_member()}),
        env=os.environ | {"VLLM_PLUGINS": "", "PYTHONPATH": root},
        capture_output=True,
        check=False,
    )
    assert child.returncode == 0, child.stderr.decode()
    assert f"path: {BACKEND_PATH}" in child.stdout.decode()


def test_registering_again_gives_the_same_member():
    member = backend_member()
    install()
    assert backend_member() is member
    assert copy.deepcopy(member) is member
    assert pickle.loads(pickle.dumps(member)) is member


def test_members_of_vllm_keep_their_way_of_pickling():
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    backend_member()
    for member in AttentionBackendEnum:
        if member.name != BACKEND_NAME:
            assert b"vllm_tokenselect" not in pickle.dumps(member)


def test_the_backend_is_selected_for_all_layers_or_for_one_kind():
    from vllm.config import AttentionConfig
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    assert not is_selected(AttentionConfig())
    assert not is_selected(AttentionConfig(backend=AttentionBackendEnum.CPU_ATTN))
    assert is_selected(AttentionConfig(backend=backend_member()))
    one_kind = AttentionConfig()
    one_kind.backend_per_kind = {"full_attention": backend_member()}
    assert is_selected(one_kind)
