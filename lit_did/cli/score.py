"""`lit-did score`: writes a table of preference pairs, each with what a policy and its reference say about it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from lit_did.cli.errors import InputError
from lit_did.cli.facts import facts, recorded
from lit_did.cli.functions import call
from lit_did.cli.output import Finished, check_new_file, short_name
from lit_did.data.dataset import PreferenceDataset
from lit_did.data.reading import OnBadRows
from lit_did.data.tokenizing import Truncation
from lit_did.models.names import load_tokenizer
from lit_did.scoring.models import Dtype, check_models, device_of, tokenizer_of
from lit_did.scoring.scorer import PairScorer
from lit_did.scoring.summary import describe, summarize
from lit_did.scoring.table import check_table_path, write_table


def main(arguments: list[str]) -> int:
    """Runs the command."""
    return call(score, "score", arguments)


def score(
    pairs: str,
    *,
    policy: str,
    reference: str | None = None,
    output: str | None = None,
    overwrite: bool = False,
    tokenizer: str | None = None,
    beta: float | None = None,
    texts: bool = False,
    batch_size: int = 8,
    max_length: int = 1024,
    truncation: Truncation = "completion",
    min_completion_tokens: int | None = None,
    as_chat: bool = False,
    chat_template: str | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    parse_special_tokens: bool = False,
    columns: dict[str, str | None] | None = None,
    on_bad_rows: OnBadRows = "skip",
    dtype: Dtype = "float32",
    device: str | None = None,
    quiet: bool = False,
) -> int:
    """Writes a table with a row a pair: log-probabilities, log-ratios, margin, token DID entropy and concentration, KL.

    A run that was killed goes on when the same command is run again.

    Args:
        pairs: Preference pairs: a file, a folder, a pattern or a data set of the Hugging Face hub.
        policy: The policy: a folder, a name of the hub, or smollm2. The folder of an adapter is loaded on its base.
        reference: The model that the policy is compared with. Without it, an adapter is compared with its base.
        output: The table, a .csv or .parquet file. By default the name of the pairs with .scores.csv.
        overwrite: Whether to replace a finished table.
        tokenizer: The name or path of the tokenizer, by default the policy's.
        beta: DPO's inverse temperature. With it, the table has the reward margin, beta times the margin.
        texts: Whether the table has the pairs' texts too.
        batch_size: Pairs a forward pass.
        max_length: The most tokens of a prompt and its completion together.
        truncation: What loses tokens in longer pairs. drop leaves them out.
        min_completion_tokens: The tokens that a completion keeps before the prompt loses some.
        as_chat: Whether to wrap plain text as messages of user and assistant.
        chat_template: A Jinja template to use instead of the tokenizer's.
        chat_template_kwargs: Variables for the chat template.
        parse_special_tokens: Whether to read control tokens that the text spells as control tokens.
        columns: Names of the source's columns by field, such as '{"prompt": "question"}'.
        on_bad_rows: Whether rows that cannot be scored are skipped or stop the command.
        dtype: The number format of the models' weights.
        device: The device, such as cuda:1. By default the GPU if there is one.
        quiet: Whether to show neither a progress bar nor a summary.
    """
    path = _table_path(output, pairs, overwrite)
    placed = device_of(device)
    check_models(policy, reference)
    data: dict[str, Any] = {
        "columns": columns,
        "on_bad_rows": on_bad_rows,
        "max_length": max_length,
        "truncation": truncation,
        "min_completion_tokens": min_completion_tokens,
        "as_chat": as_chat,
        "chat_template": chat_template,
        "chat_template_kwargs": chat_template_kwargs,
        "parse_special_tokens": parse_special_tokens,
    }
    loaded = load_tokenizer(tokenizer or tokenizer_of(policy), "tokenizer" if tokenizer else "policy")
    scorer = PairScorer(pairs, loaded, batch_size=batch_size, beta=beta, texts=texts, **data)
    models = scorer.load(policy, reference, dtype=getattr(torch, dtype), device=placed)
    kind = torch.cuda.get_device_name(placed) if placed.type == "cuda" else placed.type
    arguments = {"dtype": dtype, "device": kind, "batch_size": batch_size, "beta": beta, **data}
    about = recorded(arguments, facts(models.policy, models.reference, pairs=_digest(scorer.dataset)))
    with Finished(path.with_name(f"{path.name}.part"), about, path) as finished:
        try:
            for rows in scorer.batches(len(finished.results), progress=not quiet):
                finished.add(rows)
        except KeyboardInterrupt:
            done = sum(map(len, finished.results))
            print(f"Stopped after {done} of {len(scorer.dataset)} pairs. Run the same command again to go on.")
            return 130
        scored = [row for rows in finished.results for row in rows]
        write_table(scorer.table(scored), path)
        finished.remove()
    if not quiet:
        print(f"{len(scored)} pairs of {scorer.dataset.num_rows} rows\n{describe(summarize(scored))}")
    print(f"Written: {path}")
    return 0


def _table_path(output: str | None, pairs: str, overwrite: bool) -> Path:
    if output is None:
        output = f"{short_name(pairs)}.scores.csv"
    path = Path(output).expanduser()
    try:
        check_table_path(path)
    except ValueError as error:
        raise InputError(str(error).replace("`output`", "--output")) from error
    check_new_file(path, overwrite)
    return path


def _digest(dataset: PreferenceDataset) -> str:
    """A digest of the tokens of all pairs, in their order."""
    digest = hashlib.blake2b(digest_size=16)
    for example in dataset:
        arrays = (example.prompt_ids, example.chosen_ids, example.rejected_ids)
        contexts = (example.chosen_context or (), example.rejected_context or ())
        for array in (*arrays, *contexts[0], *contexts[1]):
            digest.update(len(array).to_bytes(8, "little") + array.tobytes())
        digest.update(example.index.to_bytes(8, "little"))
    return digest.hexdigest()
