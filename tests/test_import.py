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


# Imports the whole package, for which these modules do not exist. Other packages may have them.
AS_ON_WINDOWS = """
import builtins, importlib, pkgutil
import lit_did
found = builtins.__import__

def find(name, importer=None, *rest, **named):
    of_unix = name in ("fcntl", "grp", "posix", "pwd", "resource", "termios")
    if of_unix and (importer or {}).get("__name__", "").startswith("lit_did"):
        raise ModuleNotFoundError(name)
    return found(name, importer, *rest, **named)

builtins.__import__ = find
names = [module.name for module in pkgutil.walk_packages(lit_did.__path__, "lit_did.") if "__main__" not in module.name]
for name in names:
    importlib.import_module(name)
print(len(names))
"""


def test_no_module_of_unix_is_needed():
    assert int(run_program(sys.executable, "-W", "ignore", "-c", AS_ON_WINDOWS)) > 100


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
