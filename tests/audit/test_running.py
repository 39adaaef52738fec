"""audit: its arguments, what runs and with which models, the verdict, the table and the figures."""

from __future__ import annotations

import importlib.util
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from lit_did.audit import audit
from lit_did.audit.plain import plain
from lit_did.audit.report import FLAGS, PARTS, Estimate, Finding
from lit_did.models.loading import add_lora
from tests.audit.parts import FINDINGS, ROWS, parts
from tests.modules.tiny import byte_tokenizer, tiny_llama

__all__ = ["parts"]  # a fixture


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def models(tokenizer):
    return [tiny_llama(seed, vocab_size=len(tokenizer)) for seed in (0, 1)]


# ----------------------------------------------------------------------------------------------------------------------
# What runs
# ----------------------------------------------------------------------------------------------------------------------


def test_the_data_alone(parts):
    found = audit(ROWS, val=ROWS[:2])
    assert list(found.parts) == ["data"]
    (val,) = parts.calls["data"]
    assert (val.name, len(val), len(val.skipped)) == ("val", 1, 1)
    assert (len(found.data), found.data.num_rows, len(found.data.skipped)) == (4, 5, 1)
    assert found.inputs == {"pairs": "a list", "val": "a list"}


def test_with_a_tokenizer(parts, tokenizer, tiny_model):
    assert list(audit(ROWS, tokenizer=tokenizer, max_length=64).parts) == ["data", "tokens"]
    assert parts.calls["tokens"] == (tokenizer,)
    found = audit(ROWS, tokenizer=tiny_model)
    assert len(parts.calls["tokens"][0]) == len(tokenizer)
    assert found.inputs["tokenizer"] == str(tiny_model)


def test_with_models(parts, models, tokenizer):
    reference, policy = models
    found = audit(ROWS, tokenizer=tokenizer, reference=reference, policy=policy, sides=True, beta=0.2, batch_size=2)
    assert tuple(found.parts) == PARTS
    assert parts.calls["reference"] == (tokenizer, reference)
    assert parts.calls["policy"] == parts.calls["sides"] == (tokenizer, reference, policy, found.parts)
    assert parts.calls["labels"] == (found.parts,)
    assert (found.settings.beta, found.settings.batch_size) == (0.2, 2)
    part = found.parts["reference"]
    assert (part.findings[-1].name, part.blocks[-1].text, list(part.columns)) == (
        "mislabelled",
        "labels",
        ["reference_value", "swap"],
    )


def test_a_reference_by_name(parts, tiny_model):
    found = audit(ROWS, reference=tiny_model, device="cpu", dtype=torch.bfloat16)
    assert list(found.parts) == ["data", "tokens", "reference"]
    _, model = parts.calls["reference"]
    assert (model.dtype, model.training) == (torch.bfloat16, False)
    assert found.inputs == {"pairs": "a list", "tokenizer": str(tiny_model), "reference": str(tiny_model)}


def test_models_that_share_weights_are_refused_before_a_part_runs(parts, models, tokenizer):
    model, _ = models
    with pytest.raises(ValueError, match="to be separate models, but they share parameters"):
        audit(ROWS, tokenizer=tokenizer, reference=model, policy=model)
    assert not parts.calls


def test_an_adapter_as_the_reference_of_sides_is_refused_before_a_part_runs(parts, tokenizer):
    reference = add_lora(tiny_llama(0, vocab_size=len(tokenizer)), {"r": 2, "target_modules": "all-linear"})
    with pytest.raises(ValueError, match="without an adapter for `sides`, but got a PeftModel"):
        audit(ROWS, tokenizer=tokenizer, reference=reference, sides=True)
    assert not parts.calls


