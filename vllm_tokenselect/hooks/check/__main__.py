"""The command: downloads a release, runs all checks and prints what they found."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from vllm_tokenselect.hooks.check import REPOSITORY
from vllm_tokenselect.hooks.check.names import NoTypeChecker, check_names
from vllm_tokenselect.hooks.check.release import CheckFailed, check_release, download, find_diffs
from vllm_tokenselect.hooks.check.start import MACHINES, rehearse, test_beside


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m vllm_tokenselect.hooks.check",
        description="Check every hook and diff against a vLLM release that is not installed.",
    )
    parser.add_argument("--version", required=True, help="vLLM release, for example 0.33.0")
    parser.add_argument(
        "--source", type=Path, help="folder that holds the `vllm` package (default: download it)"
    )
    parser.add_argument(
        "--patches",
        type=Path,
        default=REPOSITORY / "patches",
        help="folder with a folder of diffs for each release (default: %(default)s)",
    )
    parser.add_argument(
        "--no-start", action="store_true", help="check the source only, and start nothing of vLLM"
    )
    parser.add_argument(
        "--pytest",
        nargs="+",
        metavar="PATH",
        default=[],
        help="run these tests beside the release, on what the installed vLLM has compiled for CPUs",
    )
    options = parser.parse_args(arguments)
    try:
        diffs, missing = find_diffs(options.patches, options.version)
        if options.source is not None and not (options.source / "vllm").is_dir():
            raise CheckFailed(f"--source {options.source} holds no `vllm` package")
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            source = options.source or download(options.version, folder)
            (folder / "patched").mkdir()
            report = check_release(source, diffs, folder / "patched")
            report.problems += check_names(source)
            if not options.no_start:
                for machine in MACHINES:
                    report.problems += rehearse(source, options.version, machine, folder / machine)
            if options.pytest:
                report.problems += test_beside(
                    source, options.version, folder / "tested", options.pytest
                )
    except (CheckFailed, NoTypeChecker) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"vLLM {options.version} ({source.name})\n\n{report}\n", flush=True)
    problems = report.problems + ([missing] if missing else [])
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if not problems:
        print("Every hook holds, every diff applies, and every name that is used exists.")
        if not options.no_start:
            print("Engines are configured on CPUs and on GPUs.")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
