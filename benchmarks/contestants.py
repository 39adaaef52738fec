"""The contestants: the same statistics, computed by lit_did and by others.

A contestant takes (policy_logits, reference_logits, labels) and returns tensors that are differentiable in both logits.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lit_did import TokenStatistics, token_statistics

Function = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]

BASELINE = "fused"
TRL_FIELDS = ("policy_logprob", "reference_logprob", "policy_entropy")


def reference_statistics(policy_logits: Tensor, reference_logits: Tensor, labels: Tensor) -> TokenStatistics:
    return token_statistics(policy_logits, reference_logits, labels, backend="reference")


@dataclass(frozen=True)
class Contestant:
    """A function, the names of what it returns, and how it must be called."""

    function: Function
    fields: tuple[str, ...] = TokenStatistics._fields
    truth: Function = reference_statistics
    """The same by the reference, which gets float64 inputs."""
    overwrites: bool = False
    """Whether its backward writes the gradients over the logits. It then races backward only, on untimed copies."""
    warmup: int = 2
    """Calls before the timed ones. One is enough if the first call is as fast as later ones."""
    copies: int = 2
    """The most float32 tensors of the logits' shape in forward + backward. Sizes that do not fit are left out."""


def eager(policy_logits: Tensor, reference_logits: Tensor, labels: Tensor) -> TokenStatistics:
    """The nine statistics as one would write them in torch, without ignored rows and infinities."""
    real = torch.float64 if policy_logits.dtype == torch.float64 else torch.float32
    z, r = policy_logits.to(real), reference_logits.to(real)
    a, b = z.logsumexp(-1, keepdim=True), r.logsumexp(-1, keepdim=True)
    d = z - r
    c = d.logsumexp(-1, keepdim=True)
    log_pi, log_rho, log_q = z - a, r - b, d - c
    pi, rho, q = log_pi.exp(), log_rho.exp(), log_q.exp()
    log_ratio = log_pi - log_rho
    return TokenStatistics(
        policy_logprob=log_pi.gather(-1, labels[:, None])[:, 0],
        reference_logprob=log_rho.gather(-1, labels[:, None])[:, 0],
        token_did_entropy=-(q * log_q).sum(-1),
        token_did_concentration=math.log(z.shape[-1]) + (q * log_q).sum(-1),
        token_did_log_partition=(c - a + b)[:, 0],
        policy_entropy=-(pi * log_pi).sum(-1),
        reference_entropy=-(rho * log_rho).sum(-1),
        kl=(pi * log_ratio).sum(-1),
        reverse_kl=-(rho * log_ratio).sum(-1),
    )


def _fused() -> Contestant:
    return Contestant(partial(token_statistics, backend="fused"))


def _fused_in_place() -> Contestant:
    return Contestant(partial(token_statistics, backend="fused", inplace_backward=True), overwrites=True, copies=4)


def _reference() -> Contestant:
    return Contestant(partial(token_statistics, backend="reference"), warmup=1, copies=40)


def _eager() -> Contestant:
    return Contestant(eager, warmup=1, copies=18)


def _compile() -> Contestant:
    return Contestant(torch.compile(eager, dynamic=False), copies=6)


def _compile_reference() -> Contestant:
    return Contestant(torch.compile(partial(token_statistics, backend="reference"), dynamic=False), copies=20)


def _trl() -> Contestant:
    try:
        from trl.trainer.utils import selective_log_softmax, selective_log_softmax_and_entropy
    except ImportError as error:
        raise RuntimeError(f"contestant trl needs TRL 1.14 or later: pip install 'lit-did[trl]' ({error})") from error

    def trl(policy_logits: Tensor, reference_logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        policy_logprob, policy_entropy = selective_log_softmax_and_entropy(policy_logits, labels)
        return policy_logprob, selective_log_softmax(reference_logits, labels), policy_entropy

    def truth(policy_logits: Tensor, reference_logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        statistics = reference_statistics(policy_logits, reference_logits, labels)
        return tuple(getattr(statistics, name) for name in TRL_FIELDS)

    warmup = 1 + torch.cuda.is_available()  # on CUDA its kernels are compiled on the first call
    return Contestant(trl, TRL_FIELDS, truth, warmup=warmup, copies=10)


MAKERS: dict[str, Callable[[], Contestant]] = {
    BASELINE: _fused,
    "fused in place": _fused_in_place,
    "compile": _compile,
    "eager": _eager,
    "trl": _trl,
    "reference": _reference,
    "compile reference": _compile_reference,
}


def default() -> list[str]:
    """The default contestants; TRL if it is installed."""
    names = [BASELINE, "fused in place", "compile", "eager"]
    return [*names, "trl"] if importlib.util.find_spec("trl") else names


def make(names: Iterable[str]) -> dict[str, Contestant]:
    """The contestants by name.

    Raises:
        RuntimeError: A package that a contestant comes from is missing.
    """
    return {name: MAKERS[name]() for name in names}
