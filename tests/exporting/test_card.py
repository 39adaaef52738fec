"""The model card: metadata that the hub accepts, facts of the run, and no line where a fact is unknown."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_did import LitDPO, PreferenceDataModule
from lit_did.exporting import export_module, export_policy
from lit_did.exporting.card import model_card
from lit_did.models.smollm2 import SMOLLM2, cache_folder
from tests.exporting.runs import LORA, ROWS, run
from tests.modules.tiny import loader, make_pairs, trainer

# What the hub's form for metadata allows.
RELATIONS = ("adapter", "merge", "quantized", "finetune")


def cells(card: str) -> dict[str, str]:
    """The tables: {first column: the others}."""
    rows = (line.strip("| ").split(" | ", 1) for line in card.splitlines() if line.startswith("| "))
    return {name: value for name, *rest in rows for value in rest}


def facts(**changed) -> dict:
    known = {
        "module": "LitDPO",
        "base_model": None,
        "adapter": None,
        "data": None,
        "training": None,
        "validation": None,
        "versions": {"lit-did": "1.2.3"},
    }
    return known | changed


def card(changed: dict | None = None, **options) -> str:
    given = {"kind": "full", "base_model": None, "title": "out", "chat": True, **options}
    return model_card(facts(**(changed or {})), given.pop("arguments", {}), **given)


@pytest.fixture(scope="module")
def exported(tiny_model, tmp_path_factory) -> tuple[str, LitDPO]:
    folder = tmp_path_factory.mktemp("card")
    rows = [*ROWS, {"prompt": "a", "chosen": "b", "rejected": ""}]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = PreferenceDataModule(
        folder / "pairs.jsonl", str(tiny_model), val_fraction=0.25, batch_size=3, max_length=40, as_chat=True
    )
    skipped, longer = (pytest.warns(UserWarning, match=text) for text in ("is skipped", "longer than max_length"))
    with skipped, longer:
        module, _, checkpoint = run(folder / "run", str(tiny_model), data=data, lora=LORA, beta=0.25, epochs=2)
    export_policy(checkpoint, folder / "out", quiet=True)
    return (folder / "out" / "README.md").read_text(), module


def test_facts_of_a_run(exported):
    text, module = exported
    rows = cells(text)
    assert rows["Training data"] == "`pairs.jsonl`"
    counts = module.trainer.datamodule
    train, val = counts.train_dataset, counts.val_dataset
    assert rows["Training pairs"].startswith(f"{len(train)} of {train.num_rows} rows: {train.num_dropped} left out, ")
    assert f"{val.num_truncated} truncated" in rows["Validation pairs"]
    assert train.num_truncated + val.num_truncated > 0
    assert train.num_dropped + val.num_dropped == 1
    assert rows["Held out of the training data"] == "25.0%"
    assert rows["beta"] == "0.25"
    assert rows["Rank r"] == "2"
    assert rows["target_modules"] == "q_proj, v_proj"
    assert rows["Optimiser steps"] == str(module.trainer.global_step) == "4"
    assert rows["Epochs"] == "2"
    assert rows["Batch of an optimiser step"] == "6 pairs"  # 3, accumulated twice
    assert rows["Learning rate"] == "0.01"
    assert rows["torch"] == torch.__version__
    assert "gamma" not in rows
    for identifier in ("2505.23761", "2305.18290", "lit_did"):
        assert identifier in text.partition("## Citation")[2]


def test_metrics_are_the_logged_ones_with_intervals(exported):
    text, module = exported
    rows = cells(text)
    logged = {n.removeprefix("val/"): float(v) for n, v in module.trainer.callback_metrics.items() if "val/" in n}
    assert len(logged) == 15
    assert [name for name in rows if name.startswith("`")][:3] == ["`loss`", "`reward_margin`", "`reward_accuracy`"]
    for name, value in logged.items():
        shown, _, interval = rows[f"`{name}`"].partition(" | ")
        assert float(shown) == pytest.approx(value, rel=1e-3, abs=1e-6)
        if name == "calibration_error":
            assert not interval.strip()
            continue
        low, high = map(float, interval.split(" to "))
        assert low <= float(shown) <= high
    assert f"Measured on {len(module.trainer.datamodule.val_dataset)} held-out pairs after 4 optimiser steps." in text


def test_the_metadata_is_the_hubs(exported):
    data = ModelCard(exported[0]).data
    assert data.library_name == "peft"
    assert data.pipeline_tag == "text-generation"
    assert {"dpo", "lit-did", "lora"} <= set(data.tags)
    assert data.base_model is None  # a folder on this machine is no name of the hub
    assert str(Path.cwd()) not in exported[0]


@pytest.mark.parametrize(("kind", "relation"), [("adapter", "adapter"), ("merged", "finetune"), ("full", "finetune")])
def test_a_base_model_of_the_hub(kind, relation):
    sources = {"train": ["org/data/config:train", "./mine.jsonl"], "val": ["org/data:test"]}
    text = card({"data": {"sources": sources}}, kind=kind, base_model="org/model")
    data = ModelCard(text).data
    assert (data.base_model, data.base_model_relation) == ("org/model", relation)
    assert relation in RELATIONS
    assert data.datasets == ["org/data"]
    assert data.library_name == ("peft" if kind == "adapter" else "transformers")
    assert "`org/model`" in text
    assert ("AutoPeftModelForCausalLM" in text) == (kind == "adapter")


def test_a_mixture_is_listed_with_its_weights(tiny_model, tmp_path):
    sources = {}
    for name, weight in (("a", 0.75), ("b", 2)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
        sources[tmp_path / f"{name}.jsonl"] = weight
    data = PreferenceDataModule(sources, str(tiny_model), max_length=64, as_chat=True)
    data.setup("fit")
    facts = json.loads(json.dumps(data.facts()))  # plain values
    assert cells(card({"data": facts}))["Training data"] == "`a.jsonl` (weight 0.75), `b.jsonl` (weight 2)"


def test_smollm2_is_named_as_on_the_hub():
    text = card(base_model=str((cache_folder() / SMOLLM2).resolve()))
    assert ModelCard(text).data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert "4-bit" in text


def test_what_is_unknown_has_no_line():
    text = card()
    assert not re.search(r"None|nan|## Data|## Training|\| beta|\{\{|\{%", text)
    assert "No validation was made" in text
    assert "a language model, fine-tuned" in text
    assert "\n\n\n" not in text


def test_a_validation_before_the_last_step_says_so():
    validation = {"step": 5, "metrics": {"num_pairs": [40.0], "loss": [0.5, 0.4, 0.6], "kl": [float("nan")]}}
    text = card({"validation": validation, "training": {"steps": 8}})
    assert "Measured on 40 held-out pairs after 5 optimiser steps. The weights are those after 8 steps." in text
    assert cells(text)["`loss`"] == "0.5 | 0.4 to 0.6"
    assert cells(text)["`kl`"].startswith("nan")


@pytest.mark.parametrize(
    ("loss", "shown"), [({"sigmoid": 0.8, "sft": 0.2}, "`0.8 sigmoid + 0.2 sft`"), (None, "a function of its own")]
)
def test_other_losses(loss, shown):
    arguments = {} if loss is None else {"loss": loss}
    assert cells(card(arguments=arguments | {"label_smoothing": 0.1, "gamma": None}))["Loss"] == shown


def test_the_sanity_check_is_no_validation(tiny_model, tmp_path):
    data = PreferenceDataModule(ROWS, str(tiny_model), val_fraction=0.25, batch_size=3, max_length=64, as_chat=True)
    module = LitDPO(str(tiny_model))
    trainer(max_steps=1, num_sanity_val_steps=1).fit(module, data)
    export_module(module, tmp_path / "out")
    assert "No validation was made" in (tmp_path / "out" / "README.md").read_text()


def test_a_loss_without_a_reference(tiny_model, tmp_path):
    module, _, _ = run(tmp_path / "run", str(tiny_model), loss="simpo", gamma=0.5)
    export_module(module, tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert {"`loss`", "`reward_margin`", "`chosen_logprob`"} <= cells(text).keys()
    assert "`kl`" not in text
    assert "compare the policy with its reference" not in text
    assert cells(text)["gamma"] == "0.5"


def test_text_of_a_run_breaks_no_table(tiny_model):
    sources = {"train": ["a|b`c\nd.jsonl"], "val": []}
    assert cells(card({"data": {"sources": sources}}))["Training data"] == "`a/b'c d.jsonl`"


def test_export_module_needs_a_tokenizer(tiny_model, tmp_path):
    module = LitDPO(str(tiny_model), optimizer=partial(torch.optim.SGD, lr=0.5))
    trainer(max_steps=1).fit(module, loader(make_pairs(2), 2))
    with pytest.raises(ValueError, match="Expected `tokenizer` to be given"):
        export_module(module, tmp_path / "out")
    export_module(module, tmp_path / "out", tokenizer=AutoTokenizer.from_pretrained(tiny_model))
    rows = cells((tmp_path / "out" / "README.md").read_text())
    assert (rows["Optimiser"], rows["Learning rate"]) == ("SGD", "0.5")
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(written.parameters(), module.policy.parameters(), strict=True))
