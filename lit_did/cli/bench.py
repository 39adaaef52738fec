"""`lit-did bench`: the benchmarks, which are part of a clone and not of the installed package."""

from __future__ import annotations

import importlib
import sys

from lit_did.cli.errors import PACKAGE, InputError


def main(arguments: list[str]) -> int:
    """Runs `python -m benchmarks` of the clone that this package belongs to.

    Raises:
        InputError: The package was installed without its clone.
    """
    clone = PACKAGE.parent
    if not (clone / "benchmarks" / "__main__.py").is_file():
        raise InputError(
            "Expected lit-did to be installed from a clone, which holds the benchmarks, with `pip install --editable "
            f".`, but it is installed in {PACKAGE}. Clone the repository and run `make bench` there."
        )
    sys.path.insert(0, str(clone))
    importlib.import_module("benchmarks.__main__").main(arguments)
    return 0
