"""What the results of a policy and its reference depend on besides the arguments: weights, configurations, versions."""

from __future__ import annotations

import platform
import uuid
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from torch import nn

from lit_did.reference_cache.fingerprint import exact_digest


def facts(policy: nn.Module, reference: nn.Module | None, **digests: str) -> dict[str, dict[str, str]]:
    """Digests and versions, to be kept with results.

    Args:
        policy: The policy.
        reference: The reference. None: it is the policy without its adapter.
        **digests: Further digests, such as that of the data.
    """
    base = exact_digest(policy) if reference is None else exact_digest(reference, adapter=True)
    # A model whose values cannot be read has a name of its own, so that no other run goes on with its results.
    models = {"policy": exact_digest(policy, adapter=True), "reference": base}
    packages = {name: version(name) for name in ("lit-did", "torch", "transformers")}
    return {
        "digests": {name: digest or f"unknown {uuid.uuid4()}" for name, digest in models.items()} | digests,
        "versions": {**packages, "python": platform.python_version()},
    }


def recorded(arguments: Mapping[str, Any], found: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    """Arguments and `facts` with the names that errors call them, for `lit_did.cli.output.Finished`."""
    return {
        **{f"--{name}": value for name, value in arguments.items()},
        **{f"the digest of the {name}": digest for name, digest in found["digests"].items()},
        **{f"the version of {name}": number for name, number in found["versions"].items()},
    }
