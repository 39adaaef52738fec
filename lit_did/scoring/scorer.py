"""PairScorer, score_pairs and score_dataset: statistics of preference pairs under two models, a row a pair."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from tqdm.auto import tqdm

from lit_did.arguments import check_bools, check_integer, check_range
from lit_did.batches.checks import checked_sequences
from lit_did.batches.sequences import Sequences
from lit_did.data.collating import collate_packed
from lit_did.data.columns import read_columns
from lit_did.data.dataset import Example, PreferenceDataset
from lit_did.data.reading import Columns, OnBadRows, read_rows
from lit_did.data.rendering import check_template_kwargs
from lit_did.data.templates import check_chat_template, describe_unread
from lit_did.data.tokenizing import Truncation, check_truncation
from lit_did.models import PolicyAndReference
from lit_did.models.forward import num_embeddings, num_positions
from lit_did.models.names import load_tokenizer
from lit_did.models.wrappers import is_peft, unwrapped
from lit_did.ops import SequenceStatistics
from lit_did.scoring.models import Model, check_adapter, check_models, load_models, tokenizer_of
from lit_did.scoring.table import Row, import_pandas, margin, rows_of, with_columns


def score_pairs(
    pairs: Any,
    policy: Model,
    reference: Model | None = None,
    *,
    tokenizer: Any = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    progress: bool = True,
    **options: Any,
) -> Any:
    """Scores preference pairs. `lit-did docs scoring` describes the columns.

    A warning says how many rows of the source are not in the table, because they cannot be read or are too long.

    Args:
        pairs: Files, folders, patterns, a name of the Hugging Face hub, a table or a list of dicts; see
            `lit-did docs data`.
        policy: A causal language model of transformers, or its name or path.
        reference: The model that the policy is compared with, or its name or path. None: a `PeftModel` is compared with
            its base model.
        tokenizer: A transformers tokenizer, or its name or path. None: the policy's.
        dtype: Of models that are given by name. None: float32.
        device: Of models that are given by name. None: the GPU if there is one, else the CPU.
        model_kwargs: Arguments of `from_pretrained` for models that are given by name.
        progress: Whether a terminal shows a progress bar.
        **options: Further arguments of `PairScorer`, such as `beta`, `texts` and `max_length`.

    Returns:
        A pandas DataFrame with a row a pair, in the order of the source.

    Raises:
        TypeError, ValueError: An argument is out of range, the data is malformed, or the models do not fit together.
        FileNotFoundError: There is no such file or model.
        ModuleNotFoundError: pandas is not installed.
    """
    import_pandas()  # now, because scoring may take hours
    check_models(policy, reference)
    scorer = PairScorer(pairs, tokenizer_of(policy) if tokenizer is None else tokenizer, **options)
    scorer.load(policy, reference, dtype=dtype, device=device, model_kwargs=model_kwargs)
    rows = [row for batch in scorer.batches(progress=progress) for row in batch]
    return import_pandas().DataFrame(scorer.table(rows))


class PairScorer:
    """Scores preference pairs in batches that depend on the arguments only, so that a run can go on after any batch.

    The arguments that are not listed here, such as `columns` and `max_length`, are those of `PreferenceDataModule`.

    Args:
        pairs: As for `score_pairs`.
        tokenizer: A transformers tokenizer, or its name or path.
        batch_size: Pairs a forward pass.
        beta: DPO's inverse temperature. With it, the table has `reward_margin`, which is beta times `margin`.
        texts: Whether the table has the columns with the pairs' texts too.

    Attributes:
        dataset: The tokenised pairs.
    """

    def __init__(
        self,
        pairs: Any,
        tokenizer: Any,
        *,
        columns: Columns | None = None,
        on_bad_rows: OnBadRows = "skip",
        max_length: int = 1024,
        truncation: Truncation = "completion",
        min_completion_tokens: int | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        parse_special_tokens: bool = False,
        as_chat: bool = False,
        batch_size: int = 8,
        beta: float | None = None,
        texts: bool = False,
    ) -> None:
        check_integer("batch_size", batch_size, 1)
        if beta is not None:
            check_range("beta", beta, "(0, inf)")
        check_truncation(max_length, truncation, min_completion_tokens)
        check_chat_template(chat_template)
        check_template_kwargs(chat_template_kwargs)
        check_bools(as_chat=as_chat, parse_special_tokens=parse_special_tokens, texts=texts)
        if isinstance(tokenizer, str | os.PathLike):
            tokenizer = load_tokenizer(tokenizer)
        self.beta, self.batch_size = beta, batch_size
        self.models: PolicyAndReference | None = None
        """None until `load`"""
        rows, skipped = read_rows(pairs, "pairs", columns=columns, on_bad_rows=on_bad_rows)
        # Now, because the source may change while models run.
        self._columns = read_columns(pairs, "pairs", columns=columns, texts=texts)
        self.dataset = PreferenceDataset(
            rows,
            tokenizer,
            max_length,
            chat_template=chat_template,
            chat_template_kwargs=chat_template_kwargs,
            as_chat=as_chat,
            parse_special_tokens=parse_special_tokens,
            truncation=truncation,
            min_completion_tokens=min_completion_tokens,
            skipped=skipped,
            on_bad_rows=on_bad_rows,
        )
        notes = self.dataset.warnings("pairs")
        notes["unread"] = describe_unread(
            "pairs", (row.pair for row in rows), tokenizer, chat_template, chat_template_kwargs
        )
        if self.dataset.num_too_long:
            notes["length"] = (
                f"pairs: {self.dataset.num_too_long} of {self.dataset.num_rows} rows are longer than "
                f"max_length={max_length} and are left out of the table. Raise `max_length`, or pass "
                '`truncation="completion"`.'
            )
        for text in filter(None, notes.values()):
            warnings.warn(text, stacklevel=3)

    @property
    def num_batches(self) -> int:
        """The number of batches."""
        return -(-len(self.dataset) // self.batch_size)

    def load(
        self,
        policy: Model,
        reference: Model | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> PolicyAndReference:
        """Loads the models, as `score_pairs` describes them."""
        loaded, other = load_models(policy, reference, dtype=dtype, device=device, model_kwargs=model_kwargs)
        if other is None:
            check_adapter(is_peft(unwrapped(loaded)))
        self.models = PolicyAndReference(loaded, other, freeze=False)
        return self.models

    def batches(self, start: int = 0, *, progress: bool = True) -> Iterator[list[Row]]:
        """The rows of each batch, in the order of the source.

        Args:
            start: The number of batches to leave out, which an earlier run has scored.
            progress: Whether a terminal shows a progress bar.
        """
        if self.models is None:
            raise RuntimeError("Expected `load` to be called before `batches`, but it was not.")
        return score_dataset(
            self.models, self.dataset, batch_size=self.batch_size, beta=self.beta, start=start, progress=progress
        )

    def table(self, rows: Sequence[Row]) -> dict[str, list]:
        """The columns of the table: those of `rows`, which are of all batches, and then the source's.

        One warning counts the pairs whose margin is not finite.
        """
        broken = [row["index"] for row in rows if not math.isfinite(row["margin"])]
        if broken:
            warnings.warn(
                f"The margins of {len(broken)} of {len(rows)} pairs are not finite. The first is row {broken[0]}. "
                "Either a model's weights are not finite, or float16 overflowed. Then use float32 or bfloat16.",
                stacklevel=2,
            )
        return with_columns(rows, self._columns)


def score_dataset(
    models: PolicyAndReference,
    dataset: PreferenceDataset,
    *,
    batch_size: int,
    beta: float | None = None,
    start: int = 0,
    progress: bool = True,
) -> Iterator[list[Row]]:
    """The rows of each batch of pairs that are tokenised already, in the order of the source.

    Args:
        models: The policy beside its reference.
        dataset: The pairs.
        batch_size: Pairs a forward pass.
        beta: DPO's inverse temperature. With it, rows have `reward_margin`.
        start: The number of batches to leave out, which an earlier run has scored.
        progress: Whether a terminal shows a progress bar.
    """

    def examples(number: int) -> list[Example]:
        first = number * batch_size
        return [dataset[i] for i in range(first, min(first + batch_size, len(dataset)))]

    def sequences(number: int) -> Sequences:
        policy = models.policy
        batch = collate_packed(examples(number))
        return checked_sequences(batch, num_embeddings=num_embeddings(policy), num_positions=num_positions(policy))

    # A model's layout depends on the batches before. So a run that goes on has to choose the same ones again.
    for number in range(start):
        models.choose_layouts(sequences(number))
    done = min(start * batch_size, len(dataset))
    hidden = None if progress else True  # None: where there is no terminal
    with tqdm(total=len(dataset), initial=done, desc="Scoring", unit="pair", disable=hidden) as bar:
        for number in range(start, -(-len(dataset) // batch_size)):
            chosen, rejected = _sides(models.measure(sequences(number)))
            rows = rows_of(
                examples(number),
                chosen,
                rejected,
                truncated=dataset.truncated,
                reward_margin=None if beta is None else beta * margin(chosen, rejected),
            )
            bar.update(len(rows))
            yield rows


def _sides(statistics: SequenceStatistics) -> tuple[SequenceStatistics, SequenceStatistics]:
    """The statistics of the chosen and of the rejected completions, on the CPU."""
    chosen, rejected = zip(*(value.cpu().chunk(2) for value in statistics), strict=True)
    return SequenceStatistics(*chosen), SequenceStatistics(*rejected)
