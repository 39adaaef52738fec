"""The door of the package: quick to import, and every public name is behind it."""

from __future__ import annotations

import ast
import inspect
import sys

import pytest

import lit_did.data
from tests.processes import run_program


def test_import_is_light():
    code = (
        "import sys, lit_did.data; lit_did.data.parse_pair; lit_did.data.read_pairs; lit_did.data.tokenize_pair\n"
        "print([name for name in ('lightning', 'transformers', 'datasets', 'pyarrow', 'torch') if name in sys.modules])"
    )
    # Whatever the package above imports is its own matter; only what this part is said not to load is looked at.
    assert not {"lightning", "transformers", "datasets", "pyarrow"} & set(eval(run_program(sys.executable, "-c", code)))


def test_public_names_resolve():
    for name in lit_did.data.__all__:
        assert getattr(lit_did.data, name) is not None
        assert name in dir(lit_did.data)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        lit_did.data.nothing  # noqa: B018


def test_type_checkers_see_the_modules_that_hold_the_names():
    tree = ast.parse(inspect.getsource(lit_did.data))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    imported = [node.module for node in imports if node.names[0].name == "*"]
    assert imported == [f"lit_did.data.{module}" for module in lit_did.data._MODULES]
