"""The pages for developers follow the code: the rooms, the parts of a seam, an example of a hook."""

from __future__ import annotations

import re
from dataclasses import fields

from tests.docs.pages import REPOSITORY, blocks, names, rows
from vllm_tokenselect.hooks.seam import Seam
from vllm_tokenselect.plugin import SUPPORTED_VLLM

PACKAGE = REPOSITORY / "vllm_tokenselect"


def test_the_architecture_names_every_room():
    rooms = {f"vllm_tokenselect/{path.parent.name}/" for path in PACKAGE.glob("*/__init__.py")}
    assert rooms <= names("docs/architecture.md")
    text = (REPOSITORY / "docs/architecture.md").read_text(encoding="utf-8")
    files = {path.name for path in PACKAGE.glob("[!_]*.py")}
    assert {name for name in files if f"vllm_tokenselect/{name})" not in text} == set()


def test_the_parts_of_a_seam_are_all_explained():
    table = rows("docs/adding-a-seam.md", "part of the seam")
    explained = {name for cell, _ in table for name in cell.split(", ")}
    assert explained == {field.name for field in fields(Seam)}


def test_the_example_of_a_hook_and_its_diff_are_the_projects_own():
    shown = {block.language: block.text for block in blocks("docs/adding-a-seam.md")}
    assert (PACKAGE / "hooks/chunked_local.py").read_text().endswith(shown["python"])
    for release in SUPPORTED_VLLM:
        [diff] = REPOSITORY.glob(f"patches/{release}.*/chunked_local.patch")
        assert shown["diff"] in diff.read_text()


def test_pages_that_name_the_supported_releases_name_these():
    for page in ("SECURITY.md", "README.md"):
        text = (REPOSITORY / page).read_text(encoding="utf-8")
        named = set(re.findall(r"\b0\.3\d\b", text))
        assert named == set(SUPPORTED_VLLM), page
