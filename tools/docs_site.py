"""What the docs site has beyond docs/*.md: mkdocs calls these functions (`hooks` in mkdocs.yml).

The site takes README as its home page, CHANGELOG and CONTRIBUTING, the notebook, and for each package a page with its
public names. Links work on a code host and on the site: a link to a file that the site lacks becomes plain text there.
"""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

import griffe
import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parents[1]
WHOLE_PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
"""{file of the repository: page of the site}"""

NOTEBOOKS = {"examples/demo.ipynb": "demo.md"}

PACKAGES = (
    "lit_did.modules",
    "lit_did.data",
    "lit_did.metrics",
    "lit_did.functional",
    "lit_did.ops",
    "lit_did.models",
    "lit_did.callbacks",
    "lit_did.integrations.trl",
    "lit_did.sampling",
    "lit_did.scoring",
    "lit_did.audit",
    "lit_did.exporting",
    "lit_did.planning",
)
"""the packages and modules whose public names the API reference has"""


def on_config(config: MkDocsConfig) -> None:
    """Adds the API pages to the navigation."""
    (section,) = (entry for entry in config.nav if "API" in entry)
    section["API"] += [{package: f"api/{package}.md"} for package in PACKAGES]


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Adds the pages that are not in docs/."""

    def add(path: str, content: str | bytes) -> None:
        files.append(File.generated(config, path, content=content))

    for source, page in WHOLE_PAGES.items():
        add(page, (ROOT / source).read_text())
    for source, page in NOTEBOOKS.items():
        for path, content in notebook_page(ROOT / source, page).items():
            add(path, content)
    add("api/index.md", api_overview())
    for package in PACKAGES:
        add(f"api/{package}.md", api_page(package))


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Makes the links of a page those of the site."""
    return site_links(markdown, page.file.src_uri)


def on_page_content(html: str, page: Page, **_: Any) -> str:
    """Makes `lit-did docs NAME`, which docstrings name, a link to that page."""
    up = "../" * page.file.src_uri.count("/")
    return re.sub(r"<code>lit-did docs ([a-z_]+)</code>", rf'<a href="{up}\1.html"><code>\1</code></a>', html)


# ----------------------------------------------------------------------------------------------------------
# Links
# ----------------------------------------------------------------------------------------------------------


def site_links(markdown: str, page: str) -> str:
    """A page's text with links to other files as the site has them.

    Args:
        markdown: The text, whose links lead from its file in the repository.
        page: The page of the site, such as "index.md" for README.md.
    """
    sources = {page: source for source, page in (WHOLE_PAGES | NOTEBOOKS).items()}
    folder = (PurePosixPath(sources[page]) if page in sources else PurePosixPath("docs", page)).parent

    def link(match: re.Match[str]) -> str:
        text, target, anchor = match.groups()
        path = os.path.normpath(folder / target)
        on_site = WHOLE_PAGES.get(path) or NOTEBOOKS.get(path)
        if on_site is None and path.startswith("docs/") and (ROOT / path).is_file():
            on_site = path.removeprefix("docs/")
        if on_site is None:
            return text if (ROOT / path).exists() else match[0]  # a broken link is for mkdocs to find
        return f"[{text}]({os.path.relpath(on_site, PurePosixPath(page).parent)}{anchor or ''})"

    return re.sub(r"\[([^\]]*)\]\((?!https?:)([^)#\s]+)(#[^)\s]*)?\)", link, markdown)


# ----------------------------------------------------------------------------------------------------------
# Notebooks
# ----------------------------------------------------------------------------------------------------------


def notebook_page(notebook: Path, page: str) -> dict[str, str | bytes]:
    """{path: content} of the page of a notebook with its stored outputs, and of its pictures."""
    folder = page.removesuffix(".md")
    names = {"unique_key": folder, "output_files_dir": folder}
    markdown, resources = MarkdownExporter().from_notebook_node(nbformat.read(notebook, as_version=4), names)
    # pandas gives its tables a style of their own.
    markdown = re.sub(r"<style scoped>.*?</style>", "", markdown, flags=re.DOTALL)
    markdown = markdown.replace('<table border="1" class="dataframe">', "<table>")
    return {page: markdown, **resources["outputs"]}


# ----------------------------------------------------------------------------------------------------------
# API reference
# ----------------------------------------------------------------------------------------------------------


def public_names(package: str) -> list[str]:
    """The names of a package's `__all__`, or of a module's classes and functions without an underscore."""
    path = ROOT / package.replace(".", "/")
    tree = ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text())
    values = {
        target.id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    if isinstance(values.get("__all__"), ast.List):
        return ast.literal_eval(values["__all__"])
    if "_MODULES" in values:  # `lit_did.data` makes its `__all__` from this table
        return sorted(name for names in ast.literal_eval(values["_MODULES"]).values() for name in names)
    definitions = (node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef))
    return [name for name in definitions if not name.startswith("_")]


def identifier(package: str, name: str) -> str:
    """The path of a public name. A function hides a module of the same name, such as `lit_did.ops.token_statistics`."""
    module = ROOT / package.replace(".", "/") / f"{name}.py"
    return f"{package}.{name}.{name}" if module.exists() else f"{package}.{name}"


class Examples(griffe.Extension):
    """Our docstrings have the section "Example:"; griffe formats one that is named "Examples:"."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)


def api_overview() -> str:
    """The page about all packages."""
    shown = {name: package for package in reversed(PACKAGES) for name in public_names(package)}
    top = ", ".join(f"[`{name}`][{identifier(shown[name], name)}]" for name in public_names("lit_did"))
    lines = ["# API reference", "", "Everything that these pages do not list may change at any time.", ""]
    lines += ["## lit_did", "", f"{top}. These names are also in the packages below.", ""]
    for package in PACKAGES:
        names = ", ".join(f"[`{name}`][{identifier(package, name)}]" for name in public_names(package))
        lines += [f"## [{package}]({package}.md)", "", names, ""]
    return "\n".join(lines)


def api_page(package: str) -> str:
    """The page of a package: what it is for, then its public names."""
    only_its_text = "    options: {members: false, show_root_heading: false, show_root_toc_entry: false}"
    lines = [f"# {package}", "", f"::: {package}", only_its_text, ""]
    for name in public_names(package):
        lines += [f"::: {identifier(package, name)}", f"    options: {{heading: {package}.{name}}}", ""]
    return "\n".join(lines)
