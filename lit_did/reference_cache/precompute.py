"""A training run's reference cache: opened, or written first by running the reference once over all pairs."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import lightning
import numpy as np
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from tqdm.auto import tqdm

from lit_did.batches.moving import to_device
from lit_did.batches.sequences import Sequences
from lit_did.data.collating import collate_packed, collate_pairs
from lit_did.data.dataset import PreferenceDataset
from lit_did.models import forward
from lit_did.models.sharding import TENSOR, is_sharded
from lit_did.reference_cache.fingerprint import fingerprint, sequence_keys
from lit_did.reference_cache.storage import CacheWriter, ReferenceCache, publish, split_keys, unfinished_cache
from lit_did.writing import whole_file

CacheKind = Literal["hidden_states", "logprobs"]
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
        hidden = self.cache.rows(sequence_keys(sequences), device=device)
        model = self._model
        layer = model.layer() if isinstance(model, _OutputLayer) else forward.output_layer(model)
        return forward.Outputs(hidden, layer, None).detach()


class CachedLogprobs:
    """A reference whose log-probabilities of completions are on disk.

    Args:
        cache: A log-probability for each sequence.
        precision: The trainer's precision at which the cache was computed.
    """

    def __init__(self, cache: ReferenceCache, precision: str) -> None:
        self.cache, self.precision = cache, precision

    def logprobs(self, sequences: Sequences, device: torch.device) -> Tensor:
        """Returns log rho(y) of every completion, [sequences] float64.

        Args:
            sequences: Sequences of the cached pairs.
            device: The device of the result.

        Raises:
            ValueError: A sequence is not in the cache.
        """
        return to_device(self.cache.rows(sequence_keys(sequences))[:, 0], device)


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
    model: nn.Module | None,
    read: Callable[[Mapping[str, Tensor]], Sequences],
    outputs: Callable[[Sequences], forward.Outputs],
    opened: CachedReference | CachedLogprobs | None,
    *,
    logprobs: Callable[[Sequences], Tensor] | None = None,
    adapter: str | None = None,
    files: Callable[[Path], str | None] | None = None,
) -> CachedReference | CachedLogprobs:
    """Opens the cache of all training and validation pairs of a run, and writes it first if the folder holds none.

    Each process runs the reference over its share of the pairs. If one process raises, all do.

    Args:
        path: The folder, which all processes share.
        trainer: The trainer, whose dataloaders are set up.
        model: The reference. The policy, if the reference is the policy without its adapter or with another one. None:
            the reference is not in memory, because a cache makes it unnecessary.
        read: Returns the sequences of a batch.
        outputs: Runs the reference on sequences.
        opened: The cache that an earlier run of this module opened.
        logprobs: Returns the reference's log-probabilities [sequences], of which the cache is made. None: it is made of
            the hidden states of `outputs`.
        adapter: The name of the policy's adapter that is the reference. None: no adapter is.
        files: Returns the digest of the files that the reference was loaded from, given a folder for digests. None:
            the reference was not loaded from files.

    Returns:
        The opened cache.

    Raises:
        TypeError: A dataloader's dataset has no known length.
        ValueError: The cache is damaged, of another kind, or belongs to another reference, other pairs or another
            precision. Or a sharded reference was not loaded from files. Or the reference does not expose last hidden
            states followed by a linear layer, and the cache is made of these.
    """
    keys = _keys(trainer, read, Path(path) / ".keys")
    if opened is not None:
        others = len(keys - opened.cache.keys())
        if not others and opened.precision == trainer.precision:
            return opened
        if model is None or isinstance(model, _OutputLayer):
            raise ValueError(
                f"Expected the pairs and the precision ({opened.precision}) of the cache {path}, because the "
                f"reference's layers were freed, but got {others} other sequences and precision {trainer.precision}. "
                f"Make a new LitDPO for them.{_date_hint(trainer)}"
            )
    of_files = files_digest_of_all(trainer, files, path)
    if of_files is None and (model is None or is_sharded(model)):
        raise ValueError(
            "Expected a reference that is given by the name of a whole model with `cache_reference` and sharded "
            "models, because the cache is known by the model's files, but got another one. Pass the name of a model, "
            "or leave `cache_reference` out."
        )
    assert of_files is not None or model is not None
    kind: CacheKind = "hidden_states" if logprobs is None else "logprobs"
    digests = fingerprint(model, keys, adapter, of_files)
    mark = {**digests, "precision": trainer.precision, "kind": kind}
    if not trainer.strategy.broadcast(ReferenceCache.exists(path)) and model is not None:

        def answers(sequences: Sequences) -> tuple[Tensor, np.ndarray]:
            if logprobs is not None:
                return logprobs(sequences).double()[:, None], np.arange(sequences.num_sequences + 1)
            hidden = outputs(sequences).hidden
            if hidden is None:
                raise ValueError(
                    "Expected a reference that exposes last hidden states followed by a plain nn.Linear with "
                    f'`cache_reference`, but got {type(model).__name__}. `cache_kind="logprobs"` needs no hidden '
                    "states."
                )
            return hidden, sequences.cu_labels

        _write(path, trainer, read, answers, mark, kind, in_step=is_sharded(model))
    with _all_or_none(trainer):
        cache = ReferenceCache.open(path, mark, keys, _date_hint(trainer))
    if kind == "logprobs":
        return CachedLogprobs(cache, trainer.precision)
    assert model is not None
    return CachedReference(cache, model, trainer.precision)


def files_digest_of_all(
    trainer: lightning.Trainer, files: Callable[[Path], str | None] | None, path: str
) -> str | None:
    """The digest of the files of a reference, which one process reads. None: it was not loaded from files."""
    if files is None:
        return None
    with _all_or_none(trainer):
        digest = files(Path(path) / ".digests") if trainer.global_rank == 0 else None
    return trainer.strategy.broadcast(digest)


def _write(
    path: str,
    trainer: lightning.Trainer,
    read: Callable[[Mapping[str, Tensor]], Sequences],
    answers: Callable[[Sequences], tuple[Tensor, np.ndarray]],
    mark: Mapping[str, str],
    kind: CacheKind,
    *,
    in_step: bool,
) -> None:
    """Runs the reference over all pairs, and publishes what it answers.

    Args:
        path: The folder.
        trainer: The trainer.
        read: Returns the sequences of a batch.
        answers: Returns what the cache keeps of sequences: rows, and the bounds of each sequence's rows.
        mark: The fingerprint.
        kind: What the rows are.
        in_step: Whether all processes have to run the reference equally often, because it is sharded.
    """
    shares, share, writes = _share(trainer)
    batches = [batch for loader in _loaders(trainer) for batch in _batches(loader)]
    own = batches[share::shares]
    with ExitStack() as stack:
        with _all_or_none(trainer):
            folder = stack.enter_context(unfinished_cache(path)) if trainer.global_rank == 0 else Path()
        folder = trainer.strategy.broadcast(folder)
        with _all_or_none(trainer), trainer.precision_plugin.forward_context():
            num_rows = None  # log-probabilities are few
            if kind == "hidden_states":
                read_once = (batch.sequences(read) for batch in own)
                lengths = [dict(zip(sequence_keys(s), np.diff(s.cu_labels), strict=True)) for s in read_once]
                num_rows = int(sum(ChainMap(*lengths).values()))
            writer = CacheWriter(folder, process=share, num_rows=num_rows)
            for batch in tqdm(
                own,
                desc="Reference",
                unit="batch",
                leave=False,
                disable=trainer.global_rank > 0 or trainer.progress_bar_callback is None,
            ):
                sequences = batch.sequences(read)
                writer.add(sequence_keys(sequences), *answers(sequences))
            if in_step and len(own) < -(-len(batches) // shares):  # the other processes need this one once more
                answers(batches[0].sequences(read))
            if writes:
                writer.finish()
        with _all_or_none(trainer):
            if trainer.global_rank == 0:
                publish(folder, mark, shares)


def _share(trainer: lightning.Trainer) -> tuple[int, int, bool]:
    """The number of shares of the pairs, this process's, and whether it is the first process with this share.

    Processes that have a model together by tensor parallelism have one share.
    """
    given = trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
    strategy = trainer.strategy
    first = not isinstance(strategy, ModelParallelStrategy) or strategy.device_mesh[TENSOR].get_local_rank() == 0
    return given["num_replicas"], given["rank"], first


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


def _keys(trainer: lightning.Trainer, read: Callable[[Mapping[str, Tensor]], Sequences], kept: Path) -> set[bytes]:
    """The keys of the sequences of all training and validation pairs.

    Every process has to read all pairs for them. So they are kept if the tokens are in a folder of `cache_tokens`.

    Args:
        trainer: The trainer.
        read: Returns the sequences of a batch.
        kept: The folder for keys.
    """
    keys: set[bytes] = set()
    for loader in _loaders(trainer):
        file = _kept_keys(loader, kept)
        if file is not None and file.exists():
            keys |= split_keys(file.read_bytes())
            continue
        own = {key for batch in _batches(loader) for key in sequence_keys(batch.sequences(read))}
        if file is not None and trainer.global_rank == 0:
            kept.mkdir(parents=True, exist_ok=True)
            with whole_file(file) as unfinished:
                unfinished.write_bytes(b"".join(own))
        keys |= own
    return keys


def _kept_keys(loader: DataLoader, kept: Path) -> Path | None:
    """The file for the keys of a loader's sequences. None: its tokens have no name."""
    dataset, collate = loader.dataset, loader.collate_fn
    plain = getattr(collate, "func", collate) in (collate_packed, collate_pairs)  # which make the same sequences
    return kept / dataset.name if isinstance(dataset, PreferenceDataset) and dataset.name and plain else None


