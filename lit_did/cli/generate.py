"""`lit-did generate`: a policy's and its reference's completions of the same prompts, side by side."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from lit_did.arguments import check_integer, check_range
from lit_did.cli.errors import InputError
from lit_did.cli.functions import call
from lit_did.cli.output import check_new_file
from lit_did.data.pairs import Text
from lit_did.data.prompt_files import encode_prompts, read_prompts
from lit_did.models.names import load_tokenizer
from lit_did.models.wrappers import is_peft, unwrapped
from lit_did.sampling.completing import complete
from lit_did.sampling.prompts import prompt_seed
from lit_did.sampling.readers import CachedModel, ends_of
from lit_did.scoring.models import Dtype, check_models, device_of, load_models, tokenizer_of
from lit_did.writing import whole_file


def main(arguments: list[str]) -> int:
    """Runs the command."""
    return call(generate, "generate", arguments)


def generate(
    prompts: str,
    *,
    policy: str,
    reference: str | None = None,
    output: str | None = None,
    overwrite: bool = False,
    tokenizer: str | None = None,
    max_prompts: int | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    num_samples: int = 1,
    seed: int = 0,
    batch_size: int = 8,
    as_chat: bool | None = None,
    chat_template: str | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    parse_special_tokens: bool = False,
    columns: dict[str, str | None] | None = None,
    dtype: Dtype = "float32",
    device: str | None = None,
    quiet: bool = False,
) -> int:
    """Completes prompts with a policy and with its reference, and shows both side by side.

    Args:
        prompts: A .txt file with one prompt a line, rows with prompts or preference pairs (.jsonl, .csv, ...), or -
            for lines from the standard input.
        policy: The policy: a folder, a name of the Hugging Face hub, or smollm2.
        reference: Another model beside it. Without it, an adapter is shown beside its base, and another policy alone.
        output: A .jsonl file for the completions.
        overwrite: Whether to replace the file if it is there already.
        tokenizer: The name or path of the tokenizer, by default the policy's.
        max_prompts: Only the first ones.
        max_new_tokens: The most tokens of a completion.
        temperature: Divides the logits of the distribution that tokens are drawn from. 0 takes the most likely token.
        num_samples: Completions of each prompt and model. More than one needs a temperature.
        seed: Of the draws. They do not depend on the batch size.
        batch_size: Prompts a forward pass.
        as_chat: Whether to wrap plain text as a user's message, by default if the tokenizer has a chat template.
        chat_template: A Jinja template to use instead of the tokenizer's.
        chat_template_kwargs: Variables for the chat template.
        parse_special_tokens: Whether to read control tokens that the text spells as control tokens.
        columns: Names of the source's columns by field, such as '{"prompt": "question"}'.
        dtype: The number format of the models' weights.
        device: The device, such as cuda:1. By default the GPU if there is one.
        quiet: Whether to show neither a progress bar nor the completions.
    """
    _check(max_prompts, max_new_tokens, temperature, num_samples, seed, batch_size)
    path = None if output is None else _output_path(output, overwrite)
    placed = device_of(device)
    check_models(policy, reference, needs_reference=False)
    rows = read_prompts(prompts, columns=columns)[:max_prompts]
    loaded_tokenizer = load_tokenizer(tokenizer or tokenizer_of(policy), "tokenizer" if tokenizer else "policy")
    token_ids = encode_prompts(
        rows,
        loaded_tokenizer,
        as_chat=as_chat,
        chat_template=chat_template,
        chat_template_kwargs=chat_template_kwargs,
        parse_special_tokens=parse_special_tokens,
    )
    loaded, other = load_models(policy, reference, dtype=getattr(torch, dtype), device=placed)
    sides: dict[str, dict[str, Any]] = {"policy": {"model": loaded}}
    if other is not None:
        sides["reference"] = {"model": other}
    elif is_peft(unwrapped(loaded)):
        sides["reference"] = {"model": loaded, "without_adapter": True}
    for name, side in sides.items():  # now, because completing may take hours
        reader = CachedModel(side["model"])
        for row, ids in zip(rows, token_ids, strict=True):
            try:
                reader.check_prompt(torch.tensor(ids), max_new_tokens, name)
            except ValueError as error:
                raise InputError(f"{row.where}: {error}") from error
    results: list[dict[str, Any]] = [
        {"index": row.index, "sample": sample, "tag": row.tag, "prompt": row.prompt}
        for row in rows
        for sample in range(num_samples)
    ]
    jobs = [ids for ids in token_ids for _ in range(num_samples)]
    seeds = [prompt_seed(seed, result["index"], result["sample"]) for result in results]  # the same for both models
    hidden = True if quiet else None  # None: where there is no terminal
    with tqdm(total=len(sides) * len(jobs), desc="Generating", unit="completion", disable=hidden) as bar:
        for name, side in sides.items():
            ends = ends_of(side["model"], "auto")
            for start in range(0, len(jobs), batch_size):
                part = slice(start, start + batch_size)
                completions = complete(
                    prompts=jobs[part],
                    max_new_tokens=max_new_tokens,
                    batch_size=batch_size,
                    temperature=temperature,
                    seeds=seeds[part],
                    **side,
                )
                for result, completion in zip(results[part], completions, strict=True):
                    result[name] = loaded_tokenizer.decode(completion, skip_special_tokens=True)
                    result[f"{name}_num_tokens"] = len(completion)
                    result[f"{name}_ended"] = completion[-1] in ends
                bar.update(len(completions))
    if not quiet:
        _show(results, list(sides))
    if path is not None:
        with whole_file(path) as beside:
            beside.write_text(
                "".join(json.dumps(result, ensure_ascii=False) + "\n" for result in results), encoding="utf-8"
            )
        print(f"Written: {path}")
    return 0


def _check(
    max_prompts: int | None, max_new_tokens: int, temperature: float, num_samples: int, seed: int, batch_size: int
) -> None:
    for name, value, least in (
        ("max_prompts", 1 if max_prompts is None else max_prompts, 1),
        ("max_new_tokens", max_new_tokens, 1),
        ("num_samples", num_samples, 1),
        ("seed", seed, 0),
        ("batch_size", batch_size, 1),
    ):
        check_integer(name, value, least)
    check_range("temperature", temperature, "[0, inf)")
    if num_samples > 1 and not temperature:
        raise InputError(
            f"Expected --temperature to be above 0 with --num_samples {num_samples}, because without it all samples "
            "are the same, but got 0."
        )


def _output_path(output: str, overwrite: bool) -> Path:
    path = Path(output).expanduser()
    if path.suffix != ".jsonl":
        raise InputError(f"Expected --output to end in .jsonl, but got {path.name!r}.")
    check_new_file(path, overwrite)
    return path


def _show(results: Sequence[dict[str, Any]], sides: Sequence[str]) -> None:
    """Prints a table if rich is installed and there is a terminal, else one block a prompt."""
    names = ["prompt", *sides]
    cells = [[_text(result["prompt"]), *(_marked(result, side) for side in sides)] for result in results]
    if not sys.stdout.isatty() or importlib.util.find_spec("rich") is None:
        for row in cells:
            print("\n".join(f"{name}: {text}" for name, text in zip(names, row, strict=True)), end="\n\n")
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text as Cell

    table = Table(*names, box=box.HORIZONTALS, show_lines=True)
    for row in cells:
        table.add_row(*map(Cell, row))
    Console().print(table)


def _text(prompt: Text) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"[{message['role']}] {message.get('content', '')}" for message in prompt)


def _marked(result: dict[str, Any], side: str) -> str:
    """A completion, with "..." at its end if `max_new_tokens` cut it."""
    return result[side] + ("" if result[f"{side}_ended"] else " ...")
