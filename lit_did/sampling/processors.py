"""Logits processors for transformers' `generate`: draws from token DIDs, and from the policy that DPO would end at."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor

from lit_did.arguments import check_bools
from lit_did.functional.preference import check_beta
from lit_did.sampling.readers import CachedModel, check_token_ids, unmasked


class _SecondModelProcessor(LogitsProcessor):
    """Knows, at every step of `generate`, the logits of a second model, which reads along with its own cache.

    Beam search reorders rows between steps: where the rows read so far are the same in another order, so is the cache.
    Other rows are read from their beginning.
    """

    def __init__(self, model: nn.Module, attention_mask: Tensor | None, without_adapter: bool) -> None:
        check_bools(without_adapter=without_adapter)
        CachedModel(model, without_adapter=without_adapter)  # raises what is wrong with them
        self._model, self._without_adapter = model, without_adapter
        self._attention_mask = None if attention_mask is None else _checked_mask(attention_mask)
        self._prompts: Tensor | None = None  # [prompts, T], those that the mask is of
        self._cached: CachedModel | None = None
        self._read: Tensor | None = None  # [B, t], the rows that it has read
        self._reads = 0  # how often it has read since it began

    def second_logits(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """[B, V] logits after `input_ids` [B, t], in the dtype and on the device of `scores` [B, V]."""
        if self._read is None:
            check_token_ids("input_ids", input_ids, self._model, "the second model")
        if self._goes_on(input_ids):
            logits = self._cached.read(input_ids[:, self._read.shape[1] :])
        else:
            self._cached = CachedModel(self._model, without_adapter=self._without_adapter)
            self._reads = 0
            logits = self._cached.read(input_ids, self._mask(input_ids))
        self._read, self._reads = input_ids, self._reads + 1
        # After 2, 4, 8 ... reads one row is compared with the model's own forward pass.
        compared = self._reads > 1 and self._reads.bit_count() == 1
        if compared and self._cached.caches and not self._cached.agrees(logits):
            tokens = (
                f"{input_ids.shape[1]} tokens (up to the last {self._reads // 2} may have been drawn from wrong ones)"
            )
            self._cached.give_up_cache(
                f"gives other results with its cache than in its own forward pass after {tokens}"
            )
            logits = self._cached.read(input_ids[:, :0])
        if logits.shape != scores.shape:
            raise ValueError(
                f"Expected both models to have one vocabulary, but the one that generates has {scores.shape[-1]} "
                f"entries and {type(self._model).__name__} {logits.shape[-1]}."
            )
        return unmasked(logits).to(scores)

    def _goes_on(self, input_ids: Tensor) -> bool:
        """Whether `input_ids` continue the rows that were read; takes those rows' order."""
        if self._read is None or input_ids.shape[1] <= self._read.shape[1]:
            return False
        begun = input_ids[:, : self._read.shape[1]]
        if begun.shape == self._read.shape and torch.equal(begun, self._read):
            return True
        same = (begun[:, None] == self._read).all(-1)
        if self._attention_mask is not None:  # rows of other prompts may look the same, but for their padding
            now, then = (torch.arange(n) * len(self._attention_mask) // n for n in (len(begun), len(self._read)))
            same &= (now[:, None] == then).to(same.device)
        if not same.any(1).all():
            return False
        self._cached.select(same.int().argmax(1))
        return True

    def _mask(self, input_ids: Tensor) -> Tensor | None:
        """The mask of rows that are read from their beginning; [B, t]."""
        if self._attention_mask is None:
            self._look_for_padding(input_ids)
            return None
        mask, (rows, length) = self._attention_mask, input_ids.shape
        if mask.dim() != 2 or mask.shape[1] > length or rows % mask.shape[0]:
            raise ValueError(
                f"Expected `attention_mask` to be that of these prompts, [prompts, {length}] with {rows} rows a "
                f"multiple of the prompts, but got {tuple(mask.shape)}."
            )
        prompts = input_ids[:: rows // mask.shape[0], : mask.shape[1]]
        self._prompts = prompts if self._prompts is None else self._prompts
        if not torch.equal(prompts.repeat_interleave(rows // mask.shape[0], 0), input_ids[:, : mask.shape[1]]):
            raise ValueError(
                f"Expected `attention_mask` to have a row for each prompt, but got {mask.shape[0]} for {rows} rows of "
                "different prompts."
            )
        if not mask[:, -1].all():
            raise ValueError(
                "Expected `attention_mask` of prompts that are padded on the left, but got one that ends in 0."
            )
        if not torch.equal(prompts, self._prompts):
            raise ValueError(
                "Expected the prompts that `attention_mask` was given for, but got others: each batch of padded "
                "prompts needs a processor of its own."
            )
        mask = mask.to(input_ids).repeat_interleave(rows // mask.shape[0], 0)
        return torch.cat([mask, torch.ones_like(input_ids[:, mask.shape[1] :])], 1)

    def _look_for_padding(self, input_ids: Tensor) -> None:
        padding = getattr(getattr(self._model, "config", None), "pad_token_id", None)
        padded = input_ids[:, 0] == padding if padding is not None else torch.zeros(1, dtype=torch.bool)
        if padded.any() and not padded.all():
            raise ValueError(
                "Expected `attention_mask` for prompts that are padded on the left, but got None, and row "
                f"{int(padded.nonzero()[0])} begins with the padding token {padding}."
            )


def _checked_mask(attention_mask: Tensor) -> Tensor:
    """[prompts, T]."""
    try:
        mask = torch.as_tensor(attention_mask)
    except (ValueError, TypeError, RuntimeError):
        mask = None
    if mask is None or mask.dim() != 2 or not ((mask == 0) | (mask == 1)).all():
        got = type(attention_mask).__name__ if mask is None else f"{mask.dtype} {tuple(mask.shape)}"
        raise ValueError(f"Expected `attention_mask` to be zeros and ones of shape [prompts, T], but got {got}.")
    return mask


def _normalised(scores: Tensor, processed: Tensor) -> Tensor:
    """Log-probabilities of what was made of `scores`, without what these exclude."""
    logprobs = processed.masked_fill(scores == -torch.inf, -torch.inf).log_softmax(-1)
    if logprobs.isnan().any():
        raise ValueError(
            "Expected both models to return finite logits, or -inf from the second only where the first's are too, but "
            f"got none that make a distribution in row {int(logprobs.isnan().any(-1).nonzero()[0])}."
        )
    return logprobs


class DIDLogitsProcessor(_SecondModelProcessor):
    """`policy.generate` with it draws every token from the token DID, softmax(policy_logits - reference_logits).

    Sampled, greedy and beam search, one prompt or a batch. `generate`'s temperature then divides both logits, as in
    `lit_did.token_statistics`. What truncates or changes scores applies to the DID: transformers keeps the 50 likeliest
    tokens unless told `top_k=0`, and a checkpoint's own `generation_config` may set `top_p` and others. Entries that
    the policy's side excludes (-inf) stay excluded. To estimate H(q), take `lit_did.sampling.sample_did`: with
    `ess_threshold=0` it draws independent samples from the token DIDs and tells their log-probabilities.

    The product of token DIDs is not the DID of completions: for that there is `lit_did.sampling.sample_did`.

    Args:
        reference: A causal language model with the policy's vocabulary; it reads along with its own cache. For a LoRA
            policy give the policy itself, `without_adapter`: peft has put the adapter into its base model. A changed
            model needs a new processor.
        attention_mask: [prompts, T] that `generate` is given; needed where prompts are padded on the left. With it, a
            processor serves these prompts alone. Forgotten, padding is noticed only where the model's `config` has a
            `pad_token_id`.
        without_adapter: `reference` is a PeftModel, and is run without its adapter.

    Raises:
        TypeError, ValueError: `reference` is no model, or no PeftModel with `without_adapter`. In `generate`: the
            vocabularies differ, the mask is not that of the prompts, or is missing where padding is seen, or the
            reference excludes (-inf) what the policy does not.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from lit_did.sampling import DIDLogitsProcessor
        >>> config = LlamaConfig(vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        ...                      num_attention_heads=1, pad_token_id=0, eos_token_id=None)
        >>> policy, reference = LlamaForCausalLM(config), LlamaForCausalLM(config)
        >>> draws = policy.generate(torch.tensor([[1, 2]]), do_sample=True, top_k=0, max_new_tokens=3,
        ...                         logits_processor=[DIDLogitsProcessor(reference)])
        >>> draws.shape
        torch.Size([1, 5])
    """

    def __init__(
        self, reference: nn.Module, *, attention_mask: Tensor | None = None, without_adapter: bool = False
    ) -> None:
        super().__init__(reference, attention_mask, without_adapter)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """[B, V] log-probabilities of the token DID, from the policy's `scores` [B, V]."""
        scores = unmasked(scores)
        first = self._read is None
        second = self.second_logits(input_ids, scores)
        if first and torch.equal(scores, second):
            warnings.warn(
                "The policy and the reference have the same logits: every token of their DID is as likely as another. "
                "If the policy is a PeftModel, its base model holds the adapter too: give "
                "DIDLogitsProcessor(policy, without_adapter=True).",
                stacklevel=2,
            )
        return _normalised(scores, scores - second)


class TargetLogitsProcessor(_SecondModelProcessor):
    """`reference.generate` with it draws from the policy that DPO would end at, before any training.

    Where chosen completions are the reference's own and rejected ones those of another model with logits l, DPO's
    optimum is pi* proportional to rho (rho / pi_l)^(1/beta): per token softmax(r + (r - l) / beta), with the
    reference's logits r. (arXiv 2505.23761, the power law; docs/theory.md. As distributions of whole completions the
    two sides differ by the tokens' normalizers.)

    Args:
        rejected: A causal language model of the rejected completions, with the reference's vocabulary.
        beta: DPO's inverse temperature, above 0. The smaller, the farther the target is from the reference.
        attention_mask, without_adapter: As in `DIDLogitsProcessor`, of `rejected`.

    Raises:
        TypeError, ValueError: As `DIDLogitsProcessor`, or `beta` is not above 0.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from lit_did.sampling import TargetLogitsProcessor
        >>> config = LlamaConfig(vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        ...                      num_attention_heads=1, pad_token_id=0, eos_token_id=None)
        >>> reference, rejected = LlamaForCausalLM(config), LlamaForCausalLM(config)
        >>> target = TargetLogitsProcessor(rejected, beta=0.5)
        >>> draws = reference.generate(torch.tensor([[1, 2]]), do_sample=True, top_k=0, max_new_tokens=3,
        ...                            logits_processor=[target])
        >>> draws.shape
        torch.Size([1, 5])
    """

    def __init__(
        self,
        rejected: nn.Module,
        *,
        beta: float,
        attention_mask: Tensor | None = None,
        without_adapter: bool = False,
    ) -> None:
        super().__init__(rejected, attention_mask, without_adapter)
        check_beta(beta)
        self._beta = beta

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """[B, V] log-probabilities of the target, from the reference's `scores` [B, V]."""
        scores = unmasked(scores)
        return _normalised(scores, scores + (scores - self.second_logits(input_ids, scores)) / self._beta)