def _loaders(trainer: lightning.Trainer) -> list[DataLoader]:
    """The dataloaders of training and validation.

    Raises:
        TypeError: The dataset of one has no known length.
    """
    if trainer.enable_validation:
        trainer.fit_loop.epoch_loop.val_loop.setup_data()  # Lightning would do it later
    found: list[DataLoader] = []
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
            found.append(loader)
    return found


class _Batch(NamedTuple):
    """Some pairs of a loader's dataset, which are read when they are needed."""

    loader: DataLoader
    positions: range | int

    def sequences(self, read: Callable[[Mapping[str, Tensor]], Sequences]) -> Sequences:
        """The sequences of the pairs."""
        dataset: Any = self.loader.dataset
        if isinstance(self.positions, int):
            examples = dataset[self.positions]
        else:
            examples = [dataset[position] for position in self.positions]
        return read(self.loader.collate_fn(examples))


def _batches(loader: DataLoader) -> Iterator[_Batch]:
    """All pairs of a loader in order and once, even those that its sampler leaves out or repeats."""
    dataset: Any = loader.dataset
    if loader.batch_sampler is None:  # the dataset holds batches
        yield from (_Batch(loader, number) for number in range(len(dataset)))
    else:
        size = loader.batch_size or PAIRS_AT_ONCE
        yield from (_Batch(loader, range(s, min(s + size, len(dataset)))) for s in range(0, len(dataset), size))
