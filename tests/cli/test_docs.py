"""`lit-did docs`: it shows the pages of docs/, and all that messages and docstrings name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import lit_did
from lit_did.cli import docs
from lit_did.cli.main import main

PACKAGE = Path(lit_did.__file__).parent


def test_all_pages_are_listed_with_their_titles(capsys):
    assert main(["docs"]) == 0
    shown = capsys.readouterr().out
    assert str(docs.DOCS) in shown
    assert re.search(r"^  losses +Losses$", shown, re.MULTILINE)
    assert len(docs.pages()) > 20
    assert all(re.search(rf"^  {name} +[A-Z]", shown, re.MULTILINE) for name in docs.pages())


@pytest.mark.parametrize("name", ["recipes", "recipes.md", "docs/recipes.md"])
def test_a_page_is_printed_without_comments(name, capsys):
    assert main(["docs", name]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("# Recipes\n")
    assert "<!--" in docs.pages()["recipes"].read_text()
    assert "<!--" not in shown


def test_a_wrong_name_is_answered_with_the_nearest(capsys):
    assert main(["docs", "loses"]) == 2
    assert capsys.readouterr().err.endswith("but got loses. Did you mean losses?\n")
    assert main(["docs", "xyzzy"]) == 2
    assert capsys.readouterr().err.endswith("`lit-did docs` lists all pages.\n")


def test_what_the_package_names_exists():
    named = set()
    for path in PACKAGE.rglob("*.py"):
        text = re.sub(r"(^|\s)#.*", "", path.read_text())  # comments are for people with the sources
        named |= set(re.findall(r"`lit-did docs ([a-z_]+)`", text))
        assert not re.search(r"\bdocs/\w+\.md", text), path
    assert {"losses", "theory", "scale"} <= named <= docs.pages().keys()
