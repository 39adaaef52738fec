"""`lit-did entropy`: estimates the DID's entropy of completions of many prompts, as JSON and as a picture."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lit_did.arguments import check_integer
from lit_did.cli.errors import InputError
from lit_did.cli.facts import facts, recorded
from lit_did.cli.functions import call
from lit_did.cli.output import Finished, check_new_file
from lit_did.data.prompt_files import PromptRow, encode_prompts, read_prompts
from lit_did.models.names import load_tokenizer
from lit_did.sampling.prompts import check_seed, mean_over_prompts, prompt_seed, sample_in_batches, verdict_of_mean
from lit_did.sampling.readers import ends_of
from lit_did.sampling.sequential import DIDSamples, Settings
from lit_did.scoring.models import Dtype, check_models, device_of, load_models, tokenizer_of
from lit_did.writing import whole_file

_SHOWN_LETTERS = 200  # of a prompt, in the JSON
_NAMED = 5  # unreliable prompts in the summary
QUANTITIES = ("entropy", "entropy_per_token", "concentration")


def main(arguments: list[str]) -> int:
    """Runs the command."""
    return call(entropy, "entropy", arguments)


def entropy(
    *,
    policy: str,
    prompts: str,
    reference: str | None = None,
    output: str = "entropy.json",
    overwrite: bool = False,
    picture: bool = True,
    max_prompts: int | None = None,
    max_new_tokens: int = 32,
    num_samples: int = 128,
    num_islands: int = 4,
    ess_threshold: float = 0.5,
    confidence: float = 0.95,
    num_completions: int = 3,
    batch_size: int = 1,
    seed: int = 0,
    tokenizer: str | None = None,
    as_chat: bool | None = None,
    chat_template: str | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    parse_special_tokens: bool = False,
    columns: dict[str, str | None] | None = None,
    dtype: Dtype = "float32",
    device: str | None = None,
    quiet: bool = False,
) -> int:
    """Estimates the entropy of the DID of whole completions for each prompt, and its mean over the prompts.

    It writes a JSON file and a picture beside it. `lit-did docs theory` explains the method and the numbers.
    A run that was killed goes on when the same command is run again, and ends with the same numbers.

    Args:
        policy: The policy: a folder, a name of the Hugging Face hub, or smollm2. The folder of an adapter is loaded on
            its base.
        prompts: A .txt file with one prompt a line, rows with prompts or preference pairs (.jsonl, .csv, ...), or - for
            lines from the standard input. Rows with a tag get a mean for each tag.
        reference: The model that the policy is compared with. Without it, an adapter is compared with its base.
        output: The JSON file. The picture has the same name with .png.
        overwrite: Whether to replace the files if they are there already.
        picture: Whether to draw the picture, which needs matplotlib.
        max_prompts: Only the first ones.
        max_new_tokens: Where completions are cut. The entropy grows with it.
        num_samples: Particles of each prompt, a multiple of num_islands. More make each estimate better.
        num_islands: Independent groups of a prompt's particles, which its interval comes from.
        ess_threshold: The share of effective particles below which an island resamples.
        confidence: The level of the intervals.
        num_completions: Completions drawn from the DID to show for each prompt.
        batch_size: Prompts a forward pass. Memory grows with batch_size times num_samples.
        seed: Of all draws. Each prompt has its own random numbers.
        tokenizer: The name or path of the tokenizer, by default the policy's.
        as_chat: Whether to wrap plain text as a user's message, by default if the tokenizer has a chat template.
        chat_template: A Jinja template to use instead of the tokenizer's.
        chat_template_kwargs: Variables for the chat template.
        parse_special_tokens: Whether to read control tokens that the text spells as control tokens.
        columns: Names of the source's columns by field, such as '{"prompt": "question"}'.
        dtype: The number format of the models' weights.
        device: The device, such as cuda:1. By default the GPU if there is one.
        quiet: Whether to show neither a progress bar nor a summary.
    """
    settings = Settings(max_new_tokens, num_samples, num_islands, ess_threshold, confidence).checked()
    check_seed(seed)
    check_integer("batch_size", batch_size, 1)
    check_integer("num_completions", num_completions, 0)
    check_integer("max_prompts", 1 if max_prompts is None else max_prompts, 1)
    path = _output_path(output, picture, overwrite)
    placed = device_of(device)
    check_models(policy, reference)
    rows = read_prompts(prompts, columns=columns)[:max_prompts]
    loaded_tokenizer = load_tokenizer(tokenizer or tokenizer_of(policy), "tokenizer" if tokenizer else "policy")
    rendering: dict[str, Any] = {
        "as_chat": as_chat,
        "chat_template": chat_template,
        "chat_template_kwargs": chat_template_kwargs,
        "parse_special_tokens": parse_special_tokens,
    }
    token_ids = encode_prompts(rows, loaded_tokenizer, **rendering)
    model, other = load_models(policy, reference, dtype=getattr(torch, dtype), device=placed)
    arguments = {
        "policy": policy,
        "reference": reference,
        "prompts": prompts,
        "max_prompts": max_prompts,
        **settings._asdict(),
        "num_completions": num_completions,
        "batch_size": batch_size,
        "seed": seed,
        "tokenizer": tokenizer,
        **rendering,
        "columns": columns,
        "dtype": dtype,
        "device": torch.cuda.get_device_name(placed) if placed.type == "cuda" else placed.type,
    }
    found = facts(model, other, prompts=_digest(rows, token_ids))
    about = {"arguments": arguments, **found}
    record = {**recorded(arguments, found), "the tokens that end a completion": ends_of(model, "auto")}
    with Finished(_record(path), record, path) as finished:
        done = {result["number"]: result for batch in finished.results for result in batch}
        batches = sample_in_batches(
            model,
            other,
            token_ids,
            settings,
            batch_size=batch_size,
            seed=seed,
            progress=not quiet and sys.stderr.isatty(),
            skip=done.keys(),
            names=[row.where for row in rows],
        )
        describe = partial(_result, rows, token_ids, loaded_tokenizer, seed, num_completions)
        try:
            for batch in batches:
                results = [describe(number, samples) for number, samples in batch.items()]
                finished.add(results)
                done |= {result["number"]: result for result in results}
        except KeyboardInterrupt:
            print(f"Stopped after {len(done)} of {len(rows)} prompts. Run the same command again to go on.")
            return 130
        except torch.OutOfMemoryError as error:
            raise InputError(
                f"Out of memory with --batch_size {batch_size} and --num_samples {num_samples}. "
                + (
                    f"{finished.path} keeps the prompts so far. Run the same command again when more memory is free, "
                    "or delete that file and use smaller ones, or another --device or --dtype."
                    if done
                    else "Use smaller ones, or another --device or --dtype."
                )
            ) from error
        results = [done[number] for number in range(len(rows))]
        report = _plain({**about, **summarize(results, settings), "prompts": results})
        if picture:
            from lit_did.cli.entropy_picture import draw

            with whole_file(path.with_suffix(".png")) as beside:
                draw(report, beside)
        with whole_file(path) as beside:
            beside.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        finished.remove()
    if not quiet:
        print(summary(report))
    print(f"Written: {path}" + (f" and {path.with_suffix('.png')}" if picture else ""))
    return 0


def _output_path(output: str, picture: bool, overwrite: bool) -> Path:
    path = Path(output).expanduser()
    if path.suffix != ".json":
        raise InputError(f"Expected --output to end in .json, but got {path.name!r}.")
    if picture and importlib.util.find_spec("matplotlib") is None:
        raise InputError(
            "Expected matplotlib for the picture, but it is not installed. Run `pip install 'lit-did[plot]'`, or pass "
            "--no_picture."
        )
    written = [path] if _record(path).exists() else [path, path.with_suffix(".png")]  # a killed run may have drawn it
    for file in written if picture else [path]:
        check_new_file(file, overwrite)
    return path


def _record(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")


def _digest(rows: Sequence[PromptRow], token_ids: Sequence[Sequence[int]]) -> str:
    """A digest of all prompts' tokens and tags, in their order."""
    given = json.dumps([[row.index, row.tag, list(ids)] for row, ids in zip(rows, token_ids, strict=True)])
    return hashlib.blake2b(given.encode(), digest_size=16).hexdigest()


