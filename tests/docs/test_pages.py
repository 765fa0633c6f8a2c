"""What the documentation shows works: code is code, options exist, and links lead somewhere."""

from __future__ import annotations

import json
import os
import subprocess

import pytest

from tests.docs.checks import check, check_vllm_serve, problems_of
from tests.docs.pages import PAGES, REPOSITORY, Block, anchors, links, named_paths

every_page = pytest.mark.parametrize("page", PAGES)
# In the place of vLLM: says what it was given.
STAND_IN = '#!/bin/sh\nfor word; do printf "%s\\0" "$word"; done\n'


@every_page
def test_code_and_commands_are_what_they_seem(page):
    assert list(problems_of(page)) == []


@every_page
def test_files_and_folders_that_are_named_exist(page):
    assert [path for path in named_paths(page) if not any(REPOSITORY.glob(path))] == []


@pytest.mark.parametrize("page", [page for page in PAGES if not page.startswith("docs/")])
def test_links_lead_somewhere(page):
    """mkdocs looks at those of the site's own pages, in its strict mode."""
    broken = []
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = ((REPOSITORY / page).parent / path).resolve() if path else REPOSITORY / page
        name = str(target.relative_to(REPOSITORY)) if target.exists() else ""
        if not name or (anchor and name.endswith(".md") and anchor not in anchors(name)):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize(
    ("language", "text", "problem"),
    [
        ("json", '{"tokenselect": {"topk": 1}}', "there is no such setting"),
        ("json", '{"vllm_xargs": {"tokenselect": "none"}}', "is neither"),
        ("json", "{'tokenselect': {}}", "Expecting property name"),
        ("python", "from vllm import LLLM", "vllm has no LLLM"),
        ("python", "LLM('m', attn_backend='TOKENSELECT')", "LLM takes no {'attn_backend'}"),
        ("python", "{'tokenselect': {'top_k': 0}}", "top_k = 0"),
        ("bash", "tokenselect bench --modell m", "No such option: --modell"),
        ("bash", "tokenselect bunch", "no command bunch"),
        ("bash", "vllm serve m --atention-backend TOKENSELECT", "vllm does not take"),
        ("bash", 'A=1 vllm serve m \\\n  --additional-config \'{"tokenselect": {"a": 1}}\'', "a:"),
        ("bash", "cd there && make tests", r"make has no \['tests'\]"),
        ("bash", "python -m benchmarks.nothing", "no module benchmarks.nothing"),
        ("bash", "pip install '.[tests]'", "no extra {'tests'}"),
        ("bash", "kubectl apply -k deploy/kubernetes/overlays/tpu", "tpu does not exist"),
        ("bash", "tokenselect inspect --settings '{\"topk\": 1}'", "there is no such setting"),
        ("bash", 'curl URL -d \'{"vllm_xargs": {"tokenselect": 1}}\'', "is neither"),
        ("indented", "make tests  # all of them", r"make has no \['tests'\]"),
        ("ruby", "puts 1", "'ruby' is not checked"),
    ],
)
def test_what_does_not_work_is_found(language, text, problem):
    with pytest.raises((ValueError, SyntaxError, AssertionError, ImportError), match=problem):
        check(Block(1, language, text), "README.md")


def test_the_example_that_serves_hands_over_its_settings_and_whatever_follows_the_model(tmp_path):
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
