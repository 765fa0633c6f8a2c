"""A vLLM that this release was not built for stops with a message that says so."""

import pytest

from vllm_tokenselect.plugin import UnsupportedVllm, check_vllm_version


@pytest.mark.parametrize("version", ["0.32.0", "0.32.0+cpu", "0.32.1", "0.33.0", "0.33.1.dev2+g1a"])
def test_supported_releases_are_accepted(version):
    check_vllm_version(version)


@pytest.mark.parametrize(
    "version", ["0.31.0", "0.31.9+cpu", "0.34.0", "0.34.0rc1", "0.3.2", "0.320.0", "1.32.0", "dev"]
)
def test_any_other_release_is_refused_with_what_to_do(version):
    with pytest.raises(UnsupportedVllm) as refused:
        check_vllm_version(version)
    message = str(refused.value)
    assert f"vLLM {version} is installed" in message
    assert "supports vLLM 0.32 and 0.33" in message
    assert "leave out --attention-backend TOKENSELECT" in message