def test_an_adapter_without_a_reference_has_its_base(parts, tokenizer, monkeypatch):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
    policy = peft.get_peft_model(tiny_llama(0, vocab_size=len(tokenizer)), config).eval()
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        base, tuned = tiny_llama(0, vocab_size=len(tokenizer))(ids).logits, policy(ids).logits
    given = []

    def function(module, name):
        def examine(data, settings, tokenizer_, *models, **_):
            with torch.no_grad():
                given.append((name, [None if m is None else m(ids).logits for m in models if not isinstance(m, dict)]))
            return plain_part(module)

        if name in ("examine_reference", "examine_policy"):
            return examine
        return original(module, name)

    from lit_did.audit import running
    from lit_did.audit.report import Part

    original, plain_part = running._function, lambda name: Part(name, name, "")
    monkeypatch.setattr(running, "_function", function)
    found = audit(ROWS, tokenizer=tokenizer, policy=policy)
    assert list(found.parts) == ["data", "tokens", "reference", "policy"]
    (_, (of_base,)), (_, (reference, of_policy)) = given
    assert reference is None
    torch.testing.assert_close(of_base, base)
    torch.testing.assert_close(of_policy, tuned)
    assert not torch.allclose(base, tuned)


def test_models_read_max_pairs_and_the_data_is_examined_whole(parts, models, tokenizer):
    options = {
        "tokenizer": tokenizer,
        "reference": models[0],
        "policy": models[1],
        "seed": 3,
        "columns": {"tag": "tag"},
    }
    found = audit(ROWS, max_pairs=2, **options)
    assert (len(found.data), found.data.num_rows, found.num_read) == (4, 5, 2)
    assert list(found.parts) == ["data", "tokens", "reference", "policy"]
    *_, seen = parts.calls["policy"]
    table = found.table()
    places = [place for place, value in enumerate(table["swap"]) if value is not None]
    assert (len(places), len(table["data_value"])) == (2, 5)
    assert [table["policy_value"][place] for place in places] == [0.0, None]
    known = found.parts["data"].columns["data_value"][found.data.row_numbers.searchsorted(places)]
    np.testing.assert_array_equal(seen["data"].columns["data_value"], known)
    sentence = "Models read 2 of the 4 pairs, drawn at random (`max_pairs`)."
    assert [part.blocks[0].text for part in found.parts.values()] == ["data", "tokens", sentence, sentence]
    assert found.table() == audit(ROWS, max_pairs=2, **options).table()
    assert found.figures()["settings"].items() >= {"max_pairs": 2, "columns": {"tag": "tag"}, "sides": False}.items()
    whole = audit(ROWS, max_pairs=4, **options)
    assert whole.table() == audit(ROWS, **options).table()


def test_duplicates_of_max_pairs_are_those_of_the_data(tiny_model, tokenizer):
    """What the real parts say of pairs that models do not read."""
    pytest.importorskip("sklearn")
    rows = [{"prompt": f"q{i // 2}", "chosen": f"yes {i // 2}", "rejected": "no"} for i in range(60)]
    found = audit(rows, reference=tiny_model, max_pairs=5, max_length=64, device="cpu")
    assert [len(finding.rows) for finding in found.findings if finding.name == "duplicates"] == [30]
    table = found.table()
    assert sum(value is not None for value in table["chosen_reference_logprob"]) == 5
    assert sum(value is not None for value in table["chosen_words"]) == 60


def test_warnings_of_the_reader(parts):
    with pytest.warns(UserWarning, match="prompt from `question`") as caught:
        audit([{"question": "a", "chosen": "b", "rejected": "c"}])
    assert len(caught) == 1


