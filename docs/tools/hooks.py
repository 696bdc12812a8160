"""mkdocs' hooks: the reference's pages and their place in the navigation, and formulas."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
for folder in (HERE, HERE.parents[1] / "src"):
    sys.path.insert(0, str(folder))

from markup import dollars  # noqa: E402
from mkdocs.config.defaults import MkDocsConfig  # noqa: E402
from mkdocs.structure.files import File, Files  # noqa: E402
from mkdocs.structure.pages import Page  # noqa: E402
from reference import pages  # noqa: E402


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The reference's pages at the end of the navigation."""
    sections: dict[str, list[dict[str, str]]] = {}
    for page in pages():
        sections.setdefault(page.section, []).append({page.title: page.path})
    entries: list[Any] = []
    for section, inside in sections.items():
        entries += inside if section in ("Overview", "Metrics") else [{section: inside}]
    config.nav = [*(config.nav or []), {"Reference": entries}]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The pages themselves; nothing is written into docs/."""
    for page in pages():
        files.append(File.generated(config, page.path, content=page.text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Formulas of the guide."""
    return dollars(markdown)


def on_page_content(html: str, page: Page, **_: Any) -> str:
    """A warning, which fails the build, for notation that was not understood."""
    for left in (":math:", ".. math", ":func:"):
        if left in html:
            logging.getLogger("mkdocs.hooks").warning("%s: %s was left over", page.file, left)
    return html
