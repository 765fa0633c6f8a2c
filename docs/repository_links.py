"""Make links that work in the repository work in the site too; mkdocs calls this module.

A page links to other files by their place in the repository: `../deploy/SCALING.md`. Each linked file
becomes a part of the site. So the strict build finds a link to a file or a heading that is not there.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

REPOSITORY = Path(__file__).resolve().parents[1]
# Pages outside docs/ whose own links are checked, also where no page links to them.
DOCUMENTS = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")

_LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)\s#]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the documents, and every file that a page links to."""
    pages = [file.src_uri for file in files.documentation_pages()]
    waiting = [_to_repository(page) for page in pages]
    waiting += [name for name in DOCUMENTS if (REPOSITORY / name).is_file()]
    seen = set()
    while waiting:
        path = waiting.pop()
        if path in seen or not (REPOSITORY / path).is_file():
            continue
        seen.add(path)
        uri = _to_site(path)
        if files.get_file_from_path(uri) is None:
            files.append(File.generated(config, uri, abs_src_path=str(REPOSITORY / path)))
        if path.endswith(".md"):
            waiting += links_of(path)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Write the links as paths of the site."""
    return site_links(markdown, _to_repository(page.file.src_uri))


def links_of(path: str) -> Iterator[str]:
    """The paths in the repository that a document links to."""
    folder = posixpath.dirname(path)
    for link in _LINK.findall((REPOSITORY / path).read_text(encoding="utf-8")):
        yield posixpath.normpath(posixpath.join(folder, link))


def site_links(markdown: str, path: str) -> str:
    """The text of a document at `path` in the repository, with the links of its place in the site."""
    folder, site_folder = posixpath.dirname(path), posixpath.dirname(_to_site(path))

    def rewritten(found: re.Match[str]) -> str:
        target = _to_site(posixpath.normpath(posixpath.join(folder, found[1])))
        return posixpath.relpath(target, site_folder or ".")

    return _LINK.sub(rewritten, markdown)


def _to_site(path: str) -> str:
    """Where a file of the repository stands in the site. Its root has a page of its own."""
    return "readme.md" if path == "README.md" else path.removeprefix("docs/")


def _to_repository(uri: str) -> str:
    if uri == "readme.md":
        return "README.md"
    return f"docs/{uri}" if (REPOSITORY / "docs" / uri).is_file() else uri