# ----------------------------------------------------------------------------------------------------------------------
# What is refused, before anything is read
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"beta": 0}, ValueError, r"Expected `beta` to be in \(0, inf\), but got 0"),
        ({"sides": 1}, TypeError, "Expected `sides` to be a bool"),
        ({"progress": None}, TypeError, "Expected `progress` to be a bool"),
        ({"max_pairs": 0}, ValueError, "Expected `max_pairs` to be an integer of at least 1"),
        ({"batch_size": 0}, ValueError, "Expected `batch_size` to be an integer of at least 1"),
        ({"num_prompts": 0}, ValueError, "Expected `num_prompts` to be an integer of at least 1"),
        ({"max_new_tokens": 1.5}, TypeError, "Expected `max_new_tokens` to be an integer"),
        ({"seed": -1}, ValueError, "Expected `seed` to be an integer of at least 0"),
        ({"by": ["a"]}, ValueError, "Expected `policy` with `by`, which has no effect without it"),
        ({"max_pairs": 3}, ValueError, "Expected `reference` or `policy` with `max_pairs`"),
        ({"by": "source"}, TypeError, "Expected `by` to be a list of names of columns, but got 'source'"),
        ({"columns": {"ask": "q"}}, ValueError, "Expected the keys of `columns`"),
        ({"tokenizer": "x", "max_length": 1}, ValueError, "Expected `max_length` to be an integer of at least 2"),
        ({"truncation": "drop"}, ValueError, "Expected `tokenizer` or `reference` or `policy` with `truncation`"),
        ({"max_length": 10}, ValueError, "Expected `tokenizer` or `reference` or `policy` with `max_length`"),
        ({"as_chat": True}, ValueError, "Expected `tokenizer` or `reference` or `policy` with `as_chat`"),
        ({"tokenizer": "x", "batch_size": 2}, ValueError, "Expected `reference` or `policy` with `batch_size`"),
        ({"dtype": torch.float64}, ValueError, "Expected `reference` or `policy` with `dtype`"),
        ({"reference": "x", "beta": 0.2}, ValueError, "Expected `policy` or `sides` with `beta`"),
        ({"reference": "x", "dtype": "float32"}, TypeError, "Expected `dtype` to be a floating-point dtype of torch"),
        ({"reference": "x", "device": "cude"}, ValueError, "Expected `device` to be a device of this machine"),
        ({"reference": 3}, TypeError, "Expected `reference` to be a model or its name, but got int"),
        ({"tokenizer": 3}, TypeError, "Expected `tokenizer` to be a tokenizer of transformers or its name"),
        ({"sides": True}, ValueError, "Expected `reference` with `sides`"),
        ({"reference": "./no"}, FileNotFoundError, "Expected `reference` to be a folder with a transformers model"),
        ({"policy": "./no"}, FileNotFoundError, "Expected `policy` to be a folder with a transformers model"),
    ],
)
def test_wrong_arguments(parts, arguments, error, message):
    with pytest.raises(error, match=message):
        audit("nowhere.jsonl", **arguments)
    assert not parts.calls


@pytest.mark.parametrize("options", [{"dtype": torch.bfloat16}, {"device": "cpu"}])
def test_options_of_loading_need_a_name(parts, models, tokenizer, tiny_model, options):
    (name,) = options
    with pytest.raises(ValueError, match=f"to be a name or path with `{name}`, .* but got LlamaForCausalLM"):
        audit(ROWS, reference=models[0], tokenizer=tokenizer, **options)
    assert not parts.calls
    assert audit(ROWS, reference=models[0], tokenizer=tokenizer).settings.device is None
    assert audit(ROWS, reference=tiny_model, device="cpu").settings.device == torch.device("cpu")


def test_a_policy_needs_a_reference(parts, models, tokenizer, tiny_model):
    for policy in (models[1], tiny_model):
        with pytest.raises(ValueError, match="Expected `reference` for a policy without an adapter"):
            audit("nowhere.jsonl", policy=policy, tokenizer=tokenizer)


def test_models_of_different_vocabularies(parts, models, tokenizer):
    with pytest.raises(ValueError, match="Expected `reference` to have the policy's vocabulary"):
        audit(ROWS, policy=models[0], reference=tiny_llama(), tokenizer=tokenizer)
    assert not parts.calls


def test_columns_that_by_names(parts, models, tokenizer):
    options = {"tokenizer": tokenizer, "reference": models[0], "policy": models[1]}
    assert audit(ROWS, by=["score", "tag"], **options).settings.by == ("score", "tag")
    with pytest.raises(ValueError, match=r"no row has 'source'\. It has `notes`, `score`, `tag`"):
        audit(ROWS, by=["source"], **options)


