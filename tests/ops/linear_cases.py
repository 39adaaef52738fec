"""What the tests of the linear statistics share: output layers, and the logits form that they are compared with."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_did import TokenStatistics, linear_token_statistics, token_statistics
from lit_did.ops import reference as specification
from tests.helpers import FIELDS

INPUTS = ("policy_hidden", "policy_weight", "policy_bias", "reference_hidden", "reference_weight", "reference_bias")
TOKENS, VOCABULARY, POLICY_SIZE, REFERENCE_SIZE = 11, 1500, 16, 12


@dataclass
class Case:
    """Two output layers as tensors by name, the labels, and the options that change the result."""

    tensors: dict[str, Tensor | None]
    labels: Tensor
    softcap: tuple[float | None, float | None] = (None, None)
    scale: tuple[float, float] = (1.0, 1.0)
    temperature: float = 1.0
    upstream: dict[str, Tensor] = field(default_factory=dict)
    """of the statistics that the loss uses"""

    def inputs(self, dtype: torch.dtype | None = None) -> dict[str, Tensor | None]:
        """Fresh leaves; those that require a gradient here do so there."""
        return {
            name: None if value is None else value.detach().to(dtype or value.dtype).requires_grad_(value.requires_grad)
            for name, value in self.tensors.items()
        }


def make_case(
    dtype: torch.dtype = torch.float32, reference_dtype: torch.dtype | None = None, *, bias: bool = False, **options
) -> Case:
    generator = torch.Generator().manual_seed(0)

    def layer(side: str, size: int, dtype: torch.dtype) -> dict[str, Tensor | None]:
        hidden, weight, vector = (
            torch.randn(*shape, generator=generator, dtype=torch.float64)
            for shape in ((TOKENS, size), (VOCABULARY, size), (VOCABULARY,))
        )
        tensors = {f"{side}_hidden": hidden, f"{side}_weight": 3 * weight / size**0.5, f"{side}_bias": vector}
        tensors = {name: value.to(dtype).requires_grad_() for name, value in tensors.items()}
        return tensors if bias else tensors | {f"{side}_bias": None}

    tensors = layer("policy", POLICY_SIZE, dtype) | layer("reference", REFERENCE_SIZE, reference_dtype or dtype)
    upstream = {name: torch.randn(TOKENS, generator=generator, dtype=torch.float64) for name in FIELDS}
    labels = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    return Case(tensors, labels, **{"upstream": upstream} | options)


def logits_of(case: Case, inputs: dict[str, Tensor | None]) -> list[Tensor]:
    result = []
    for side, softcap, scale in zip(("policy", "reference"), case.softcap, case.scale, strict=True):
        logits = F.linear(*(inputs[f"{side}_{part}"] for part in ("hidden", "weight", "bias"))) * scale
        result.append(logits if softcap is None else softcap * torch.tanh(logits / softcap))
    return result


def linear(case: Case, inputs: dict[str, Tensor | None], **options) -> TokenStatistics:
    return linear_token_statistics(
        *(inputs[name] for name in INPUTS if not name.endswith("bias")),
        case.labels,
        policy_bias=inputs["policy_bias"],
        reference_bias=inputs["reference_bias"],
        softcap=case.softcap,
        scale=case.scale,
        temperature=case.temperature,
        **options,
    )


def logits_form(case: Case, inputs: dict[str, Tensor | None], backend: str = "auto") -> TokenStatistics:
    return token_statistics(*logits_of(case, inputs), case.labels, temperature=case.temperature, backend=backend)


def in_float64(case: Case, inputs: dict[str, Tensor | None]) -> TokenStatistics:
    """Of `case.inputs(torch.float64)`, by the specification."""
    return specification.token_statistics(*logits_of(case, inputs), case.labels, -100, case.temperature)


def gradients(
    case: Case, statistics: TokenStatistics, inputs: dict[str, Tensor | None], **options
) -> dict[str, Tensor]:
    """Of sum(upstream * statistics), in the inputs that require one; 0 where the specification's graph ends before."""
    names = [name for name, value in inputs.items() if value is not None and value.requires_grad]
    used = [name for name in case.upstream if getattr(statistics, name).requires_grad]
    values = [getattr(statistics, name) for name in used]
    upstream = [case.upstream[name].to(value) for name, value in zip(used, values, strict=True)]
    leaves = [inputs[name] for name in names]
    grads = torch.autograd.grad(values, leaves, upstream, materialize_grads=True, **options)
    return dict(zip(names, grads, strict=True))


def assert_as_good_as_logits(case: Case, **options) -> None:
    """Values and gradients are no further from float64's than twice what the logits form in the same dtype is.

    By the root of the sum of squares of a whole tensor: a single entry of either may be right by luck. What both may
    be off is added, a few roundings of the result; float16 gradients below its normal numbers lose digits besides; and
    for float64 the truth is no better than either.
    """
    inputs, of_logits, exact = case.inputs(), case.inputs(), case.inputs(torch.float64)
    ours, truth = linear(case, inputs, **options), in_float64(case, exact)
    theirs = logits_form(case, of_logits, options.get("backend", "auto"))
    double = case.tensors["policy_hidden"].dtype == torch.float64
    assert {value.dtype for value in ours} == {torch.float64 if double else torch.float32}
    for name, *values in zip(FIELDS, ours, theirs, truth, strict=True):
        _assert_no_further(name, *values)
    ours, theirs, truth = (gradients(case, *pair) for pair in ((ours, inputs), (theirs, of_logits), (truth, exact)))
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].dtype == case.tensors[name].dtype
        _assert_no_further("gradient of " + name, ours[name], theirs[name], truth[name])


def _assert_no_further(name: str, ours: Tensor, theirs: Tensor, truth: Tensor) -> None:
    error, allowed = ((value.double() - truth).norm() for value in (ours, theirs))
    relative = 1e-12 if theirs.dtype == torch.float64 else 4 * torch.finfo(ours.dtype).eps
    free = relative * truth.norm() + (1e-6 if ours.dtype == torch.float16 else 0)
    assert error <= 2 * allowed + free, f"{name}: {error:.3g} from float64, the logits form {allowed:.3g}"
