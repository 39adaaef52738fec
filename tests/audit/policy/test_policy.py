"""examine_policy with tiny models: against score_pairs, the operators in float64, sample_did and transformers."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch

import lit_did.audit.policy as module
from lit_did.audit.blocks import HeatMaps, Picture, SideBySide, Table
from lit_did.audit.policy import examine_policy
from lit_did.audit.policy.heat import MOST_TOKENS, notable_places, token_heat, token_text
from lit_did.audit.report import Estimate, Part
from lit_did.audit.settings import Settings
from lit_did.audit.source import AuditData
from lit_did.audit.statistics import share
from lit_did.data.dataset import PreferenceDataset
from lit_did.sampling import did_entropy_of_prompts
from lit_did.scoring import score_pairs
from lit_did.scoring.summary import summarize
from tests.audit.policy.planted import scored
from tests.modules.tiny import byte_tokenizer, tiny_llama

TOKENIZER = byte_tokenizer()
ROWS = [
    {
        "prompt": f"Question {i}? ",
        "chosen": "yes " * (1 + i % 4),
        "rejected": "no " * (5 - i % 5),
        "tag": "ab"[i % 2],
        "source": i % 3,
    }
    for i in range(48)
]
ROWS[5]["chosen"] = ""  # refused by the reader
ROWS[7]["chosen"] *= 30  # too long
SETTINGS = Settings(
    by=("source",),
    tokenization={"max_length": 80, "truncation": "drop"},
    num_prompts=2,
    max_new_tokens=3,
    progress=False,
)


def model(seed: int, dtype: torch.dtype = torch.float32):
    return tiny_llama(seed, vocab_size=len(TOKENIZER), max_position_embeddings=128).to(dtype).eval()


def adapted(seed: int):
    peft = pytest.importorskip("peft")
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return peft.get_peft_model(model(0), config).eval()


def examine(data=None, settings=SETTINGS, reference=None, policy=None, parts=None) -> Part:
    data = AuditData(ROWS, "pairs") if data is None else data
    return examine_policy(data, settings, TOKENIZER, reference or model(0), policy or model(1), parts or {})


@pytest.fixture(scope="module")
def part() -> Part:
    return examine()


@pytest.fixture(scope="module")
def frame():
    pytest.importorskip("pandas")
    with pytest.warns(UserWarning, match="left out|skipped"):
        return score_pairs(
            ROWS,
            model(1),
            model(0),
            tokenizer=TOKENIZER,
            max_length=80,
            truncation="drop",
            beta=0.1,
            batch_size=8,
            progress=False,
        )


def test_columns_are_score_pairs(part, frame):
    data = AuditData(ROWS, "pairs")
    assert [row.index for row in data.rows] == [i for i in range(48) if i != 5]
    for name, values in part.columns.items():
        by_row = dict(zip(data.row_numbers.tolist(), values, strict=True))
        assert [by_row[row] for row in frame["index"]] == frame[name].tolist(), name
        assert by_row[7] is None or math.isnan(by_row[7])
    assert {"margin", "reward_margin", "chosen_log_ratio", "rejected_kl", "truncated"} <= part.columns.keys()


def test_figures_are_those_of_lit_did_score(part, frame):
    summary = summarize(frame.to_dict("records"))
    assert part.figures["margin"][:3] == pytest.approx(tuple(summary["margin"]))
    assert part.figures["accuracy"][:3] == pytest.approx(tuple(summary["accuracy"]), abs=1e-4)
    for name in ("kl", "token_did_concentration"):
        found, expected = part.figures[name], summary[name]
        assert found.value == pytest.approx(expected.mean)
        width = expected.upper - expected.lower
        assert found[1:3] == pytest.approx((expected.lower, expected.upper), abs=0.15 * width)


def test_by_tag_and_column(part, frame):
    assert list(part.figures["by"]) == ["tag", "source"]
    mine = frame[[ROWS[row]["tag"] == "b" for row in frame["index"]]]
    found = part.figures["by"]["tag"]["b"]
    assert found["margin"].value == pytest.approx(mine["margin"].mean())
    assert found["accuracy"] == share(int((mine["margin"] > 0).sum()), len(mine))
    assert part.figures["by"]["source"]["0"]["margin"].count == 16  # too few prompts
    assert math.isnan(part.figures["by"]["source"]["0"]["margin"].value)
    [table] = [block for block in part.blocks if isinstance(block, Table) and block.title == "Length, by source"]
    assert table.rows[0][2:] == [None] * 3
    assert "fewer than 20 prompts" in table.note
    titles = [block.title for block in part.blocks if isinstance(block, Picture)]
    assert "Accuracy, by tag" in titles
    assert "Accuracy, by source" not in titles


def test_figures_are_no_texts(part):
    """Texts would sort as texts."""
    tables = [block for block in part.blocks if isinstance(block, Table)]
    cells = [cell for table in tables for row in table.rows for cell in row[1:]]
    assert {cell for cell in cells if isinstance(cell, str)} <= {"yes", "no"}
    [calibration] = [table for table in tables if table.title == "Calibration, by confidence"]
    assert all(isinstance(row[0], float) for row in calibration.rows)


def test_lengths_and_baselines_come_from_the_data():
    data = AuditData(ROWS, "pairs")
    chosen = np.arange(47) % 5 + 1.0
    earlier = Part(
        "data",
        "",
        "",
        columns={"chosen_words": chosen, "rejected_words": np.full(47, 3.0), "margin": chosen},
        figures={"baselines": {"longer": share(1, 2), "words": share(3, 10)}},
    )
    part = examine(data, parts={"data": earlier})
    assert "margin" not in part.columns  # an earlier part has it
    kept = data.row_numbers != 7
    [table] = [b for b in part.blocks if isinstance(b, Table) and b.title.startswith("Accuracy beside")]
    rows = {row[0]: row[1] for row in table.rows}
    assert rows["taking the longer side"].value == np.mean((np.sign(chosen - 3)[kept] + 1) / 2)
    assert rows["a bag-of-words classifier, held out"] == share(3, 10)


def test_too_little_data():
    part = examine(AuditData(ROWS[10:15], "pairs"))
    [finding] = [finding for finding in part.findings if finding.name == "too_little"]
    assert finding.sentence.startswith("Finite margins come from 5 prompts: too little data")
    assert math.isnan(part.figures["margin"].value)
    assert not any(finding.raised for finding in part.findings)


def test_margins_that_are_not_finite_are_named(monkeypatch):
    score = module.score_dataset

    def broken(*args, **options):
        for rows in score(*args, **options):
            for row in rows:
                if row["index"] in (12, 30):
                    row["chosen_log_ratio"] = row["margin"] = math.nan if row["index"] == 12 else math.inf
            yield rows

    monkeypatch.setattr(module, "score_dataset", broken)
    words = Part("data", "", "", columns={"words_probability": np.linspace(0.0, 1.0, 47)})
    found = examine(parts={"data": words})
    [finding] = [finding for finding in found.findings if finding.name == "not_finite"]
    assert finding.sentence.startswith(
        "Margins that are not finite are left out of every figure: those of 2 of 46 pairs, the first in row 12."
    )
    assert list(finding.rows) == [12, 30]
    kept = [m for row, m in zip([i for i in range(48) if i != 5], found.columns["margin"], strict=True) if row != 7]
    assert found.figures["margin"].value == pytest.approx(np.mean([m for m in kept if math.isfinite(m)]))
    heat = [pair.row for block in found.blocks if isinstance(block, HeatMaps) for pair in block.pairs]
    assert heat
    assert not {12, 30} & set(heat)


# ------------------------------------------------------------------------------------------------------- heat maps


def examples(rows) -> PreferenceDataset:
    return PreferenceDataset(AuditData(rows, "pairs").rows, TOKENIZER, 100, parse_special_tokens=False)


@torch.no_grad()
def plain_heat(ids, num_prompt, policy, reference):
    """Log-ratio, token DID entropy and likeliest tokens by a loop over tokens in float64."""
    z, r = (m(input_ids=torch.tensor([ids])).logits[0].double() for m in (policy, reference))
    for t in range(num_prompt - 1, len(ids) - 1):
        log_pi, log_rho = z[t].log_softmax(-1), r[t].log_softmax(-1)
        q = (z[t] - r[t]).softmax(-1)
        top = {"policy": log_pi.exp(), "reference": log_rho.exp(), "DID": q}
        token = ids[t + 1]
        best = {name: (p.topk(5).indices.tolist(), p.topk(5).values.tolist()) for name, p in top.items()}
        yield token, float(log_pi[token] - log_rho[token]), float(-(q * q.log()).sum()), best


@pytest.mark.parametrize("kind", ["models", "adapter"])
def test_heat_is_a_loop_in_float64(kind):
    policy, reference = (model(1), model(0)) if kind == "models" else (adapted(1), None)
    exact = copy.deepcopy(policy).double()
    base = model(0, torch.float64)
    for example in list(examples(ROWS[:3])):
        heat = token_heat(example, policy, reference)
        for side in ("chosen", "rejected"):
            ids = [*example.prompt_ids.tolist(), *getattr(example, f"{side}_ids").tolist()]
            expected = list(plain_heat(ids, len(example.prompt_ids), exact, base))
            tokens, log_ratios, entropies, best = zip(*expected, strict=True)
            assert heat[side].ids == list(tokens)
            assert heat[side].log_ratio == pytest.approx(log_ratios, abs=1e-4)
            assert heat[side].token_did_entropy == pytest.approx(entropies, abs=1e-4)
            for name, rows in heat[side].top.items():
                for row, of_place in zip(rows, best, strict=True):
                    assert [p for _, p in row] == pytest.approx(of_place[name][1], abs=1e-5)
                    assert [t for t, _ in row] == of_place[name][0]


def test_heat_of_turns_that_are_not_scored():
    turns = [
        {"role": role, "content": text}
        for role, text in [("assistant", "one"), ("user", "more?"), ("assistant", "two")]
    ]
    rows = [{"prompt": [{"role": "user", "content": "Go"}], "chosen": turns, "rejected": turns[:1]}]
    [example] = examples(rows)
    assert example.chosen_context is not None
    heat = token_heat(example, model(1), model(0))
    assert heat["chosen"].ids == example.chosen_ids.tolist()


def test_long_completions_are_cut():
    dataset = PreferenceDataset(
        AuditData([{"prompt": "a", "chosen": "b" * 300, "rejected": "c"}], "pairs").rows, TOKENIZER, 400
    )
    long = [tiny_llama(seed, vocab_size=len(TOKENIZER), max_position_embeddings=512).eval() for seed in (0, 1)]
    heat = token_heat(dataset[0], *long)
    assert len(heat["chosen"].log_ratio) == MOST_TOKENS
    assert heat["chosen"].num_tokens == 301


def test_a_token_outside_both_supports():
    class Masked(torch.nn.Module):
        def __init__(self, wrapped):
            super().__init__()
            self.wrapped = wrapped

        def forward(self, **inputs):
            output = self.wrapped(**inputs)
            output.logits[..., 3] = -math.inf
            return output

    heat = token_heat(examples(ROWS[:1])[0], Masked(model(1)), Masked(model(0)))
    assert all(math.isfinite(p) and t != 3 for row in heat["chosen"].top["DID"] for t, p in row)


def test_heat_maps_of_the_page(part, frame):
    maps = {block.title: block for block in part.blocks if isinstance(block, HeatMaps)}
    margins = frame.set_index("index")["margin"]
    order = margins.sort_values(kind="stable")
    assert [pair.row for pair in maps["Pairs that were learned most wrongly"].pairs] == order.index[:3].tolist()
    for block in maps.values():
        for pair in block.pairs:
            sums = {s: sum(token.values["log-ratio (nats)"] for token in tokens) for s, tokens in pair.sides.items()}
            assert sums["chosen"] - sums["rejected"] == pytest.approx(margins[pair.row], abs=1e-3)
            text = "".join(token.text for token in pair.sides["chosen"])
            assert text == ROWS[pair.row]["chosen"] + TOKENIZER.eos_token
            assert set(pair.sides["chosen"][0].top) == {"policy", "reference", "DID"}


def test_notable_places():
    pairs = scored([9.0, 0.1, -7.0, 5.0, -0.2, 8.0, 1.0, -6.0], np.zeros(8))
    assert notable_places(pairs, 2) == {"most": [0, 5], "least": [1, 4], "most wrongly": [2, 7]}
    assert notable_places(scored([1.0, 2.0], [0.0, 0.0]), 3) == {"most": [1, 0], "least": [], "most wrongly": []}


def test_token_text():
    class Pieces:
        def decode(self, ids):
            return {1: "word", 2: ""}[ids[0]]

        def convert_ids_to_tokens(self, token):
            return {1: "\u2581word", 2: "<odd>", 3: None}[token]

    assert [token_text(token, Pieces()) for token in (1, 2, 3)] == [" word", "<odd>", "<3>"]


# ----------------------------------------------------------------------------------------------------- completions


@pytest.mark.parametrize("kind", ["models", "adapter"])
def test_completions(kind):
    policy, reference = (model(1), model(0)) if kind == "models" else (adapted(1), None)
    data = AuditData(ROWS, "pairs")
    before = [(p.requires_grad, p.clone()) for p in policy.parameters()]
    part = examine_policy(data, SETTINGS, TOKENIZER, reference, policy, {})
    assert all(
        p.requires_grad == grad and torch.equal(p, value)
        for p, (grad, value) in zip(policy.parameters(), before, strict=True)
    )
    [block] = [block for block in part.blocks if isinstance(block, SideBySide)]
    assert len(block.items) == 2
    base = model(0)
    prompts = []
    for title, texts in block.items:
        prompt = title.split(": ", 1)[1]
        prompts.append(TOKENIZER(prompt)["input_ids"])
        for name, side in (("policy", policy), ("reference", base)):
            ids = torch.tensor([prompts[-1]])
            with torch.no_grad():
                for _ in range(3):
                    ids = torch.cat([ids, side(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
            answer = TOKENIZER.decode(ids[0, len(prompts[-1]) :], skip_special_tokens=True)
            assert texts[name] == f"{answer} ..."
    expected = did_entropy_of_prompts(policy, reference, prompts, max_new_tokens=3, progress=False)
    found = part.figures["did_entropy"]
    assert found == Estimate(expected.entropy.mean, expected.entropy.lower, expected.entropy.upper, 2)
    assert part.figures["did_entropy_reliable"] == expected.reliable
    [finding] = [finding for finding in part.findings if finding.name == "did_entropy"]
    assert finding.sentence.endswith("reliable." if expected.reliable else "not reliable.")


def test_prompts_differ_and_repeat_with_the_seed():
    rows = [{**row, "prompt": f"Question {i % 3}? "} for i, row in enumerate(ROWS[10:40])]
    settings = Settings(num_prompts=8, max_new_tokens=2, progress=False)
    items = [
        next(b for b in examine(AuditData(rows, "pairs"), settings).blocks if isinstance(b, SideBySide)).items
        for _ in range(2)
    ]
    assert items[0] == items[1]
    assert sorted(title.split(": ", 1)[1] for title, _ in items[0]) == [f"Question {i}? " for i in range(3)]


def test_no_room_for_completions():
    from tests.modules.tiny import tiny_gpt2

    pair = [tiny_gpt2(seed, vocab_size=len(TOKENIZER), n_positions=80).eval() for seed in (0, 1)]
    part = examine_policy(
        AuditData(ROWS, "pairs"),
        Settings(tokenization=SETTINGS.tokenization, max_new_tokens=75, progress=False),
        TOKENIZER,
        *pair,
        {},
    )
    assert "No prompt leaves room for 75 new tokens" in part.blocks[-1].text
