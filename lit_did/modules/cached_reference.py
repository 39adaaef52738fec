"""The reference of a training run from disk: what it says of all pairs, found out once."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping
from itertools import chain, islice

import lightning
import numpy as np
import torch
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from tqdm.auto import tqdm

from lit_did.batches import IGNORE_INDEX
from lit_did.batches.sequences import Sequences
from lit_did.models import forward
from lit_did.models.reference_cache import CacheWriter, ReferenceCache, fingerprint, sequence_keys
from lit_did.models.unfinished import remove_unfinished

PAIRS_AT_ONCE = 8  # where the loader does not say


class CachedReference:
    """A reference of which the last hidden states at completion tokens are on disk, and the output layer in memory."""

    def __init__(self, cache: ReferenceCache, model: nn.Module, precision: str) -> None:
        self.cache, self.precision = cache, precision
        self._model = model

    def keep_output_layer(self, reference: nn.Module) -> nn.Module:
        """A module with nothing but the output layer of `reference`, which can then be let go."""
        if isinstance(reference, _OutputLayer):
            return reference
        self._model = _OutputLayer(forward.output_layer(reference))
        return self._model

    def outputs(self, sequences: Sequences, device: torch.device) -> forward.Outputs:
        """What the reference says of these sequences.

        Raises:
            ValueError: They are not in the cache.
        """
        hidden = self.cache.hidden(_keys(sequences), device=device)
        model = self._model
        layer = model.layer() if isinstance(model, _OutputLayer) else forward.output_layer(model)
        return forward.Outputs(hidden, layer, None).detach()


class _OutputLayer(nn.Module):
    def __init__(self, layer: forward.OutputLayer) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self._of = layer.scale, layer.softcap

    def layer(self) -> forward.OutputLayer:
        return forward.OutputLayer(self.weight, self.bias, *self._of)


def cached_reference(
    path: str,
    trainer: lightning.Trainer,
    model: nn.Module,
    read: Callable[[Mapping[str, Tensor]], Sequences],
    outputs: Callable[[Sequences], forward.Outputs],
    opened: CachedReference | None,
) -> CachedReference:
    """The cache in `path` of all training and validation pairs of `trainer`: the one there, or a new one.

    Args:
        model: The reference; of a LoRA policy the policy.
        read: The sequences of a batch.
        outputs: What the reference says of sequences.
        opened: The cache that an earlier run has left open.

    Raises:
        TypeError: Data that cannot be gone through beforehand.
        ValueError: What is in `path` is damaged, or of another reference or other pairs; the reference's logits are no
            linear layer's of last hidden states.
    """
    rank, world = trainer.global_rank, trainer.world_size
    batches = [_num_tokens(sequences) for sequences in _pairs(trainer, read)]
    keys = set(chain.from_iterable(batches))
    if opened is not None and keys <= opened.cache.keys() and opened.precision == trainer.precision:
        return opened
    if isinstance(model, _OutputLayer):
        raise ValueError(
            f"Expected the training data and precision ({opened.precision}) of the cache in {path}, whose reference's "
            f"layers have been freed, but got {len(keys - opened.cache.keys())} other sequences and precision "
            f"{trainer.precision}: make another LitDPO for them.{_date_hint(trainer)}"
        )
    mark = {**fingerprint(model, keys), "precision": trainer.precision}
    shards = min(world, len(batches))  # a shard holds a sequence at least
    if rank == 0:
        remove_unfinished(path)
    if not trainer.strategy.broadcast(ReferenceCache.exists(path)):
        if rank < shards:
            num_tokens = sum(ChainMap(*batches[rank::shards]).values())  # of every sequence once
            file = CacheWriter(path, shard=rank, shards=shards, num_tokens=num_tokens)
            with file as writer, trainer.precision_plugin.forward_context():
                own = islice(_pairs(trainer, read), rank, None, shards)
                quiet = rank > 0 or trainer.progress_bar_callback is None
                total = len(range(rank, len(batches), shards))
                for sequences in tqdm(own, desc="Reference", total=total, unit="batch", leave=False, disable=quiet):
                    hidden = outputs(sequences).hidden
                    if hidden is None:
                        raise ValueError(
                            "Expected a reference that exposes last hidden states followed by a plain nn.Linear with "
                            f"`cache_reference`, but got {type(model).__name__}."
                        )
                    writer.add(_keys(sequences), hidden.detach(), _cu_labels(sequences))
                writer.finish(mark)
        trainer.strategy.barrier()
    return CachedReference(ReferenceCache.open(path, mark, keys, _date_hint(trainer)), model, trainer.precision)


def _date_hint(trainer: lightning.Trainer) -> str:
    """A sentence for the errors of other data, if the data module's chat template writes today's date into prompts."""
    data = getattr(trainer, "datamodule", None)
    given = getattr(data, "chat_template", None) or getattr(getattr(data, "tokenizer", None), "chat_template", None)
    template = " ".join(given.values()) if isinstance(given, Mapping) else str(given)
    if "strftime_now" not in template or "date_string" in (getattr(data, "chat_template_kwargs", None) or {}):
        return ""
    takes_date = "date_string" in template
    fixed = (
        '`chat_template_kwargs={"date_string": "01 Jan 2026"}`' if takes_date else "a `chat_template` with a fixed date"
    )
    return (
        " A likely cause: the chat template writes today's date into every prompt (`strftime_now`), so the pairs of "
        f"another day are other data. Pass the data module {fixed} instead, and keep it for all runs."
    )


def _pairs(trainer: lightning.Trainer, read: Callable[[Mapping[str, Tensor]], Sequences]) -> Iterator[Sequences]:
    """All training and validation pairs, in order, each once, whatever the loaders' samplers leave out or repeat."""
    if trainer.enable_validation:
        trainer.fit_loop.epoch_loop.val_loop.setup_data()  # later, Lightning would do it itself
    for given in (trainer.train_dataloader, trainer.val_dataloaders):
        nothing = given is None or (isinstance(given, list) and not given)  # a loader's truth would be its length
        for loader in [] if nothing else CombinedLoader(given).flattened:
            dataset = loader.dataset if isinstance(loader, DataLoader) else None
            if dataset is None or isinstance(dataset, IterableDataset):
                raise TypeError(
                    "Expected DataLoaders with a dataset of a known length with `cache_reference`, but got "
                    f"{type(loader if dataset is None else dataset).__name__}."
                )
            if loader.batch_sampler is None:  # what the dataset holds are batches
                examples = (dataset[index] for index in range(len(dataset)))
            else:
                size = loader.batch_size or PAIRS_AT_ONCE
                starts = range(0, len(dataset), size)
                examples = ([dataset[i] for i in range(s, min(s + size, len(dataset)))] for s in starts)
            yield from (read(loader.collate_fn(example)) for example in examples)


def _num_tokens(sequences: Sequences) -> dict[bytes, int]:
    """Completion tokens by key."""
    return dict(zip(_keys(sequences), _cu_labels(sequences).diff().tolist(), strict=True))


def _keys(sequences: Sequences) -> list[bytes]:
    if not sequences.positions_count_from_zero:
        raise ValueError(
            "Expected `position_ids` to count from 0 in every sequence with `cache_reference`, but got others."
        )
    arrays = (sequences.input_ids, sequences.labels, sequences.cu_seqlens)
    return sequence_keys(*map(torch.from_numpy, arrays))


def _cu_labels(sequences: Sequences) -> Tensor:
    """[sequences + 1]: where each sequence's completion tokens begin and end."""
    labelled = np.concatenate([[0], (sequences.labels != IGNORE_INDEX).cumsum()])
    return torch.from_numpy(labelled[sequences.cu_seqlens])