@pytest.mark.parametrize(
    ("module", "sides", "message"),
    [
        ("sklearn", False, r"An audit needs scikit-learn. Run pip install 'lit-did\[audit\]'"),
        ("matplotlib", False, "An audit needs matplotlib"),
        ("peft", True, r"`sides` needs the package peft. Run pip install 'lit-did\[lora\]'"),
    ],
)
def test_packages_that_are_missing(parts, monkeypatch, tiny_model, module, sides, message):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == module else find(name, *rest))
    with pytest.raises(ModuleNotFoundError, match=message):
        audit("nowhere.jsonl", sides=sides, reference=tiny_model if sides else None)


# ----------------------------------------------------------------------------------------------------------------------
# What comes out
# ----------------------------------------------------------------------------------------------------------------------


MANY = [ROWS[3] | {"prompt": f"Question {i}?"} for i in range(20)]


def test_the_verdict(parts):
    few = audit(ROWS).verdict
    assert [f.name for f in few] == ["contradictions", "identical", "unusable", "too_few_prompts"]
    assert few[-1].sentence.startswith("3 prompts are too few")
    assert audit(ROWS[:1]).verdict[-1].sentence.startswith("1 prompt is too few")
    assert [f.name for f in audit(MANY).verdict] == ["contradictions", "identical", "unusable"]


def test_faults_of_rows_come_first(parts):
    names = ["length_bias", "habits", "duplicates", "contradictions", "leaked", "empty_think"]
    parts.findings["data"] = [Finding(name, "", "", True, 1 - i / 10) for i, name in enumerate(names)]
    found = audit(MANY)
    assert [f.name for f in found.verdict] == [*names[2:], "length_bias"]
    assert [f.name for f in found.more] == ["habits"]
    assert {name for name, flag in FLAGS.items() if not flag.of_rows} == {
        *("length_bias", "habits", "off_policy"),
        *(name for name, flag in FLAGS.items() if flag.part == "policy"),
    }


def test_the_verdict_without_faults(parts):
    parts.findings["data"] = FINDINGS[3:]
    (only,) = audit(MANY).verdict
    assert (only.sentence, only.raised) == ("No flag was raised in 20 pairs.", False)


def test_the_verdict_of_a_policy(parts, models, tokenizer):
    learned = [Finding(f"fact {i}", "a.", "", False, i / 10) for i in range(3)]
    parts.findings["policy"] = [
        *learned,
        Finding("displacement", "b.", "", True, 0.3),
        Finding("overconfident", "c", "", False, 1),
    ]
    found = audit(MANY, tokenizer=tokenizer, reference=models[0], policy=models[1])
    assert [f.name for f in found.verdict] == ["contradictions", "identical", "displacement", "fact 2", "fact 1"]
    assert [f.name for f in found.more] == ["unusable"]
    parts.findings["data"] = []
    found = audit(MANY, tokenizer=tokenizer, reference=models[0], policy=models[1])
    assert [f.name for f in found.verdict] == ["displacement", "fact 2", "fact 1"]


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), SystemExit(1), RuntimeError("The disk is full.")])
@pytest.mark.parametrize("max_pairs", [None, 2])
@pytest.mark.parametrize("last", ["examine_tokens", "examine_reference", "examine_policy", "examine_labels"])
def test_what_was_found_before_a_stop_is_kept(parts, models, tokenizer, monkeypatch, stop, max_pairs, last):
    from lit_did.audit import running

    function = running._function

    def fail(*_, **__):
        raise stop

    monkeypatch.setattr(running, "_function", lambda module, name: fail if name == last else function(module, name))
    options = {"tokenizer": tokenizer, "reference": models[0], "policy": models[1], "max_pairs": max_pairs}
    with pytest.raises(type(stop)) as caught:
        audit(ROWS, **options)
    if last in ("examine_tokens", "examine_reference"):
        assert not hasattr(caught.value, "audit")
        return
    found = caught.value.audit
    assert len(found.table()["reference_value"]) == 5
    assert list(found.parts) == ["data", "tokens", "reference", "policy"][: 4 if last == "examine_labels" else 3]
    without = "`mislabelled`" if last == "examine_labels" else "the part `policy`"
    why = "RuntimeError: The disk is full." if isinstance(stop, Exception) else "an interrupt"
    assert found.verdict[0].sentence == f"This audit is incomplete, without {without}: {why} stopped it."
    assert found.figures()["stopped"] == why
    assert audit(ROWS).figures()["stopped"] is None


