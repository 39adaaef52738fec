"""DIDEntropy: the entropy of the DID of whole completions, from samples of many prompts, over batches and processes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics.utilities.data import dim_zero_cat
from torchmetrics.utilities.distributed import gather_all_tensors

from lit_did.arguments import check_integer
from lit_did.functional.did_entropy import (
    DIDEntropyEstimate,
    check_confidence,
    check_samples,
    estimate_did_entropy,
    kind,
)
from lit_did.metrics.base import DIDMetric, state_name, with_prefix


class DIDEntropy(DIDMetric):
    """H(q) of whole completions, q = pi / rho / Z, by `estimate_did_entropy` for each prompt: the mean over prompts.

    A prompt's samples may come in any number of updates and on any processes. `compute` returns float64 scalars:

    - `entropy`: the mean of H(q) over the prompts, in nats
    - `lower`, `upper`: its confidence interval. It is about the mean of these prompts, of which each is estimated from
      independent samples, not about prompts that were not drawn; and it is to be believed where `reliable` is 1.
      Infinite where that of one prompt is.
    - `entropy_per_token`: `entropy` / T, with `max_new_tokens`
    - `concentration`: T log V - `entropy`, with `max_new_tokens` and `vocab_size`
    - `log_partition`, `effective_sample_size`: means over the prompts
    - `reliable`: the share of prompts whose estimate is reliable
    - `num_prompts`

    A prompt with fewer than two samples, or none that the policy could have written, has no estimate. It counts as
    unreliable and in `num_prompts`; the means leave it out, and are NaN where no prompt is left. Without any data all
    but `num_prompts` are NaN.

    Five numbers a sample are kept, 40 bytes, until `reset`.

    Args:
        confidence: Of the interval, in (0, 1).
        max_new_tokens: T, the number of tokens at which completions are cut.
        vocab_size: V, the width of the logits; needs `max_new_tokens`.
        only: The name of the value to return, as a scalar, such as "entropy"; None returns a dict of all.
        prefix: Before the names in that dict: two metrics' names must not meet in one `log_dict`.
        padding: What fills `sequences` [N, T] after a completion's end, so that it does not matter how long the others
            of its batch are.
        kwargs: Of `torchmetrics.Metric`.

    Raises:
        TypeError, ValueError: An argument is out of range.

    Example:
        >>> import math, torch
        >>> from lit_did.metrics import DIDEntropy
        >>> logprob = torch.full((64,), -10 * math.log(2))  # 64 of the 1,024 strings of 10 bits; pi = rho
        >>> metric = DIDEntropy(max_new_tokens=10, vocab_size=2)
        >>> metric.update(logprob, logprob, logprob, torch.zeros(64, dtype=torch.long), sequences=torch.arange(64))
        >>> values = metric.compute()
        >>> list(values)[:6]
        ['entropy', 'lower', 'upper', 'entropy_per_token', 'concentration', 'log_partition']
        >>> list(values)[6:]
        ['effective_sample_size', 'reliable', 'num_prompts']
        >>> values["entropy"], values["entropy_per_token"]
        (tensor(6.9315, dtype=torch.float64), tensor(0.6931, dtype=torch.float64))
        >>> metric.estimates()[0].reliable
        True
    """

    is_differentiable = False
    higher_is_better = None

    def __init__(
        self,
        *,
        confidence: float = 0.95,
        max_new_tokens: int | None = None,
        vocab_size: int | None = None,
        only: str | None = None,
        prefix: str = "",
        padding: int = -1,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_confidence(confidence)
        for name, value in {"max_new_tokens": max_new_tokens, "vocab_size": vocab_size}.items():
            if value is not None:
                check_integer(name, value, 1)
        if vocab_size is not None and max_new_tokens is None:
            raise ValueError("Expected `max_new_tokens` with `vocab_size`, but got None.")
        check_integer("padding", padding)
        self.confidence, self.max_new_tokens, self.vocab_size, self.padding = (
            confidence,
            max_new_tokens,
            vocab_size,
            padding,
        )
        self.only, self.prefix = only, prefix
        choices = list(self._values({}))
        if only is not None and only not in choices:
            raise ValueError(f"Expected `only` to be None or one of {', '.join(map(repr, choices))}, but got {only!r}.")
        # [N, 3] float64: log pi, log rho, log g; [N, 2] int64: prompt and sequence.
        self._logprobs, self._ids = (
            state_name("did_entropy", part, {"padding": padding}) for part in ("logprobs", "ids")
        )
        self.add_state(self._logprobs, [], dist_reduce_fx="cat")
        self.add_state(self._ids, [], dist_reduce_fx="cat")

    def update(
        self,
        policy_logprob: Tensor,
        reference_logprob: Tensor,
        proposal_logprob: Tensor,
        group: Tensor,
        sequences: Tensor | None = None,
    ) -> None:
        """Adds samples of any prompts.

        Args:
            policy_logprob: [N] log pi(y), summed over the completion, in nats, any float dtype. -inf has weight 0.
            reference_logprob: [N] log rho(y), finite.
            proposal_logprob: [N] log g(y), finite, of the proposal that the completions were drawn from.
            group: [N] integers, one for each prompt, the same in all updates and on all processes.
            sequences: [N] or [N, T] integers that tell a prompt's completions apart: an id each, or token ids, filled
                up with `padding`. Without it completions count as equal where their three log-probabilities are. In one
                of the three ways in all updates. Of token ids, 64 bits are kept: that two among a million completions
                agree by chance has a probability of 3e-8.

        Raises:
            TypeError: An argument is no tensor, or has the wrong kind of dtype.
            ValueError: Shapes do not agree, or a value is out of range.
        """
        given = {
            "policy_logprob": policy_logprob,
            "reference_logprob": reference_logprob,
            "proposal_logprob": proposal_logprob,
        }
        check_samples(given, sequences, at_least=0)
        if not isinstance(group, Tensor) or group.is_floating_point() or group.is_complex():
            raise TypeError(f"Expected `group` to be a tensor of integers, but got {kind(group)}.")
        if group.shape != policy_logprob.shape:
            raise ValueError(
                f"Expected `group` to have shape {tuple(policy_logprob.shape)}, but got {tuple(group.shape)}."
            )
        logprobs = torch.stack([value.detach().to(self.device, torch.float64) for value in given.values()], -1)
        if sequences is None:
            sequences = hash_rows((logprobs + 0.0).view(torch.int64))  # + 0.0: there is a -0.0
        elif sequences.dim() == 2:
            sequences = hash_rows(sequences, self.padding)
        ids = torch.stack([value.to(self.device, torch.int64) for value in (group, sequences)], -1)
        getattr(self, self._logprobs).append(logprobs)
        getattr(self, self._ids).append(ids)

    def compute(self) -> dict[str, Tensor] | Tensor:
        """{name: value}, or the value of `only`, of all updates since the last reset, on all processes."""
        values = {
            name: torch.tensor(value, dtype=torch.float64, device=self.device)
            for name, value in self._values(self._estimates()).items()
        }
        return with_prefix(values, self.prefix) if self.only is None else values[self.only]

    def estimates(self) -> dict[int, DIDEntropyEstimate | None]:
        """{prompt: its estimate, None where it has none}, on all processes, which must all call it, as `compute`."""
        with self.sync_context(
            dist_sync_fn=self.dist_sync_fn, should_sync=self._to_sync, should_unsync=self._should_unsync
        ):
            return self._estimates()

    def _estimates(self) -> dict[int, DIDEntropyEstimate | None]:
        if len(getattr(self, self._ids)) == 0:
            return {}
        logprobs, ids = (dim_zero_cat(getattr(self, state)).cpu() for state in (self._logprobs, self._ids))
        order = ids[:, 0].argsort(stable=True)
        prompts, sizes = ids[order, 0].unique_consecutive(return_counts=True)
        estimates: dict[int, DIDEntropyEstimate | None] = {}
        for prompt, mine in zip(prompts.tolist(), order.split(sizes.tolist()), strict=True):
            given, sequences = logprobs[mine].unbind(-1), ids[mine, 1]
            possible = len(mine) > 1 and (given[0] > -math.inf).any()
            estimates[prompt] = (
                estimate_did_entropy(*given, sequences=sequences, confidence=self.confidence) if possible else None
            )
        return estimates

    def _values(self, estimates: dict[int, DIDEntropyEstimate | None]) -> dict[str, float]:
        from scipy.special import stdtrit

        given = [estimate for estimate in estimates.values() if estimate is not None]

        def mean(field: str) -> float:
            return sum(getattr(estimate, field) for estimate in given) / len(given) if given else math.nan

        entropy, margin = mean("entropy"), math.nan
        if given:
            variances = [estimate.standard_error**2 for estimate in given]
            margin = math.inf
            if all(math.isfinite(estimate.upper) for estimate in given):
                # Welch and Satterthwaite's degrees of freedom; of one prompt, its own.
                spread = sum(v**2 / (e.effective_sample_size - 1) for v, e in zip(variances, given, strict=True))
                freedom = sum(variances) ** 2 / spread if spread else math.inf
                quantile = float(stdtrit(freedom, (1 + self.confidence) / 2))
                margin = quantile * math.sqrt(sum(variances)) / len(given)
        values = {"entropy": entropy, "lower": entropy - margin, "upper": entropy + margin}
        if self.max_new_tokens is not None:
            values["entropy_per_token"] = entropy / self.max_new_tokens
        if self.vocab_size is not None:
            values["concentration"] = self.max_new_tokens * math.log(self.vocab_size) - entropy
        return values | {
            "log_partition": mean("log_partition"),
            "effective_sample_size": mean("effective_sample_size"),
            "reliable": sum(estimate.reliable for estimate in given) / len(estimates) if estimates else math.nan,
            "num_prompts": len(estimates),
        }

    def _sync_dist(self, dist_sync_fn: Callable = gather_all_tensors, process_group: Any = None) -> None:
        # A process without samples takes part with states of the others' shapes and dtypes; torchmetrics' own stand-in
        # is float32 of one dimension.
        for state, empty in ((self._logprobs, torch.zeros(0, 3).double()), (self._ids, torch.zeros(0, 2).long())):
            if len(getattr(self, state)) == 0:
                setattr(self, state, [empty.to(self.device)])
        super()._sync_dist(dist_sync_fn, process_group)


def hash_rows(rows: Tensor, padding: int | None = None) -> Tensor:
    """[N] int64 of integers [N, T]: equal for equal rows, whatever `padding` follows; else different but for 2**-64.

    The sum over positions of splitmix64 (doi 10.1145/2714064.2660195) of the entry and its position.

    Example:
        >>> one, other = hash_rows(torch.tensor([[5, 6, -1], [6, 5, -1]]), padding=-1)
        >>> one == hash_rows(torch.tensor([[5, 6]]), padding=-1)[0], one == other
        (tensor(True), tensor(False))
    """
    position = torch.arange(1, rows.shape[1] + 1, device=rows.device)
    hashes = _mix(rows.long() ^ _mix(position))
    if padding is not None:
        # Inside a completion too: where the other tokens stand says that there is one.
        hashes = hashes.masked_fill(rows == padding, 0)
    return hashes.sum(1)


def _mix(x: Tensor) -> Tensor:
    """splitmix64 of int64 taken as 64 bits: products wrap around, and shifts bring in zeros."""

    def shifted(x: Tensor, bits: int) -> Tensor:
        return (x >> bits) & ((1 << (64 - bits)) - 1)

    x = x + (0x9E3779B97F4A7C15 - 2**64)
    x = (x ^ shifted(x, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ shifted(x, 27)) * (0x94D049BB133111EB - 2**64)
    return x ^ shifted(x, 31)
