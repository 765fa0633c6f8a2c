"""The pages of the documentation, and what can be checked in them: code, commands, paths, links."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

REPOSITORY = Path(__file__).parents[2]
PATTERNS = (
    "*.md",
    "docs/**/*.md",
    "deploy/**/*.md",
    "benchmarks/**/*.md",
    "examples/*.md",
    "patches/*.md",
)
NOT_WRITTEN_FOR_TODAY = {"CHANGELOG.md"}
PAGES = sorted(
    str(path.relative_to(REPOSITORY))
    for pattern in PATTERNS
    for path in REPOSITORY.glob(pattern)
    if path.name not in NOT_WRITTEN_FOR_TODAY
)
SHELL = ("bash", "sh", "shell", "console")
INDENTED = "indented"
_FOLDERS = "vllm_tokenselect|tests|benchmarks|deploy|docs|examples|patches|constraints"
_PATH = re.compile(rf"(?:{_FOLDERS})/[\w./*-]*")
_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=.*", re.DOTALL)
_ENDS_COMMAND = {"&&", "||", ";", "|", "&"}


@dataclass(frozen=True)
class Block:
    """A block of code.

    Attributes:
        line: where it starts in its page.
        language: as the fence names it; `INDENTED` for a block without a fence.
        text: what stands in it.
    """

    line: int
    language: str
    text: str


@cache
def tokens_of(page: str) -> list[Token]:
    """A page's tokens, those within paragraphs included."""
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    return [token for outer in tokens for token in (outer, *(outer.children or ()))]


def blocks(page: str) -> Iterator[Block]:
    """Every block of code of a page."""
    for token in tokens_of(page):
        line = token.map[0] + 1 if token.map else 0
        if token.type == "fence":
            yield Block(line, token.info.strip().split(" ")[0], token.content)
        elif token.type == "code_block":
            yield Block(line, INDENTED, token.content)


def commands(block: Block) -> Iterator[list[str]]:
    """Words of each command of a shell block, without variables that are set before it."""
    for line in _whole_lines(block):
        words: list[str] = []
        for word in [*line, ";"]:
            if word not in _ENDS_COMMAND:
                words.append(word)
                continue
            while words and _ASSIGNMENT.fullmatch(words[0]):
                words.pop(0)
            if words:
                yield words
            words = []


def _whole_lines(block: Block) -> Iterator[list[str]]:
    """Words of each line, where a line ends neither with a backslash nor inside quotes."""
    pending = ""
    for line in block.text.splitlines():
        if block.language == "console" and not pending:
            if not line.startswith("$ "):
                continue  # what the command printed
            line = line[2:]
        pending += line
        if pending.endswith("\\"):
            pending = pending[:-1] + " "
            continue
        try:
            words = shlex.split(pending, comments=True)
        except ValueError:  # a quote is open
            pending += "\n"
            continue
        pending = ""
        yield words
    if pending and block.language != INDENTED:
        raise ValueError(f"a quote is never closed: {pending!r}")


def names(page: str) -> set[str]:
    """Whatever a page sets as code within its text."""
    return {token.content for token in tokens_of(page) if token.type == "code_inline"}


def named_paths(page: str) -> list[str]:
    """Files and folders of the repository that a page names in its text."""
    return [name for name in sorted(names(page)) if _PATH.fullmatch(name)]


def links(page: str) -> Iterator[str]:
    """Targets of the page's links and images that are no URLs."""
    for token in tokens_of(page):
        target = token.attrs.get("href") or token.attrs.get("src")
        if target and not re.match(r"[a-z]+:", str(target)):
            yield str(target)


@cache
def anchors(page: str) -> set[str]:
    """What a link to a heading of the page may end with, as GitHub makes it of the heading."""
    tokens = tokens_of(page)
    headings = [after.content for token, after in pairwise(tokens) if token.type == "heading_open"]
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.replace(" ", "-") for heading in plain}


def rows(page: str, *first_columns: str) -> list[list[str]]:
    """Cells of the table whose header starts with these columns, as text without marks of code."""
    found: list[list[list[str]]] = []
    for token, after in pairwise(tokens_of(page)):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif token.type in ("td_open", "th_open"):
            found[-1][-1].append(after.content.replace("`", ""))
    [table] = [table for table in found if tuple(table[0][: len(first_columns)]) == first_columns]
    return table[1:]