def _result(
    rows: Sequence[PromptRow],
    token_ids: Sequence[Sequence[int]],
    tokenizer: Any,
    seed: int,
    num_completions: int,
    number: int,
    samples: DIDSamples,
) -> dict[str, Any]:
    """What the JSON holds about a prompt."""
    estimate, row, own_seed = samples.estimate, rows[number], prompt_seed(seed, number)
    # Other random numbers than those that drew the particles.
    shown_seed = prompt_seed(seed, number, 1)
    generator, drawn = torch.Generator().manual_seed(shown_seed), []
    if num_completions:
        drawn = torch.multinomial(samples.log_weight.exp(), num_completions, True, generator=generator).tolist()
    return {
        "number": number,
        "where": row.where,
        "tag": row.tag,
        "prompt": _text(row),
        "num_tokens": len(token_ids[number]),
        "seed": own_seed,
        "entropy": estimate.entropy,
        "lower": estimate.lower,
        "upper": estimate.upper,
        "standard_error": estimate.standard_error,
        "entropy_per_token": samples.entropy_per_token,
        "concentration": samples.concentration,
        "log_num_completions": samples.log_num_completions,
        "log_partition": estimate.log_partition,
        "reliable": estimate.reliable,
        "reason": estimate.reason,
        "effective_sample_size": estimate.effective_sample_size,
        "num_distinct": estimate.num_distinct,
        "num_resamplings": samples.num_resamplings.tolist(),
        "same_models": bool((samples.log_ratio == 0).all()),
        "completions": [
            tokenizer.decode(samples.completions[i][: samples.lengths[i]], skip_special_tokens=False) for i in drawn
        ],
    }


