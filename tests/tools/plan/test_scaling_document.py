"""The tables of deploy/SCALING.md are what `tokenselect plan` prints."""

import importlib.util
from pathlib import Path

DEPLOY = Path(__file__).parents[3] / "deploy"


def load():
    spec = importlib.util.spec_from_file_location("scaling_tables", DEPLOY / "scaling_tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_table_is_the_output_of_the_command_above_it():
    document = (DEPLOY / "SCALING.md").read_text()
    tables = load()
    assert document.count(tables.END) == document.count("```bash\ntokenselect plan ") >= 6
    assert tables.rewrite(document) == document


def test_a_table_that_was_changed_is_written_anew():
    tables = load()
    text = "a\n\n```bash\ntokenselect plan llama-3.1-8b --tp 1 --pp 1\n```\n\n| old |\n<!-- end -->\n\nb\n"
    new = tables.rewrite(text)
    assert "| old |" not in new
    assert "1 x h200: tp 1 x pp 1 holds 6 contexts at a time." in new
    assert new.endswith("\n\n<!-- end -->\n\nb\n")
    assert tables.rewrite(new) == new
