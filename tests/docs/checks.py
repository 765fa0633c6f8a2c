"""Checks of the documentation's code: JSON, Python, and the commands of a shell."""

from __future__ import annotations

import ast
import importlib
import json
import re
import tomllib
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from importlib.util import find_spec
from inspect import signature
from itertools import pairwise
from pathlib import Path
from typing import Any

from tests.docs.pages import INDENTED, REPOSITORY, SHELL, Block, blocks, commands, names
from vllm_tokenselect.config import TokenSelectConfig
from vllm_tokenselect.method.request_settings import requested_top_k
from vllm_tokenselect.method.settings import SettingsError
from vllm_tokenselect.tools.cli.app import app

# Languages that a reader's eye checks.
UNCHECKED = ("text", "mermaid", "yaml", "toml", "diff", "promql", "dockerfile")
OUTPUTS = ("--json", "--plot", "--plots", "--profile", "--write", "-d", "-o")
EXTRAS = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"][
    "optional-dependencies"
]


def problems_of(page: str) -> Iterator[str]:
    """What is wrong with a page's blocks of code, each with its line."""
    for block in blocks(page):
        try:
            check(block, page)
        except (ValueError, SyntaxError, AssertionError, ImportError) as error:
            yield f"{page}:{block.line}: {error}"


def check(block: Block, page: str) -> None:
    if block.language == "json":
        check_settings(json.loads(block.text))
    elif block.language == "python":
        check_python(block.text)
    elif block.language in (*SHELL, INDENTED):
        for words in commands(block):
            check_command(words, page)
    else:
        assert block.language in UNCHECKED, f"the language {block.language!r} is not checked"


def check_settings(value: Any) -> None:
    """Check JSON, or a value of Python, that may hold settings of a server or of a request."""
    if not isinstance(value, dict):
        return
    if isinstance(value.get("tokenselect"), dict):
        TokenSelectConfig.from_additional_config(value)
    if "vllm_xargs" in value:
        requested_top_k(value["vllm_xargs"], TokenSelectConfig().top_k)


def check_python(text: str) -> None:
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)
        elif isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module or "")
            missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
            assert not missing, f"{node.module} has no {', '.join(missing)}"
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            known = parameters(node.func.id)
            given = {keyword.arg for keyword in node.keywords if keyword.arg}
            assert known is None or given <= known, f"{node.func.id} takes no {given - known}"
        elif isinstance(node, ast.Dict):
            try:
                check_settings(ast.literal_eval(node))
            except (ValueError, TypeError) as error:
                if isinstance(error, SettingsError):
                    raise


@cache
def parameters(name: str) -> set[str] | None:
    """What the classes take that users call; None for other names."""
    import vllm
    from vllm.engine.arg_utils import EngineArgs

    if name == "LLM":
        return {field.name for field in fields(EngineArgs)} | set(signature(vllm.LLM).parameters)
    return set(signature(vllm.SamplingParams).parameters) if name == "SamplingParams" else None


def check_command(words: list[str], page: str) -> None:
    words = [word for word in words if word != "..."]
    name, rest = words[0].removeprefix(".venv/bin/"), words[1:]
    if name == "tokenselect":
        check_tokenselect(rest)
    elif name == "vllm" and rest[:1] == ["serve"]:
        check_vllm_serve(rest, page)
    elif name == "make":
        targets = [word for word in rest if "=" not in word and not word.startswith("-")]
        assert set(targets) <= make_targets(), f"make has no {targets}"
    elif name in ("python", "python3") and rest[:1] == ["-m"]:
        ours = rest[1].split(".")[0] in ("vllm_tokenselect", "benchmarks", "tests")
        assert not ours or find_spec(rest[1]), f"there is no module {rest[1]}"
    elif name in ("python", "python3", "bash") and rest and not rest[0].startswith(("-", "/")):
        # A file that the page tells its reader to write is named in its text.
        assert find(rest[0], page) or rest[0] in names(page), f"{rest[0]} does not exist"
    elif name.startswith("./"):
        assert find(name, page), f"{name} does not exist"
    elif name == "pip":
        check_pip(rest)
    for before, word in pairwise(["", *words]):
        if re.match(r"(deploy|constraints|patches|examples|docs|tests|benchmarks)/", word):
            wanted = str(Path(word).parent) if before in OUTPUTS else word
            assert find(wanted, page), f"{word} does not exist"
        if word.startswith("{") and word.endswith("}") and "$" not in word:
            check_settings(json.loads(word))
            if before in ("--settings", "--also"):
                TokenSelectConfig.from_mapping(json.loads(word))


def find(path: str, page: str) -> bool:
    """Whether a path exists, seen from the page's folder or from the repository's."""
    folders = (REPOSITORY / page).parent, REPOSITORY
    return any((folder / path).exists() for folder in folders) or any(REPOSITORY.glob(path))


def check_tokenselect(words: list[str]) -> None:
    """Parse a command of ours as it would be; run nothing."""
    import typer

    commands_of_app = typer.main.get_command(app).commands
    if words[:1] in ([], ["--help"], ["--version"]):
        return
    assert words[0] in commands_of_app, f"tokenselect has no command {words[0]}"
    if "--help" in words:
        return
    try:
        commands_of_app[words[0]].make_context(words[0], words[1:])
    except Exception as error:  # of click, which typer may bring along
        raise ValueError(f"tokenselect {words[0]}: {error}") from error


@cache
def serve_parser() -> Any:
    """The parser of `vllm`, with the one subcommand that is used."""
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    ServeSubcommand().subparser_init(parser.add_subparsers(dest="subparser"))
    return parser


def check_vllm_serve(words: list[str], page: str) -> None:
    words = [re.sub(r"\$\(cat (\S+)\)", lambda m: content(m[1], page), word) for word in words]
    try:
        asked = serve_parser().parse_args(words)
    except SystemExit:
        raise ValueError(f"vllm does not take {' '.join(words)}") from None
    config = TokenSelectConfig.from_additional_config(asked.additional_config)
    if asked.max_num_batched_tokens and asked.max_num_seqs:
        config.check_engine(
            block_size=asked.block_size or 1,
            max_num_batched_tokens=asked.max_num_batched_tokens,
            max_num_seqs=asked.max_num_seqs,
        )


def content(path: str, page: str) -> str:
    folders = (REPOSITORY / page).parent, REPOSITORY, REPOSITORY / "examples"
    return next(f / path for f in folders if (f / path).is_file()).read_text()


@cache
def make_targets() -> set[str]:
    makefile = (REPOSITORY / "Makefile").read_text()
    return set(re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split())


def check_pip(words: list[str]) -> None:
    for word in words:
        ours = re.fullmatch(r"(?:\S*vllm[-_]tokenselect\S*|\.)\[([\w,]+)\]", word)
        unknown = set(ours[1].split(",")) - EXTRAS.keys() if ours else set()
        assert not unknown, f"there is no extra {unknown}"
