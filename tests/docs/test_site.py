"""The documentation builds in strict mode, and a link to what is not there fails it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
COPIED = ("README.md", "mkdocs.yml", "docs")


def build(repository: Path, site: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    return subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=120)


@pytest.fixture
def repository(tmp_path):
    """A copy whose documentation may be changed; everything else is the repository's own."""
    copy = tmp_path / "repository"
    copy.mkdir()
    for path in REPOSITORY.iterdir():
        if path.name not in COPIED and not path.name.startswith("."):
            (copy / path.name).symlink_to(path)
    for name in COPIED:
        source = REPOSITORY / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, copy / name)
    return copy


def test_the_site_has_a_page_for_each_document_and_the_files_that_they_link_to(tmp_path):
    built = build(REPOSITORY, tmp_path)
    assert built.returncode == 0, built.stderr
    assert (tmp_path / "settings.html").is_file()
    assert (tmp_path / "deploy/SCALING.html").is_file()
    assert (tmp_path / "benchmarks/results/speed.json").is_file()
    assert not list(tmp_path.glob("*.py")), "what builds the site is no part of it"
    assert (tmp_path / "vllm_tokenselect/method/settings.py").is_file()
    # A page outside of docs/ links to one inside, and is reached by its place in the site.
    assert 'href="limits.html"' in (tmp_path / "readme.html").read_text()
    assert 'href="deploy/SCALING.html"' in (tmp_path / "processes.html").read_text()


def test_every_broken_link_fails_the_build(repository, tmp_path):
    with (repository / "docs/limits.md").open("a") as page:
        page.write("\n[a](no-page.md) [b](settings.md#no-heading) [c](../deploy/no-file.json)\n")
    with (repository / "README.md").open("a") as page:
        page.write("\n[d](docs/no-page-either.md)\n")
    (repository / "docs/in-no-menu.md").write_text("# A page\n")
    built = build(repository, tmp_path / "site")
    assert built.returncode != 0
    for broken in ("no-page.md", "#no-heading", "no-file.json", "no-page-either", "in-no-menu"):
        assert broken in built.stderr


def test_the_readme_is_short():
    assert len((REPOSITORY / "README.md").read_text().splitlines()) <= 150