def _text(row: PromptRow) -> str:
    """A prompt in one short line."""
    messages = row.prompt if isinstance(row.prompt, list) else [{"content": row.prompt}]
    text = " ".join(str(message.get("content") or "") for message in messages if message.get("role") != "system")
    text = " ".join(text.split())
    return text if len(text) <= _SHOWN_LETTERS else f"{text[:_SHOWN_LETTERS]}..."


def summarize(results: Sequence[dict[str, Any]], settings: Settings) -> dict[str, Any]:
    """Means over all prompts, and over those of each tag if there are several."""
    tags = list(dict.fromkeys(result["tag"] for result in results))
    by_tag = {tag: [result for result in results if result["tag"] == tag] for tag in tags if len(tags) > 1}
    return {
        "log_num_completions": results[0]["log_num_completions"],
        "overall": _overall(results, settings),
        "by_tag": {tag: _overall(some, settings) for tag, some in by_tag.items()},
    }


def tag_label(tag: str) -> str:
    """What a table and a picture call a tag: one line, and something for rows without one."""
    return " ".join(tag.split()) or "no tag"


def _overall(results: Sequence[dict[str, Any]], settings: Settings) -> dict[str, Any]:
    mean = partial(mean_over_prompts, num_islands=settings.num_islands, confidence=settings.confidence)
    errors = [result["standard_error"] for result in results]
    spreads = {"entropy_per_token": [error / settings.max_new_tokens for error in errors]}
    reliable, reason = verdict_of_mean([r["entropy"] for r in results], [r["reliable"] for r in results])
    return {
        "num_prompts": len(results),
        "num_reliable": sum(result["reliable"] for result in results),
        "reliable": reliable,
        "reason": reason,
        **{
            name: mean([result[name] for result in results], spreads.get(name, errors))._asdict() for name in QUANTITIES
        },
    }


def _plain(value: Any) -> Any:
    """`value` with null in place of what JSON has no number for."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def summary(report: dict[str, Any]) -> str:
    """The means as a table, and what they say."""
    level = f"{report['arguments']['confidence']:.0%}"
    lines = [
        f"{'':24} {'prompts':>7} {'reliable':>8}  {'DID entropy (nats)':>20}  {'a token':>8}  {'concentration':>20}"
    ]
    groups = [(tag_label(tag), found) for tag, found in report["by_tag"].items()]
    for name, found in [("all prompts", report["overall"]), *groups]:
        shown = name if len(name) <= 24 else f"{name[:21]}..."
        lines.append(
            f"{shown:24} {found['num_prompts']:7} {found['num_reliable']:8}  {_interval(found['entropy']):>20}  "
            f"{found['entropy_per_token']['mean']:8.4g}  {_interval(found['concentration']):>20}"
        )
    overall, arguments = report["overall"], report["arguments"]
    these = overall["entropy"]
    lines.append(
        f"± half of the {level} interval for prompts such as these. For these prompts alone it is "
        f"± {these['upper_of_these'] - these['mean']:.2g}."
    )
    lines.append(
        f"The largest possible entropy is {report['log_num_completions']:.1f} nats, the logarithm of the number of "
        f"completions of up to {arguments['max_new_tokens']} tokens. Concentration is the distance from it."
    )
    unreliable = [result["where"] for result in report["prompts"] if not result["reliable"]]
    if unreliable:
        more = f" and {len(unreliable) - _NAMED} more" if len(unreliable) > _NAMED else ""
        lines.append(
            f"Unreliable estimates: {'; '.join(unreliable[:_NAMED])}{more}. "
            + ("" if overall["reliable"] else "Do not believe the mean over all prompts. ")
            + f"Use more particles, such as --num_samples {4 * arguments['num_samples']}."
        )
    if all(result["same_models"] for result in report["prompts"]):
        lines.append(
            "Policy and reference give the same probabilities: nothing was learned, and the entropy is that logarithm."
        )
    else:
        lines.append(
            "A high entropy means that what the policy learned is open-ended: it lies on many completions. A low one "
            "means that it lies on few, as facts do. Compare only runs with the same --max_new_tokens."
        )
    return "\n".join(lines)


def _interval(found: dict[str, Any]) -> str:
    if found["upper"] is None:
        return f"{found['mean']:.2f} (one prompt)"
    return f"{found['mean']:.2f} ± {found['upper'] - found['mean']:.2g}"
