"""`import lit_did`: without the libraries that only parts of it need, and with all the names that it promises."""

from __future__ import annotations

import sys

import lit_did
from tests.processes import run_program

HEAVY = ("lightning", "pytorch_lightning", "torchmetrics", "transformers", "trl", "peft", "datasets", "matplotlib")


def test_no_heavy_imports():
    """In a process of its own: this one has imported anything. torch itself may import what it likes."""
    code = (
        "import sys, torch; before = set(sys.modules); import lit_did\n"
        f"print([name for name in {HEAVY} if name in sys.modules and name not in before])"
    )
    assert run_program(sys.executable, "-c", code).strip() == "[]"


def test_all_names():
    assert lit_did.__all__ == sorted(lit_did.__all__)
    for name in lit_did.__all__:
        value = getattr(lit_did, name)
        assert value.__name__ == name
        assert value.__doc__


def test_unknown_name():
    """A typing error in a lazily loaded name is an AttributeError, as everywhere."""
    assert not hasattr(lit_did, "LitDPOO")


def test_version():
    from importlib.metadata import version

    assert lit_did.__version__ == version("lit-did")
