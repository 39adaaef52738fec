"""DIDEntropy: the entropy of the DID of whole completions, from samples of many prompts, over batches and processes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
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
    - `lower`, `upper`: its confidence interval. It is about the mean of these prompts, each estimated from
      independent samples, not about prompts that were not drawn. Believe it where `reliable` is 1. It is infinite if
      that of one prompt is.
    - `entropy_per_token`: `entropy` / T, with `max_new_tokens`
    - `concentration`: T log V - `entropy`, with `max_new_tokens` and `vocab_size`
    - `log_partition`, `effective_sample_size`: means over the prompts
    - `reliable`: the share of prompts whose estimate is reliable
    - `num_prompts`

    A prompt with fewer than two samples, or none that the policy could have written, has no estimate. It counts as
    unreliable and in `num_prompts`; the means leave it out, and are NaN where no prompt is left. Without any data all
    but `num_prompts` are NaN.

    Each sample is kept until `reset`: 32 bytes, and 8 more for each token of `sequences`.

    Args:
        confidence: Of the interval, in (0, 1).
        max_new_tokens: T, the number of tokens at which completions are cut.
        vocab_size: V, the width of the logits; needs `max_new_tokens`.
        only: The name of the value to return, as a scalar, such as "entropy". None returns a dict of all.
        prefix: Stands before the names in that dict. Two metrics in one `log_dict` must not share names.
        padding: What fills `sequences` [N, T] after a completion's end. The length of the other completions in a batch
            then does not matter.
        kwargs: Arguments of `torchmetrics.Metric`, such as `sync_on_compute` or `dist_sync_on_step`.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range.

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
        # [N, 3] float64: log pi, log rho, log g. [N] int64: the prompt. [N, T] int64: the sequences, with
        # another T in every update, so that torchmetrics cannot concatenate it.
        self._logprobs, self._groups, self._sequences = (
            state_name("did_entropy", part, {"padding": padding}) for part in ("logprobs", "groups", "sequences")
        )
        self.add_state(self._logprobs, [], dist_reduce_fx="cat")
        self.add_state(self._groups, [], dist_reduce_fx="cat")
        self.add_state(self._sequences, [], dist_reduce_fx=None)

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
                up with `padding`. Without it completions count as equal if their three log-probabilities are equal. Use
                the same of the three ways in all updates.

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
            sequences = (logprobs + 0.0).view(torch.int64)  # their bits; + 0.0: there is a -0.0
        elif sequences.dim() == 1:
            sequences = sequences[:, None]
        getattr(self, self._logprobs).append(logprobs)
        getattr(self, self._groups).append(group.to(self.device, torch.int64))
        getattr(self, self._sequences).append(sequences.to(self.device, torch.int64))

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
        if len(getattr(self, self._groups)) == 0:
            return {}
        logprobs, groups = (dim_zero_cat(getattr(self, state)).cpu() for state in (self._logprobs, self._groups))
        sequences = self._rows(getattr(self, self._sequences)).cpu()
        order = groups.argsort(stable=True)
        prompts, sizes = groups[order].unique_consecutive(return_counts=True)
        estimates: dict[int, DIDEntropyEstimate | None] = {}
        for prompt, mine in zip(prompts.tolist(), order.split(sizes.tolist()), strict=True):
            policy, reference, proposal = logprobs[mine].unbind(-1)
            estimates[prompt] = None
            if len(mine) > 1 and (policy > -math.inf).any():
                estimates[prompt] = estimate_did_entropy(
                    policy, reference, proposal, sequences=sequences[mine], confidence=self.confidence
                )
        return estimates

    def _rows(self, parts: list[Tensor]) -> Tensor:
        """[N, T] of parts [n, t], filled up to the longest."""
        longest = max(part.shape[1] for part in parts)
        return torch.cat([pad(part, (0, longest - part.shape[1]), value=self.padding) for part in parts])

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
        # A process without samples takes part with states of the others' dtypes and numbers of dimensions.
        # torchmetrics' own stand-in is float32 of one dimension.
        empty = {
            self._logprobs: torch.zeros(0, 3, dtype=torch.float64),
            self._groups: torch.zeros(0, dtype=torch.int64),
            self._sequences: torch.zeros(0, 1, dtype=torch.int64),
        }
        for state, value in empty.items():
            if len(getattr(self, state)) == 0:
                setattr(self, state, [value.to(self.device)])
        setattr(self, self._sequences, [self._rows(getattr(self, self._sequences))])  # one tensor a process
        super()._sync_dist(dist_sync_fn, process_group)
