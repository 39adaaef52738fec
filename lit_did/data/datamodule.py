"""`PreferenceDataModule`: from preference pairs in files or memory to batches, on any number of ranks."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from typing import Any

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from lit_did.arguments import check_bools, check_choice, check_integer, check_range
from lit_did.data.chunks import Tokenization
from lit_did.data.collating import collate_packed, collate_pairs
from lit_did.data.dataset import PreferenceDataset
from lit_did.data.describing import data_facts, describe_data
from lit_did.data.loading import EvaluationSampler, NoValidation, ResumableDataLoader, ResumableSampler, replicas
from lit_did.data.mixing import Mixture, MixtureSampler, check_weights, is_mixture
from lit_did.data.policy_tokenizer import name_of_policy_tokenizer
from lit_did.data.preview import print_pairs
from lit_did.data.reading import OnBadRows, SkippedRow, SourceRow, check_columns
from lit_did.data.rendering import check_template_kwargs
from lit_did.data.splits import Splits
from lit_did.data.templates import check_chat_template
from lit_did.data.token_batches import TokenBatchSampler
from lit_did.data.tokenizing import Truncation, check_truncation
from lit_did.models.names import load_tokenizer


class PreferenceDataModule(LightningDataModule):
    """Reads, checks, tokenises and batches preference pairs; `collate_pairs` and `collate_packed` describe a batch.

    The training order depends on `seed` and the epoch only. A run that is resumed from a checkpoint
    (`trainer.fit(..., ckpt_path=...)`) continues with the next batch, even in the middle of an epoch. Evaluation keeps
    the order of the source.

    Args:
        train: Pairs to train on: files, folders, patterns, a name of the Hugging Face hub, a table or a list of dicts.
            `lit-did docs data` says what is read, mapped, skipped and refused. A dict {"a.jsonl": 0.7, "b.jsonl": 0.3}
            mixes sources with weights: the shares of the pairs of an epoch. None if you only evaluate.
        tokenizer: A transformers tokenizer, or the name or path of one, which is loaded on first use. None: the
            tokenizer of the policy that the Trainer runs.
        val: Pairs to validate on.
        val_fraction: Without `val`, the share of the rows of `train` to hold out, in [0, 1). These are always its last
            rows: shuffle files that are sorted by topic. Above 0, at least one row is held out.
        test: Pairs for `trainer.test`.
        predict: Pairs for `trainer.predict`; by default those of validation.
        columns: Names of the sources' columns by field, such as {"prompt": "question"}. None leaves a field out.
        on_bad_rows: "skip" leaves out rows that are well-formed but cannot be trained on, such as an empty answer, with
            one warning a source. "raise" stops at the first. Malformed rows always raise.
        batch_size: Pairs per batch and rank, 8 by default. A batch has two sequences for each pair. With
            `tokens_per_batch`, the most pairs of a batch, by default without limit.
        eval_batch_size: Pairs per batch and rank in validation and prediction, also with `tokens_per_batch`. By
            default `batch_size`, or 8.
        max_length: The most tokens of a prompt and its completion together, at least 2.
        truncation: What loses tokens in longer pairs. "completion": the completions that are too long, and the prompt
            only if a completion would keep less than `min_completion_tokens`. "prompt": the prompt before a completion.
            "drop": the pair is left out.
        min_completion_tokens: The tokens that a completion keeps before the prompt loses some, with
            `truncation="completion"`; by default a quarter of `max_length`.
        chat_template: A Jinja template to use instead of the tokenizer's.
        chat_template_kwargs: Variables for the chat template, such as {"enable_thinking": False}. A row's column
            `chat_template_kwargs` overrides them.
        parse_special_tokens: Whether to read control tokens that the text of rows spells, such as "<|im_end|>", as
            control tokens, for text that a chat template made before. By default they stay text, and a warning counts
            the rows that spell some.
        as_chat: Whether to wrap plain text as messages of user and assistant. HH-RLHF dialogues become their turns.
        tokens_per_batch: The most tokens of a training batch; both prompts and both completions of a pair count. A
            batch then has as many pairs of similar length as fit, the same number on every rank, and all batches lie
            end to end instead of padded; see `collate_packed`. At least 2 * max_length, which one pair may need.
        num_workers: Processes per loader that collate. Tokenising is done before, so 0 is often fastest.
        num_proc: Processes that tokenise.
        cache_tokens: A folder for the tokens, which all processes share. One process tokenises and the others wait;
            all then read batches from its files, and so do later runs with the same sources, tokenizer and options.
            The sources must be files or names of the hub. None: every process tokenises in every run, into its memory.
        shuffle: Whether to reorder the training rows in every epoch.
        drop_last: Whether to leave out the rows that do not fill a last training batch; with `tokens_per_batch`, the
            rows that are left when all ranks get the same number. If False, several ranks repeat the first rows of the
            order until all have the same number.
        seed: Seed of the training order, at least 0.

    Attributes:
        train_dataset: The `PreferenceDataset` of `train`, with counts of dropped, identical and truncated pairs. None
            before `setup` and without `train`.
        val_dataset: As `train_dataset`, for validation.
        test_dataset: As `train_dataset`, for testing.
        predict_dataset: As `train_dataset`, for prediction.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range, or both `val` and `val_fraction` are given. Malformed data raises in
            `setup`; see `read_pairs`.
    """

    def __init__(
        self,
        train: Any,
        tokenizer: Any = None,
        *,
        val: Any = None,
        val_fraction: float = 0.0,
        test: Any = None,
        predict: Any = None,
        columns: Mapping[str, str | None] | None = None,
        on_bad_rows: OnBadRows = "skip",
        batch_size: int | None = None,
        eval_batch_size: int | None = None,
        max_length: int = 1024,
        truncation: Truncation = "completion",
        min_completion_tokens: int | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        parse_special_tokens: bool = False,
        as_chat: bool = False,
        tokens_per_batch: int | None = None,
        num_workers: int = 0,
        num_proc: int = 1,
        cache_tokens: str | os.PathLike | None = None,
        shuffle: bool = True,
        drop_last: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not hasattr(tokenizer, "bos_token_id") and not isinstance(tokenizer, str | os.PathLike | None):
            raise TypeError(
                f"Expected `tokenizer` to be a tokenizer of transformers, its name or path, or None, but got "
                f"{type(tokenizer).__name__}."
            )
        check_chat_template(chat_template)
        check_template_kwargs(chat_template_kwargs)
        check_bools(as_chat=as_chat, parse_special_tokens=parse_special_tokens)
        check_bools(shuffle=shuffle, drop_last=drop_last)
        check_columns(columns)
        check_choice("on_bad_rows", on_bad_rows, OnBadRows)
        if eval_batch_size is None:
            eval_batch_size = 8 if batch_size is None else batch_size
        if batch_size is None and tokens_per_batch is None:
            batch_size = 8
        if batch_size is not None:
            check_integer("batch_size", batch_size, 1)
        check_integer("eval_batch_size", eval_batch_size, 1)
        check_truncation(max_length, truncation, min_completion_tokens)
        if tokens_per_batch is not None:
            check_integer("tokens_per_batch", tokens_per_batch, 2 * max_length, " (2 * max_length, for one pair)")
        check_integer("num_workers", num_workers, 0)
        check_integer("num_proc", num_proc, 1)
        if not isinstance(cache_tokens, str | os.PathLike | None):
            raise TypeError(f"Expected `cache_tokens` to be a folder or None, but got {cache_tokens!r}.")
        check_integer("seed", seed, 0)
        check_range("val_fraction", val_fraction, "[0, 1)")
        if val is not None and val_fraction:
            raise ValueError(f"Expected only one of `val` and `val_fraction`, but got both ({val_fraction=}).")
        if is_mixture(train):
            check_weights("train", train)
            if val_fraction:
                raise ValueError(
                    f"Expected `val` instead of {val_fraction=} with weights of sources, because the last rows are all "
                    "of the last source."
                )
            if not shuffle:
                raise ValueError("Expected `shuffle=True` with weights of sources, which are mixed at random.")
        if val_fraction and train is None:
            raise ValueError(f"Expected `train` for `val_fraction={val_fraction}` to hold rows out of, but got None.")
        self.train, self.val, self.test, self.predict = train, val, test, predict
        self.columns, self.on_bad_rows = columns, on_bad_rows
        self.val_fraction = val_fraction
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.max_length = max_length
        self.truncation, self.min_completion_tokens = truncation, min_completion_tokens
        self.chat_template, self.chat_template_kwargs = chat_template, chat_template_kwargs
        self.as_chat, self.parse_special_tokens = as_chat, parse_special_tokens
        self.tokens_per_batch = tokens_per_batch
        self.num_workers, self.num_proc, self.cache_tokens = num_workers, num_proc, cache_tokens
        self.shuffle, self.drop_last, self.seed = shuffle, drop_last, seed
        self.train_dataset: PreferenceDataset | None = None
        self.val_dataset: PreferenceDataset | None = None
        self.test_dataset: PreferenceDataset | None = None
        self.predict_dataset: PreferenceDataset | None = None
        self._tokenizer = tokenizer
        self._splits = Splits(self)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer. A name or path is loaded on first use. Without one, it is that of the Trainer's policy."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(name_of_policy_tokenizer(self.trainer), "policy")
        if isinstance(self._tokenizer, str | os.PathLike):
            self._tokenizer = load_tokenizer(self._tokenizer)
        return self._tokenizer

    def setup(self, stage: str | None = None) -> None:
        """Reads and tokenises the pairs of a stage, on every rank, once.

        Args:
            stage: "fit", "validate", "test", "predict", or None for all.

        Raises:
            ValueError: If the stage's pairs were not given, or are malformed.
        """
        has_val = self.val is not None or self.val_fraction > 0
        needs_train = stage == "fit" or (stage is None and self.train is not None)
        needs_val = has_val and (stage in ("fit", "validate", None) or (stage == "predict" and self.predict is None))
        needs_test = stage in ("test", None) and self.test is not None
        needs_predict = stage == "predict" or (stage is None and (self.predict is not None or has_val))
        if stage == "fit" and self.train is None:
            raise ValueError("Expected `train` for fitting, but got None.")
        if stage == "validate" and not has_val:
            raise ValueError("Expected `val` or `val_fraction` for validating, but got neither.")
        if stage == "test" and self.test is None:
            raise ValueError("Expected `test` for testing, but got None.")
        if stage == "predict" and self.predict is None and not has_val:
            raise ValueError("Expected `predict`, `val` or `val_fraction` for predicting, but got none of them.")

        if needs_train and self.train_dataset is None:
            self.train_dataset = self._splits.make("train")
        if needs_val and self.val_dataset is None:
            self.val_dataset = self._splits.make("val")
        if needs_test and self.test_dataset is None:
            self.test_dataset = self._splits.make("test")
        if needs_predict and self.predict_dataset is None:
            self.predict_dataset = self.val_dataset if self.predict is None else self._splits.make("predict")
        self._splits.forget_rows()

    def train_dataloader(self) -> ResumableDataLoader:
        """Shuffled batches of this rank's training rows.

        Raises:
            RuntimeError: Before `setup`.
            ValueError: If `drop_last` leaves no batch.
        """
        if self.train_dataset is None:
            raise RuntimeError("Expected `setup('fit')` before `train_dataloader`, but nothing was read yet.")
        ranks = replicas(self.trainer)
        num_tokens = self.train_dataset.num_tokens
        make_sampler: Any = ResumableSampler
        if is_mixture(self.train):
            mixture = Mixture(self.train, num_tokens, self.train_dataset.row_numbers, self._splits.starts)
            make_sampler = partial(MixtureSampler, mixture)
        sampler = make_sampler(
            self.train_dataset,
            **ranks,
            shuffle=self.shuffle,
            seed=self.seed,
            drop_last=self.drop_last,
            num_tokens=num_tokens,
            batch_size=self.batch_size or 1,  # `tokens_per_batch` does not iterate the sampler
        )
        if self.tokens_per_batch is None:
            assert self.batch_size is not None  # the default without `tokens_per_batch` is 8
            least, name = self.batch_size, "batch_size * ranks"
            batching: dict[str, Any] = {"batch_size": least, "sampler": sampler, "drop_last": self.drop_last}
        else:
            least, name = 1, "ranks"
            batch_sampler = TokenBatchSampler(sampler, num_tokens, self.tokens_per_batch, self.batch_size, **ranks)
            batching = {"batch_sampler": batch_sampler}
        if self.drop_last and len(sampler) < least:
            raise ValueError(
                f"Expected at least {name} = {least * ranks['num_replicas']} training pairs "
                f"with `drop_last=True`, but got {len(self.train_dataset)}."
            )
        return ResumableDataLoader(
            self.train_dataset, **batching, num_workers=self.num_workers, collate_fn=self._collate()
        )

    def val_dataloader(self) -> DataLoader | list:
        """Batches of this rank's validation rows in order. Without any, an empty list, so that nothing is validated."""
        if self.val_dataset is None:
            return NoValidation()
        return self._evaluation_loader(self.val_dataset, "validate")

    def test_dataloader(self) -> DataLoader:
        """Batches of this rank's rows for testing, in order.

        Raises:
            RuntimeError: Before `setup`.
        """
        return self._evaluation_loader(self.test_dataset, "test")

    def predict_dataloader(self) -> DataLoader:
        """Batches of this rank's rows for prediction, in order.

        Raises:
            RuntimeError: Before `setup`.
        """
        return self._evaluation_loader(self.predict_dataset, "predict")

    def _evaluation_loader(self, dataset: PreferenceDataset | None, stage: str) -> DataLoader:
        if dataset is None:
            raise RuntimeError(
                f"Expected `setup('{stage}')` before `{stage}_dataloader`, but nothing has been read yet."
            )
        return DataLoader(
            dataset,
            batch_size=self.eval_batch_size,
            sampler=EvaluationSampler(dataset, **replicas(self.trainer)),
            num_workers=self.num_workers,
            collate_fn=self._collate(),
        )

    def _collate(self) -> Any:
        if self.tokens_per_batch is not None:
            return collate_packed
        # Padding is masked by length, so any id in the vocabulary works.
        candidates = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return partial(collate_pairs, pad_token_id=next(token for token in candidates if token is not None))

    def facts(self) -> dict[str, Any]:
        """The tokenizer, the sources, the counts and the settings as plain values, for checkpoints and model cards."""
        return data_facts(self)

    def preview(self, n: int = 3) -> None:
        """Prints the first `n` pairs of `train` (or else of `val`, `test` or `predict`) as they are scored.

        It shows prompts, completions, turns that are not scored, and what `max_length` cuts, in colour if rich is
        installed. It marks control tokens that the text of a row spells, and says why rows are left out. It reads the
        source again and needs no `setup`.

        Args:
            n: The number of pairs.

        Raises:
            TypeError: If `n` is not an integer.
            ValueError: If `n` is below 1, no source was given, or the source is malformed.
        """
        check_integer("n", n, 1)
        name = next((name for name in ("train", "val", "test", "predict") if getattr(self, name) is not None), None)
        if name is None:
            raise ValueError("Expected `train`, `val`, `test` or `predict` to preview, but got none of them.")
        rows = self._splits.read(name)
        both: list[SourceRow | SkippedRow] = [*rows.rows, *rows.skipped]
        print_pairs(sorted(both, key=lambda row: row.index), Tokenization(self.tokenizer, **self._splits.options()), n)

    def __repr__(self) -> str:
        return describe_data(self, self._tokenizer)

    __str__ = __repr__  # Lightning's makes all data loaders
