"""How fast are the eight token statistics, and their gradient, beside plain torch computing the same?"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.harness import Result, race, result
from lit_did import TokenStatistics, token_statistics

QUESTION = "token_statistics"
BASELINE = "fused"


def eager(policy_logits: Tensor, reference_logits: Tensor, labels: Tensor) -> TokenStatistics:
    """The eight quantities as one would write them in torch: no ignored rows, no infinities."""
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
        did_entropy=-(q * log_q).sum(-1),
        did_log_partition=(c - a + b)[:, 0],
        policy_entropy=-(pi * log_pi).sum(-1),
        reference_entropy=-(rho * log_rho).sum(-1),
        kl=(pi * log_ratio).sum(-1),
        reverse_kl=-(rho * log_ratio).sum(-1),
    )


def contestants(names: list[str]) -> dict[str, Callable[[Tensor, Tensor, Tensor], TokenStatistics]]:
    """The functions to race, by name: fused, reference, eager, compile."""
    every = {
        "fused": lambda z, r, y: token_statistics(z, r, y, backend="fused"),
        "reference": lambda z, r, y: token_statistics(z, r, y, backend="reference"),
        "eager": eager,
        "compile": torch.compile(eager, dynamic=False),
    }
    return {name: every[name] for name in names}


def run(
    rows: int, vocabularies: list[int], dtypes: list[torch.dtype], names: list[str], repeats: int
) -> Iterator[Result]:
    """Checks every contestant against float64, then races them, forward and forward + backward."""
    for vocabulary in vocabularies:
        for dtype in dtypes:
            generator = torch.Generator().manual_seed(0)
            z = torch.randn(rows, vocabulary, generator=generator).mul_(3)
            r = z.add(torch.randn(rows, vocabulary, generator=generator), alpha=0.5).to(dtype)
            z = z.to(dtype)
            y = torch.randint(vocabulary, (rows,), generator=generator)
            functions = contestants(names)
            for name, function in functions.items():
                _check(name, function, z[:8], r[:8], y[:8])
            yield from _race_at(functions, z, r, y, repeats)


def _race_at(functions: dict[str, Callable], z: Tensor, r: Tensor, y: Tensor, repeats: int) -> Iterator[Result]:
    read = (z.nbytes + r.nbytes) / 1e9
    forward = {name: lambda f=f: f(z, r, y) for name, f in functions.items()}
    forward["read (sum)"] = lambda: (z.sum(), r.sum())
    for name, times in race(forward, repeats=repeats).items():
        yield result(QUESTION, name, "forward", z, times, read)
    both = {name: lambda f=f: _forward_backward(f, z, r, y) for name, f in functions.items()}
    for name, times in race(both, repeats=repeats).items():
        yield result(QUESTION, name, "fwd + bwd", z, times, 3 * read)  # read twice, and the gradients written


def _forward_backward(function: Callable, z: Tensor, r: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    z, r = z.detach().requires_grad_(), r.detach().requires_grad_()
    return torch.autograd.grad(sum(value.sum() for value in function(z, r, y)), (z, r))


def _check(name: str, function: Callable, z: Tensor, r: Tensor, y: Tensor) -> None:
    truth = token_statistics(z.double(), r.double(), y, backend="reference")
    for field, value, expected in zip(TokenStatistics._fields, function(z, r, y), truth, strict=True):
        error = (value.double() - expected).abs().max().item()
        if not error < 1e-3:
            raise RuntimeError(f"{name} is wrong: {field} differs from float64 by {error:.2g} nats.")
