"""`lit-did docs`: shows a page of the documentation, which the package brings: it links to docs/."""

from __future__ import annotations

import pydoc
import re
from difflib import get_close_matches
from pathlib import Path

from lit_did.cli.errors import Arguments, InputError

DOCS = Path(__file__).parents[1] / "docs"


def main(arguments: list[str]) -> int:
    """Runs the command."""
    parser = Arguments(prog="lit-did docs", description="Shows a page of the documentation.")
    parser.add_argument("page", nargs="?", help="the name of a page, such as losses; without it, all names are listed")
    page = parser.parse_args(arguments).page
    if page is None:
        print(contents())
    else:
        pydoc.pager(read(page))  # which prints where there is no terminal
    return 0


def pages() -> dict[str, Path]:
    """{name of a page: its file}"""
    return {path.stem: path for path in sorted(DOCS.glob("*.md"))}


def contents() -> str:
    """The names and titles of all pages."""
    titles = (f"  {name:16} {path.read_text().splitlines()[0].lstrip('# ')}" for name, path in pages().items())
    return "\n".join([f"The pages of `lit-did docs PAGE`, which are Markdown files in {DOCS}:", "", *titles])


def read(page: str) -> str:
    """A page's Markdown, without comments.

    Raises:
        InputError: There is no such page.
    """
    name = Path(page).name.removesuffix(".md")
    if name not in pages():
        near = get_close_matches(name, pages(), n=1)
        hint = f"Did you mean {near[0]}?" if near else "`lit-did docs` lists all pages."
        raise InputError(f"Expected a page of the documentation, but got {page}. {hint}")
    return re.sub(r"^<!--.*?-->\n", "", pages()[name].read_text(), flags=re.MULTILINE)
