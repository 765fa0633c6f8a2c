"""The page of messages quotes what the code says."""

import ast
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PAGE = REPOSITORY / "docs/troubleshooting.md"
CODE = REPOSITORY / "vllm_tokenselect"
ROW = re.compile(r"^\| `(.+?)` \|", re.MULTILINE)
# Names that the messages take from constants.
NAMES = {
    "SWITCH": "tokenselect",
    "TOP_K": "tokenselect_top_k",
    "DIRECTORY_VARIABLE": "TOKENSELECT_METRICS_DIR",
}
QUOTED = ROW.findall(PAGE.read_text(encoding="utf-8"))


def texts(tree: ast.AST):
    """Every text of a module, with an ellipsis for each value that is put into it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(map(part, node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield re.sub(r"%[sd]", "…", node.value)


def part(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    name = node.value.id if isinstance(node.value, ast.Name) else ""
    return NAMES.get(name, "…")


@pytest.fixture(scope="module")
def said():
    trees = (ast.parse(path.read_text(encoding="utf-8")) for path in CODE.rglob("*.py"))
    return "\n".join(text for tree in trees for text in texts(tree))


def test_the_page_has_messages():
    assert len(QUOTED) > 40


@pytest.mark.parametrize("message", QUOTED)
def test_a_message_is_one_of_the_code(message, said):
    for piece in filter(None, (piece.strip(" :") for piece in message.split("…"))):
        assert piece in said
