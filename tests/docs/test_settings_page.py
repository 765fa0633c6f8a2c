"""The table of settings is made of the settings' own descriptions."""

import importlib.util
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def load():
    spec = importlib.util.spec_from_file_location("settings_table", DOCS / "settings_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_has_every_setting_as_the_code_describes_it():
    page = (DOCS / "settings.md").read_text()
    assert load().rewrite(page) == page, "run `make settings`"


def test_a_table_that_was_changed_is_written_anew():
    settings_table = load()
    page = f"before\n{settings_table.BEGIN}| old |\n{settings_table.END}\nafter\n"
    new = settings_table.rewrite(page)
    assert "| old |" not in new
    assert "| `top_k` | integer >= 1 | 2048 | " in new
    assert new.startswith("before\n")
    assert new.endswith(f"{settings_table.END}\nafter\n")
    assert settings_table.rewrite(new) == new
