"""Write the table of `docs/settings.md` from the settings' own descriptions: `make settings`.

The same descriptions stand in the message of a server that refuses a setting.
"""

from __future__ import annotations

from pathlib import Path

from vllm_tokenselect.config import TokenSelectConfig

PAGE = Path(__file__).with_name("settings.md")
BEGIN, END = "<!-- settings: written by `make settings` -->\n", "<!-- end -->"


def table() -> str:
    """The settings with their values, defaults and meanings, one a row."""
    rows = ["| setting | values | default | meaning |", "| --- | --- | --- | --- |"]
    for setting in TokenSelectConfig.described():
        rows.append(
            f"| `{setting.name}` | {setting.values} | {setting.default} | {setting.meaning} |"
        )
    return "\n".join(rows)


def rewrite(page: str) -> str:
    """The page with the table of this release."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(rewrite(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
