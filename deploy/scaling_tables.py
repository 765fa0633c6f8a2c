"""Write the tables of SCALING.md anew: `make scaling`.

Each table there stands between a block of code with a command `tokenselect plan ...` and `<!-- end -->`.
It is what the command prints.
"""

from __future__ import annotations

import re
import shlex
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

from vllm_tokenselect.tools.cli.app import app

DOCUMENT = Path(__file__).parent / "SCALING.md"
END = "<!-- end -->"
_TABLES = re.compile(
    rf"(^```bash\ntokenselect (plan [^\n]+)\n```\n)(.*?)^{END}$", re.DOTALL | re.MULTILINE
)


def output_of(command: str) -> str:
    """What `tokenselect` prints, without the blanks at the ends of lines."""
    with redirect_stdout(StringIO()) as printed:
        app(shlex.split(command), standalone_mode=False)
    return "\n".join(line.rstrip() for line in printed.getvalue().splitlines()).strip()


def rewrite(document: str) -> str:
    """The document with every command's own output behind it."""

    def table(found: re.Match[str]) -> str:
        return f"{found[1]}\n{output_of(found[2])}\n\n{END}"

    return _TABLES.sub(table, document)


if __name__ == "__main__":
    DOCUMENT.write_text(rewrite(DOCUMENT.read_text()))
