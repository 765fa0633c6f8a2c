"""`examples/serve.sh` starts `vllm serve` with the settings of `settings.json`."""

from __future__ import annotations

import json
import os
import subprocess

from tests.docs.pages import REPOSITORY
from tests.docs.test_pages import check_vllm_serve

# In the place of vLLM: says what it was given.
STAND_IN = '#!/bin/sh\nfor word; do printf "%s\\0" "$word"; done\n'


def test_it_hands_over_the_file_and_whatever_follows_the_model(tmp_path):
    (tmp_path / "vllm").write_text(STAND_IN)
    (tmp_path / "vllm").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = [str(REPOSITORY / "examples/serve.sh"), "MODEL", "--port", "8001"]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    words = said.stdout.split("\0")[:-1]
    check_vllm_serve(words, "README.md")
    assert words[:4] == ["serve", "MODEL", "--port", "8001"]
    assert words[words.index("--attention-backend") + 1] == "TOKENSELECT"
    settings = json.loads((REPOSITORY / "examples/settings.json").read_text())
    assert json.loads(words[words.index("--additional-config") + 1]) == settings
