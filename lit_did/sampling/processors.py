"""Logits processors for transformers' `generate`: draws from token DIDs, and from DPO's target token by token."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor

from lit_did.functional.preference import check_beta
from lit_did.sampling.readers import CachedModel, check_token_ids, second_model, unmasked


class _Reading(NamedTuple):
    """What the second model has read so far."""

    model: CachedModel
    rows: Tensor
    """[B, t] token ids"""
    logits: Tensor
    """[B, V] after them"""
    num_reads: int
    """reads since the rows' beginning"""


class _SecondModelProcessor(LogitsProcessor):
    """Knows, at every step of `generate`, the logits of a second model, which reads along with its own cache.

    Beam search reorders rows between steps. If the new rows begin with the rows read so far in another order, the
    cache is reordered too. Other rows are read from their beginning.

    Args:
        model: The second model.
        attention_mask: [prompts, T] zeros and ones, or None.
        without_adapter: `model` is a PeftModel and is read without its adapter.
        advice: What to do if both models return the same logits.
    """

    def __init__(
        self, model: nn.Module, attention_mask: Tensor | None, *, without_adapter: bool = False, advice: str
    ) -> None:
        CachedModel(model, without_adapter=without_adapter)  # raises what is wrong with the model
        self._model, self._without_adapter, self._advice = model, without_adapter, advice
        self._attention_mask = None if attention_mask is None else _checked_mask(attention_mask)
        self._use_cache = True
        self._prompts: Tensor | None = None  # [prompts, T], those that the mask belongs to
        self._reading: _Reading | None = None

    def second_logits(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The second model's logits [B, V] after `input_ids` [B, t], in the dtype and on the device of `scores`."""
        first = self._reading is None
        had_cache = self._reading is not None and self._reading.model.caches
        if first:
            check_token_ids("input_ids", input_ids, self._model, "the second model")
        before = self._goes_on(input_ids)
        if before is None:
            model = CachedModel(self._model, without_adapter=self._without_adapter, cache=self._use_cache)
            num_reads = 1
            logits = model.read(input_ids, self._mask(input_ids))
        else:
            model, num_reads = before.model, before.num_reads + 1
            logits = model.read(input_ids[:, before.rows.shape[1] :])
            if had_cache and not model.caches and not model.agrees(before.logits, before.rows.shape[1]):
                self._warn_of_wrong_cache(model, before.rows.shape[1], before.num_reads)
        # After 2, 4, 8 ... reads one row is compared with the model's own forward pass.
        if num_reads > 1 and num_reads.bit_count() == 1 and model.caches and not model.agrees(logits):
            model.give_up_cache(None)
            self._warn_of_wrong_cache(model, input_ids.shape[1], num_reads)
            logits = model.read(input_ids[:, :0])
        self._reading = _Reading(model, input_ids, logits, num_reads)
        if logits.shape != scores.shape:
            raise ValueError(
                "Expected both models to have one vocabulary, but the one that generates has "
                f"{scores.shape[-1]} entries and {type(self._model).__name__} has {logits.shape[-1]}."
            )
        logits = unmasked(logits).to(scores)
        if first and torch.equal(scores, logits):
            warnings.warn(f"Both models return the same logits. {self._advice}", stacklevel=3)
        return logits

    def _warn_of_wrong_cache(self, model: CachedModel, num_tokens: int, num_reads: int) -> None:
        self._use_cache = False
        warnings.warn(
            f"Up to the last {num_reads // 2} tokens may have been drawn from wrong logits: {model.name} gives other "
            f"results with its cache than in its own forward pass after {num_tokens} tokens. Generate again with this "
            "processor. It no longer uses the cache, so that results are right, but slower.",
            stacklevel=4,
        )

    def _goes_on(self, input_ids: Tensor) -> _Reading | None:
        """What was read, in the order of `input_ids`, if these go on from there."""
        reading = self._reading
        if reading is None or input_ids.shape[1] <= reading.rows.shape[1]:
            return None
        begun = input_ids[:, : reading.rows.shape[1]]
        if begun.shape == reading.rows.shape and torch.equal(begun, reading.rows):
            return reading
        same = (begun[:, None] == reading.rows).all(-1)
        if self._attention_mask is not None:  # rows of other prompts may differ in their padding alone
            now, then = (torch.arange(n) * len(self._attention_mask) // n for n in (len(begun), len(reading.rows)))
            same &= (now[:, None] == then).to(same.device)
        if not same.any(1).all():
            return None
        order = same.int().argmax(1)
        reading.model.select(order)
        return reading._replace(rows=begun, logits=reading.logits[order.to(reading.logits.device)])

    def _mask(self, input_ids: Tensor) -> Tensor | None:
        """The mask of rows that are read from their beginning; [B, t]."""
        if self._attention_mask is None:
            self._look_for_padding(input_ids)
            return None
        mask, (rows, length) = self._attention_mask, input_ids.shape
        if mask.shape[1] > length or rows % mask.shape[0]:
            raise ValueError(
                f"Expected `attention_mask` to be the mask of these prompts, [prompts, {length}], where the number of "
                f"prompts divides {rows} rows, but got {tuple(mask.shape)}."
            )
        prompts = input_ids[:: rows // mask.shape[0], : mask.shape[1]]
        self._prompts = prompts if self._prompts is None else self._prompts
        if not torch.equal(prompts.repeat_interleave(rows // mask.shape[0], 0), input_ids[:, : mask.shape[1]]):
            raise ValueError(
                f"Expected `attention_mask` to have a row for each prompt, but got {mask.shape[0]} for {rows} rows of "
                "different prompts. Pass the mask that `generate` is given."
            )
        if not mask[:, -1].all():
            raise ValueError(
                "Expected `attention_mask` to belong to prompts that are padded on the left, but got a row that ends "
                'in 0. Set `tokenizer.padding_side = "left"`.'
            )
        if not torch.equal(prompts, self._prompts):
            raise ValueError(
                "Expected the prompts that `attention_mask` belongs to, but got others. Make a new processor for each "
                "batch of padded prompts."
            )
        mask = mask.to(input_ids).repeat_interleave(rows // mask.shape[0], 0)
        return torch.cat([mask, torch.ones_like(input_ids[:, mask.shape[1] :])], 1)

    def _look_for_padding(self, input_ids: Tensor) -> None:
        padding = getattr(getattr(self._model, "config", None), "pad_token_id", None)
        padded = input_ids[:, 0] == padding if padding is not None else torch.zeros(1, dtype=torch.bool)
        if padded.any() and not padded.all():
            raise ValueError(
                "Expected `attention_mask` to be the mask of prompts that are padded on the left, but got None, and "
                f"row {int(padded.nonzero()[0])} begins with the padding token {padding}."
            )


def _checked_mask(attention_mask: Tensor) -> Tensor:
    """[prompts, T]."""
    expected = "Expected `attention_mask` to be zeros and ones of shape [prompts, T], but got"
    try:
        mask = torch.as_tensor(attention_mask)
    except (ValueError, TypeError, RuntimeError):
        raise TypeError(f"{expected} {type(attention_mask).__name__}.") from None
    if mask.dim() != 2 or not ((mask == 0) | (mask == 1)).all():
        raise ValueError(f"{expected} {mask.dtype} {tuple(mask.shape)}.")
    return mask


def _normalised(scores: Tensor, processed: Tensor) -> Tensor:
    """[B, V] log-probabilities in proportion to exp(processed), 0 where `scores` are -inf."""
    logprobs = processed.masked_fill(scores == -torch.inf, -torch.inf).log_softmax(-1)
    if logprobs.isnan().any():
        raise ValueError(
            "Expected both models to return finite logits, or -inf from the second only where the first's are too, but "
            f"got logits that make no distribution in row {int(logprobs.isnan().any(-1).nonzero()[0])}."
        )
    return logprobs


class DIDLogitsProcessor(_SecondModelProcessor):
    """`policy.generate` with it draws every token from the token DID, softmax(policy_logits - reference_logits).

    It works with sampling, greedy and beam search, with one prompt or a batch. The product of token DIDs is not the DID
    of whole completions: to draw from that DID and to estimate its entropy, use `lit_did.sampling.sample_did`.

    `generate`'s `temperature` divides both logits, as in `lit_did.token_statistics`. Options that truncate or change
    scores apply to the DID: by default transformers keeps the 50 likeliest tokens, and a checkpoint's
    `generation_config` may set `top_p` and others, so pass `top_k=0, top_p=1.0` to draw from all tokens. Tokens that
    other processors exclude (-inf) stay excluded.

    Args:
        policy: The causal language model whose `generate` this processor is passed to.
        reference: A causal language model with the policy's vocabulary. It reads along with its own cache. None: the
            policy is a PeftModel, and its reference is itself without its adapter. Make a new processor after either
            model has changed.
        attention_mask: [prompts, T] zeros and ones, the mask that `generate` is given. Prompts that are padded on the
            left need it, and the processor then works for these prompts only. A missing mask is noticed only where the
            reference's `config` has a `pad_token_id`.

    Raises:
        TypeError: A model is no causal language model.
        ValueError: `reference` is None and `policy` is no PeftModel, or the two share parameters or have different
            vocabularies. In `generate`: the mask is missing or belongs to other prompts, or the reference excludes
            (-inf) a token that the policy does not.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from lit_did.sampling import DIDLogitsProcessor
        >>> config = LlamaConfig(vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        ...                      num_attention_heads=1, pad_token_id=0, eos_token_id=None)
        >>> policy, reference = LlamaForCausalLM(config), LlamaForCausalLM(config)
        >>> draws = policy.generate(torch.tensor([[1, 2]]), do_sample=True, top_k=0, max_new_tokens=3,
        ...                         logits_processor=[DIDLogitsProcessor(policy, reference)])
        >>> draws.shape
        torch.Size([1, 5])
    """

    def __init__(
        self, policy: nn.Module, reference: nn.Module | None = None, *, attention_mask: Tensor | None = None
    ) -> None:
        model, without_adapter = second_model(policy, reference)
        super().__init__(
            model,
            attention_mask,
            without_adapter=without_adapter,
            advice="So every token is equally likely in their token DID. Before training this is right. After "
            "training, check that the model that generates is the trained policy.",
        )

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The token DID's log-probabilities.

        Args:
            input_ids: [B, t] int64, all tokens so far.
            scores: [B, V] the policy's logits.

        Returns:
            [B, V] log-probabilities.
        """
        scores = unmasked(scores)
        return _normalised(scores, scores - self.second_logits(input_ids, scores))


class TargetLogitsProcessor(_SecondModelProcessor):
    """`reference.generate` with it draws every token from softmax(r + (r - l) / beta), before any training.

    r are the reference's logits and l the logits of a model of the rejected completions. Where chosen completions come
    from the reference rho and rejected ones from pi_l, DPO ends at the policy pi* proportional to
    rho (rho / pi_l)^(1/beta) over whole completions (arXiv 2505.23761, the power law).

    **This processor does not draw from pi*.** It normalises after every prefix, and pi* is normalised only once, over
    whole completions. The two are equal for completions of one token and differ for longer ones. On random bigram
    models of 5 tokens with beta 0.5, the KL divergence of the draws from pi* is 0.15 nats for completions of up to 3
    tokens and 0.6 nats for up to 6 (`lit-did experiment target`; `lit-did docs theory` has the table). Use the
    draws as an approximation of pi*.

    Args:
        rejected: A causal language model of the rejected completions with the reference's vocabulary. It reads along
            with its own cache. It must share no parameters with the model that generates: peft changes a base model in
            place, so load a LoRA model's reference separately.
        beta: DPO's inverse temperature, above 0. The smaller it is, the farther the target is from the reference.
        attention_mask: [prompts, T] zeros and ones, the mask that `generate` is given. Prompts that are padded on the
            left need it, and the processor then works for these prompts only. A missing mask is noticed only where the
            `config` of `rejected` has a `pad_token_id`.

    Raises:
        TypeError: `rejected` is no causal language model, or `beta` is no number.
        ValueError: `beta` is not above 0. In `generate`: the vocabularies differ, the mask is missing or belongs to
            other prompts, or `rejected` excludes (-inf) a token that the reference does not.

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

    def __init__(self, rejected: nn.Module, *, beta: float, attention_mask: Tensor | None = None) -> None:
        super().__init__(
            rejected,
            attention_mask,
            advice="So the target is the reference itself. If you passed two different models, one of them was "
            "changed: peft puts the adapter of a PeftModel into its base model in place. Then load the reference "
            "separately.",
        )
        check_beta(beta)
        self._beta = beta

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The log-probabilities of softmax(r + (r - l) / beta).

        Args:
            input_ids: [B, t] int64, all tokens so far.
            scores: [B, V] the reference's logits r.

        Returns:
            [B, V] log-probabilities.
        """
        scores = unmasked(scores)
        return _normalised(scores, scores + (scores - self.second_logits(input_ids, scores)) / self._beta)
