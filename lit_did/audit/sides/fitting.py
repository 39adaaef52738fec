"""The side models: small adapters fitted to the chosen and to the rejected completions, and scores of pairs by models.

Cross-fitting: pairs are split into folds by prompt. The adapters of a fold are fitted to the pairs of the other folds.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import lightning
import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from lit_did.audit.reference.measuring import statistics_of, sums_of
from lit_did.batches.checks import checked_sequences
from lit_did.batches.sequences import Sequences
from lit_did.data.collating import collate_packed
from lit_did.data.dataset import Example
from lit_did.models import PolicyAndReference
from lit_did.models.forward import num_embeddings, num_positions
from lit_did.models.quiet import evaluating, lightning_quiet, random_numbers_kept
from lit_did.models.trial import layout_of, outputs_of, share_trials
from lit_did.models.wrappers import unwrapped
from lit_did.modules.sft import LitSFT, Side
from lit_did.ops import SequenceStatistics

FOLDS = 2
LORA = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
LEARNING_RATE = 1e-3
EPOCHS = 1
_HINTS = (
    *(
        "does not have many workers",
        "in eval mode",
        "have no `val_dataloader`",
        "is_gradient_checkpointing",
        "LeafSpec",
    ),
    "lower value for log_every_n_steps",
)
SIDES: tuple[Side, Side] = ("chosen", "rejected")


class SideModels(NamedTuple):
    """The two models of a fold, which were not fitted to its pairs."""

    chosen: nn.Module
    rejected: nn.Module


def folds_of(groups: np.ndarray, seed: int) -> np.ndarray:
    """[pairs] the fold of each pair, the same for all pairs of a prompt.

    Args:
        groups: [pairs] the number of each pair's prompt.
        seed: Of the split.
    """
    distinct, numbers = np.unique(groups, return_inverse=True)
    return (np.random.default_rng(seed).permutation(len(distinct)) % FOLDS)[numbers]


def fit_side_models(
    base: nn.Module, examples: Sequence[Example], folds: np.ndarray, *, batch_size: int, seed: int, progress: bool
) -> list[SideModels]:
    """The side models of each fold, in eval mode. They share the weights of `base`, which stays as it is.

    Args:
        base: The model to start from, without an adapter.
        examples: The pairs.
        folds: [pairs] their folds.
        batch_size: Pairs a training step.
        seed: Of the adapters' first weights and of the order of the pairs.
        progress: Whether a terminal shows a progress bar.
    """
    # A trial of the longest batch says how all batches may be laid out, for all four models.
    longest = sorted(examples, key=_num_tokens)[-batch_size:]
    models: list[dict[str, nn.Module]] = [{} for _ in range(FOLDS)]
    first: nn.Module | None = None
    with tqdm(total=FOLDS * len(SIDES), desc="Side models", disable=None if progress else True) as bar:
        for fold in range(FOLDS):
            others = [example for example, own in zip(examples, folds, strict=True) if own != fold]
            for side in SIDES:
                module = _side_module(twin(base), side, seed)
                assert module.policy is not None
                if first is None:
                    first = module.policy
                    layout_of(first, _sequences(first, longest))
                else:
                    share_trials(first, module.policy)
                models[fold][side] = _fit(module, others, batch_size, seed)
                bar.update()
    return [SideModels(**fold) for fold in models]


def _num_tokens(example: Example) -> int:
    return len(example.prompt_ids) + max(len(example.chosen_ids), len(example.rejected_ids))


def _sequences(model: nn.Module, examples: Sequence[Example]) -> Sequences:
    return checked_sequences(
        collate_packed(examples), num_embeddings=num_embeddings(model), num_positions=num_positions(model)
    )


def base_of(reference: nn.Module | None, policy: nn.Module | None) -> nn.Module:
    """The model that the side models start from: the reference, or else the policy without its adapter."""
    if reference is None:
        own: Any = twin(unwrapped(policy))  # type: ignore[arg-type]  # one of the two is there
        return own.unload()
    return unwrapped(reference)


def twin(model: nn.Module) -> nn.Module:
    """A copy with modules, modes, configuration and adapters of its own, whose weights share the model's memory."""
    tensors = (*model.parameters(), *model.buffers())
    plain = [t for t in tensors if type(t) in (nn.Parameter, torch.Tensor)]  # a quantised weight is a class of its own
    shared = {
        id(t): nn.Parameter(t.detach(), requires_grad=False) if isinstance(t, nn.Parameter) else t.detach()
        for t in plain
    }
    return copy.deepcopy(model, shared)


