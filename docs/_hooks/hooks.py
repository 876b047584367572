"""mkdocs calls these: the site has files from outside docs/, and `pages` fills them."""

from __future__ import annotations

from typing import Any

import pages
from mkdocs.structure.files import File, Files


def on_files(files: Files, config: Any) -> Files:
    for here, there in pages.outside().items():
        files.append(File.generated(config, there, abs_src_path=str(pages.ROOT / here)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    return pages.expanded(markdown, pages.repository_path(page.file.src_uri))


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """The theme fetches a stand-in for workers, for pages opened from a file, from a network; ours is in the site."""
    up = "../" * page.file.dest_uri.count("/")
    return output.replace("https://unpkg.com/iframe-worker/shim", f"{up}search-from-file.js")