def test_the_table(parts):
    with pytest.warns(UserWarning, match="`flags` is `flags_source`"):
        table = audit([{"flags" if name == "notes" else name: row[name] for name in row} for row in ROWS]).table()
    assert table == {
        "index": [0, 1, 2, 3, 4],
        "where": [f"pairs, row {i}" for i in range(5)],
        "tag": ["maths", None, "maths", "", ""],
        "score": [0.5, None, None, None, None],
        "flags_source": [None, None, ["ö", None], None, None],
        "data_value": [0.0, None, None, 1.0, 1.5],
        "flags": ["contradictions", "unusable", "contradictions", "identical", ""],
        "refused": [None, "Expected `chosen` to be non-empty, but got an empty string.", None, None, None],
    }


def test_parts_with_the_same_column(parts, monkeypatch, models, tokenizer):
    found = audit(ROWS, tokenizer=tokenizer)
    found.parts["tokens"].columns = dict(found.parts["data"].columns)
    with pytest.raises(ValueError, match=r"tokens has \['data_value'\] too"):
        found.table()
    found.parts["tokens"].columns = {"a": [1]}
    with pytest.raises(ValueError, match="Expected a column with 4 values, one a pair, but got 1"):
        found.table()


def test_the_figures(parts, models, tokenizer):
    options = {"tokenizer": tokenizer, "reference": models[0], "policy": models[1]}
    found = audit(ROWS, by=["score"], columns={"tag": "tag"}, **options)
    figures = json.loads(json.dumps(found.figures(), allow_nan=False))
    assert (figures["num_rows"], figures["num_refused"], figures["num_pairs"]) == (5, 1, 4)
    assert figures["settings"]["by"] == ["score"]
    assert figures["settings"]["tokenization"]["max_length"] == 1024
    assert set(figures["versions"]) >= {"lit-did", "torch", "scikit-learn", "python"}
    assert figures["verdict"][0] == "2 pairs contradict. Keep one."
    assert figures["flags"] == ["contradictions", "identical", "unusable"]
    first, second, third, *_ = figures["findings"]
    assert (first["rows"], first["dropped"], first["evidence"]) == ([2, 0], [2], {"2": "swaps row 0"})
    assert second["value"] == {"value": 0.25, "lower": 0.1, "upper": 0.5, "count": 4}
    assert third["rows"] == [1]
    assert figures["parts"]["data"] == {
        "accuracy": {"value": 0.5, "lower": None, "upper": None, "count": 0},
        "counts": {"1": 2},
        "none": [None],
    }


def test_plain_values():
    given = {"a": np.float32("nan"), 2: {"b": torch.float16, "c": {2, 1}}, "d": Estimate(math.inf), "e": np.bool_(True)}
    estimate = {"value": None, "lower": None, "upper": None, "count": 0}
    assert plain(given) == {"a": None, "2": {"b": "float16", "c": [1, 2]}, "d": estimate, "e": True}


def test_every_flag_belongs_to_a_part():
    assert {flag.part for flag in FLAGS.values()} <= set(PARTS)


def test_docs_list_every_flag():
    page = Path(__file__).parents[2] / "docs" / "audit.md"
    if not page.exists():
        pytest.skip("not a clone: there are no pages")
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| (.*) \|$", page.read_text(), re.MULTILINE)
    assert rows == [(name, flag.part, flag.meaning) for name, flag in FLAGS.items()]