class _Staying(LitSFT):
    """`LitSFT` that stays on its device: Lightning would move it to the CPU after training, which copies the weights
    that it shares with the base."""

    def cpu(self) -> _Staying:
        return self


def _side_module(start: nn.Module, side: Side, seed: int) -> _Staying:
    with random_numbers_kept(next(start.parameters()).device):
        torch.manual_seed(seed)
        return _Staying(start, side=side, lora=LORA, learning_rate=LEARNING_RATE, warmup_steps=0.1, schedule="linear")


def _fit(module: _Staying, examples: list[Example], batch_size: int, seed: int) -> nn.Module:
    assert module.policy is not None
    device = next(module.policy.parameters()).device
    with random_numbers_kept(device), _quiet():
        torch.manual_seed(seed)
        order = torch.Generator().manual_seed(seed)
        loader: DataLoader = DataLoader(
            examples,  # type: ignore[arg-type]  # a list is a dataset
            batch_size=batch_size,
            shuffle=True,
            generator=order,
            collate_fn=collate_packed,
        )
        trainer = lightning.Trainer(
            accelerator="gpu" if device.type == "cuda" else device.type,
            devices=1 if device.index is None else [device.index],
            max_epochs=EPOCHS,
            gradient_clip_val=1.0,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
        )
        trainer.fit(module, loader)
    return module.policy.eval()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Lightning's hints, which a reader of an audit cannot act on."""
    with lightning_quiet(logging.WARNING), warnings.catch_warnings():
        for message in _HINTS:
            warnings.filterwarnings("ignore", message=f".*{message}")
        yield


def score(
    policy: nn.Module, reference: nn.Module | None, examples: Sequence[Example], batch_size: int
) -> SequenceStatistics:
    """The statistics [pairs, 2] of chosen and rejected completions, on the CPU.

    Args:
        policy: A causal language model.
        reference: The model that it is compared with, perhaps itself. None: a PeftModel without its adapter.
        examples: The pairs.
        batch_size: Pairs a forward pass.
    """
    models = PolicyAndReference(policy, reference, freeze=False)
    parts = []
    for start in range(0, len(examples), batch_size):
        measured = models.measure(_sequences(policy, examples[start : start + batch_size]))
        parts.append([torch.stack(value.double().cpu().chunk(2), 1) for value in measured])
    return SequenceStatistics(*map(torch.cat, zip(*parts, strict=True)))


def held_out_scores(
    models: Sequence[SideModels], examples: Sequence[Example], folds: np.ndarray, batch_size: int, first: int
) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities [2, pairs, 2] by the side models that were not fitted to a pair: whole, and first tokens only.

    First axis: the chosen side's model, the rejected side's. Last axis: the chosen completion, the rejected one.

    Args:
        models: Of each fold.
        examples: The pairs.
        folds: [pairs] their folds.
        batch_size: Pairs a forward pass.
        first: How many tokens of a completion the second result covers.
    """
    whole, cut = np.full((2, len(examples), 2), np.nan), np.full((2, len(examples), 2), np.nan)
    for fold, pair_of_models in enumerate(models):
        rows = np.flatnonzero(folds == fold)
        for number, model in enumerate(pair_of_models):
            for start in range(0, len(rows), batch_size):
                places = rows[start : start + batch_size]
                found = _logprobs(model, [examples[place] for place in places], first)
                whole[number, places], cut[number, places] = found
    return whole, cut


def _logprobs(model: nn.Module, examples: list[Example], first: int) -> tuple[np.ndarray, np.ndarray]:
    """[pairs, 2] log-probabilities of both completions, and of their first tokens, in one pass."""
    sequences = _sequences(model, examples)
    with random_numbers_kept(next(model.parameters()).device), evaluating(model):
        layout = layout_of(model, sequences)
        values = statistics_of(outputs_of(model, layout), layout.labels).policy_logprob
    counts = layout.cu_labels.diff()
    place = torch.arange(len(values), device=values.device) - layout.cu_labels[:-1].repeat_interleave(counts)
    summed = (sums_of(kept, layout.cu_labels) for kept in (values, values * (place < first)))
    whole, cut = (torch.stack(sums.chunk(2), 1).cpu().numpy() for sums in summed)
    return whole, cut
