"""A training run's reference cache: opened, or written first by running the reference once over all pairs."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from tqdm.auto import tqdm

from lit_did.batches.sequences import Sequences
from lit_did.models import forward
from lit_did.reference_cache.fingerprint import fingerprint, sequence_keys
from lit_did.reference_cache.storage import CacheWriter, ReferenceCache, publish, unfinished_cache

PAIRS_AT_ONCE = 8  # if the dataloader has no batch size


class CachedReference:
    """A reference whose last hidden states at completion tokens are on disk and whose output layer is in memory.

    Args:
        cache: The hidden states.
        model: The reference, or the policy whose reference is itself without its adapter.
        precision: The trainer's precision at which the cache was computed.
    """

    def __init__(self, cache: ReferenceCache, model: nn.Module, precision: str) -> None:
        self.cache, self.precision = cache, precision
        self._model = model

    def keep_output_layer(self, reference: nn.Module) -> nn.Module:
        """Returns a module with nothing but the output layer of `reference`, so that its other layers can be freed."""
        if not isinstance(reference, _OutputLayer):
            self._model = reference = _OutputLayer(forward.output_layer(reference))
        return reference

    def outputs(self, sequences: Sequences, device: torch.device) -> forward.Outputs:
        """Returns what the reference computes for these sequences.

        Args:
            sequences: Sequences of the cached pairs.
            device: The device of the hidden states that are returned.

        Raises:
            ValueError: A sequence is not in the cache.
        """
        hidden = self.cache.hidden(sequence_keys(sequences), device=device)
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
    *,
    adapter: str | None = None,
    files: Callable[[Path], str | None] | None = None,
) -> CachedReference:
    """Opens the cache of all training and validation pairs of a run, and writes it first if the folder holds none.

    Each process runs the reference over its share of the pairs. If one process raises, all do.

    Args:
        path: The folder, which all processes share.
        trainer: The trainer, whose dataloaders are set up.
        model: The reference. The policy, if the reference is the policy without its adapter or with another one.
        read: Returns the sequences of a batch.
        outputs: Runs the reference on sequences.
        opened: The cache that an earlier run of this module opened.
        adapter: The name of the policy's adapter that is the reference. None: no adapter is.
        files: Returns the digest of the files that the reference was loaded from, given a folder for digests. None:
            the reference was not loaded from files.

    Returns:
        The opened cache.

    Raises:
        TypeError: A dataloader's dataset has no known length.
        ValueError: The cache is damaged, or belongs to another reference, other pairs or another precision. Or the
            reference does not expose last hidden states followed by a linear layer.
    """
    num_tokens = [dict(zip(sequence_keys(s), np.diff(s.cu_labels), strict=True)) for s in _pairs(trainer, read)]
    keys = set(chain.from_iterable(num_tokens))
    if opened is not None:
        others = len(keys - opened.cache.keys())
        if not others and opened.precision == trainer.precision:
            return opened
        if isinstance(model, _OutputLayer):
            raise ValueError(
                f"Expected the pairs and the precision ({opened.precision}) of the cache {path}, because the "
                f"reference's layers were freed, but got {others} other sequences and precision {trainer.precision}. "
                f"Make a new LitDPO for them.{_date_hint(trainer)}"
            )
    rank, world = trainer.global_rank, trainer.world_size
    of_files = None
    if files is not None:  # read by one process
        with _all_or_none(trainer):
            of_files = files(Path(path) / ".digests") if rank == 0 else None
        of_files = trainer.strategy.broadcast(of_files)
    mark = {**fingerprint(model, keys, adapter, of_files), "precision": trainer.precision}
    found = trainer.strategy.broadcast(ReferenceCache.exists(path))
    if not found:
        with ExitStack() as stack:
            with _all_or_none(trainer):
                folder = stack.enter_context(unfinished_cache(path)) if rank == 0 else Path()
            folder = trainer.strategy.broadcast(folder)
            with _all_or_none(trainer), trainer.precision_plugin.forward_context():
                own = num_tokens[rank::world]
                writer = CacheWriter(folder, process=rank, num_tokens=sum(ChainMap(*own).values()))
                quiet = rank > 0 or trainer.progress_bar_callback is None
                for sequences in tqdm(
                    islice(_pairs(trainer, read), rank, None, world),
                    desc="Reference",
                    total=len(own),
                    unit="batch",
                    leave=False,
                    disable=quiet,
                ):
                    hidden = outputs(sequences).hidden
                    if hidden is None:
                        raise ValueError(
                            "Expected a reference that exposes last hidden states followed by a plain nn.Linear with "
                            f"`cache_reference`, but got {type(model).__name__}."
                        )
                    writer.add(sequence_keys(sequences), hidden, sequences.cu_labels)
                writer.finish()
            with _all_or_none(trainer):
                if rank == 0:
                    publish(folder, mark, world)
    with _all_or_none(trainer):
        cache = ReferenceCache.open(path, mark, keys, _date_hint(trainer))
    return CachedReference(cache, model, trainer.precision)


@contextmanager
def _all_or_none(trainer: lightning.Trainer) -> Iterator[None]:
    """Waits for all processes at its end, and raises on all of them if one of them raised."""
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    if not trainer.strategy.reduce_boolean_decision(error is None):
        raise error or RuntimeError("The reference cache failed on another process, whose error names the cause.")


def _date_hint(trainer: lightning.Trainer) -> str:
    """Returns a sentence for errors of other pairs if the chat template writes today's date into prompts."""
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
        " A likely cause: the chat template writes today's date into every prompt (`strftime_now`), so the pairs "
        f"differ from day to day. Pass the data module {fixed}, and keep it for all runs."
    )


def _pairs(trainer: lightning.Trainer, read: Callable[[Mapping[str, Tensor]], Sequences]) -> Iterator[Sequences]:
    """Yields all training and validation pairs in order and once, even those that samplers leave out or repeat."""
    if trainer.enable_validation:
        trainer.fit_loop.epoch_loop.val_loop.setup_data()  # Lightning would do it later
    for given in (trainer.train_dataloader, trainer.val_dataloaders):
        if given is None or (isinstance(given, list) and not given):  # `not given` alone asks for a loader's length
            continue
        for loader in CombinedLoader(given).flattened:
            dataset: Any = loader.dataset if isinstance(loader, DataLoader) else None
            if dataset is None or isinstance(dataset, IterableDataset):
                raise TypeError(
                    "Expected DataLoaders whose dataset has a known length with `cache_reference`, but got "
                    f"{type(loader if dataset is None else dataset).__name__}."
                )
            if loader.batch_sampler is None:  # the dataset holds batches
                examples = (dataset[index] for index in range(len(dataset)))
            else:
                size = loader.batch_size or PAIRS_AT_ONCE
                starts = range(0, len(dataset), size)
                examples = ([dataset[i] for i in range(s, min(s + size, len(dataset)))] for s in starts)
            yield from (read(loader.collate_fn(example)) for example in examples)
