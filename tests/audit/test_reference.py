"""examine_reference against plain forward passes in float64, and against its own samples."""

import copy
import math

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from lit_did.audit.reference import cost, examine_reference, measuring
from lit_did.audit.reference.measuring import edit_similarity
from lit_did.audit.settings import Settings
from lit_did.audit.source import AuditData
from lit_did.models.quiet import adapter_off
from tests.modules.tiny import byte_tokenizer, tiny_gpt2, tiny_llama

TOKENIZER = byte_tokenizer()
SETTINGS = Settings(batch_size=3, progress=False)
ROWS = [
    {"prompt": "a question", "chosen": "an answer", "rejected": "another one"},
    {"prompt": "what", "chosen": "x", "rejected": "yes, of course"},
    {"prompt": "a longer question than that", "chosen": "no", "rejected": "no."},
    {"prompt": "what", "chosen": "an answer of some length here", "rejected": "an answer of some length there"},
]


@pytest.fixture(autouse=True)
def _no_step(monkeypatch):
    monkeypatch.setattr(cost, "measure_step", lambda reference, batch: (0.5, 2.0**30))


def model(make=tiny_llama, seed=0, dtype=torch.float64):
    return make(seed, vocab_size=len(TOKENIZER)).to(dtype).eval()


def examine(rows, reference, settings=SETTINGS):
    return examine_reference(AuditData(rows, "pairs"), settings, TOKENIZER, reference)


def plain(reference, prompt, completion):
    """Log-probability, entropy, excess and z by the formulas, and the last hidden states; one sequence alone."""
    before = TOKENIZER(prompt)["input_ids"]
    ids = before + TOKENIZER(completion)["input_ids"] + [TOKENIZER.eos_token_id]
    with torch.no_grad():
        output = reference(torch.tensor([ids]), output_hidden_states=True)
    logp = output.logits[0].log_softmax(-1)
    places = range(len(before) - 1, len(ids) - 1)
    surprisal = np.array([-logp[t, ids[t + 1]].item() for t in places])
    entropy = np.array([-(logp[t].exp() * logp[t]).sum().item() for t in places])
    hidden = output.hidden_states[-1][0, len(before) - 1 : len(ids) - 1].numpy()
    excess = surprisal - entropy
    return -surprisal.sum(), entropy.mean(), excess.mean(), excess.sum() / math.sqrt((excess**2).sum()), hidden


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_columns_equal_a_plain_forward_pass(make):
    reference = model(make)
    part = examine(ROWS, reference)
    states, ends = [], []
    for i, row in enumerate(ROWS):
        sides, last = [], []
        for side in ("chosen", "rejected"):
            logprob, entropy, excess, _, hidden = plain(reference, row["prompt"], row[side])
            assert part.columns[f"{side}_reference_logprob"][i] == pytest.approx(logprob, rel=1e-9)
            assert part.columns[f"{side}_reference_entropy"][i] == pytest.approx(entropy, rel=1e-9)
            assert part.columns[f"{side}_excess"][i] == pytest.approx(excess, rel=1e-7, abs=1e-9)
            assert part.columns[f"{side}_num_tokens"][i] == len(row[side]) + 1
            sides.append(hidden.mean(0))
            last.append(hidden[-1])
        states.append(sides)
        ends.append(last[0] - last[1])
    h = np.array(states)
    difference = h[:, 0] - h[:, 1]
    assert np.allclose(part.hidden_difference, difference, rtol=1e-4, atol=1e-5)
    assert np.allclose(part.end_difference, ends, rtol=1e-4, atol=1e-5)
    # Razin et al. 2024, with sums over tokens, each divided by its number of tokens
    for i, (w, other) in enumerate(states):
        n_w, n_l = part.columns["chosen_num_tokens"][i], part.columns["rejected_num_tokens"][i]
        score = np.dot(w * n_w, other * n_l) / (n_w * n_l) - np.dot(w * n_w, w * n_w) / n_w**2
        assert part.columns["ches"][i] == pytest.approx(score, rel=1e-4, abs=1e-4)
        assert part.columns["hidden_cosine"][i] == pytest.approx(
            np.dot(w, other) / np.linalg.norm(w) / np.linalg.norm(other), rel=1e-5
        )


def test_the_tokens_of_both_sides_are_counted():
    part = examine(ROWS, model())
    for side, counts in zip(("chosen", "rejected"), part.token_counts, strict=True):
        expected = [np.bincount(TOKENIZER(row[side])["input_ids"] + [TOKENIZER.eos_token_id]) for row in ROWS]
        for own, by_hand in zip(counts.toarray(), expected, strict=True):
            assert own[: len(by_hand)].tolist() == by_hand.tolist()
            assert own.sum() == by_hand.sum()


def test_tokens_of_large_data_are_not_counted(monkeypatch):
    monkeypatch.setattr("lit_did.audit.reference._COUNTED", len(ROWS))
    assert examine(ROWS, model()).token_counts is not None
    monkeypatch.setattr("lit_did.audit.reference._COUNTED", len(ROWS) - 1)
    assert examine(ROWS, model()).token_counts is None


def test_a_reference_is_measured_with_its_adapter():
    """An adapter that fine-tuning has made is part of the reference, unless the caller switches it off."""
    base = model(dtype=torch.float32)
    without = examine(ROWS, copy.deepcopy(base)).columns["chosen_reference_logprob"]
    torch.manual_seed(0)
    tuned = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False))
    expected = examine(ROWS, copy.deepcopy(tuned).merge_and_unload()).columns["chosen_reference_logprob"]
    assert not np.allclose(expected, without, rtol=1e-5)
    assert np.allclose(examine(ROWS, tuned).columns["chosen_reference_logprob"], expected, rtol=1e-5)
    with adapter_off(tuned):
        assert np.allclose(examine(ROWS, tuned).columns["chosen_reference_logprob"], without, rtol=1e-5)
    assert tuned.active_adapter == "default"


def test_own_samples_are_on_policy_and_others_are_not():
    """The excess of samples at temperature 1 is 0 within its interval; that of improbable bytes is far above."""
    reference = model(dtype=torch.float32, seed=1)
    torch.manual_seed(0)
    alphabet = torch.tensor([i for i in range(len(TOKENIZER)) if TOKENIZER.decode([i]).isascii()])
    mask = torch.full((len(TOKENIZER),), -math.inf)
    mask[alphabet] = 0
    reference.lm_head = _Masked(reference.lm_head, mask)  # so that text and tokens are one to one
    samples, unlikely = [], []
    with torch.no_grad():
        for _ in range(60):
            ids = [60]
            worst = [60]
            for _ in range(30):
                ids.append(int(reference(torch.tensor([ids])).logits[0, -1].softmax(-1).multinomial(1)))
                logits = reference(torch.tensor([worst])).logits[0, -1]
                worst.append(int(alphabet[logits[alphabet].argmin()]))
            samples.append(ids[1:])
            unlikely.append(worst[1:])
    from lit_did.audit.reference import _off_policy
    from lit_did.audit.reference.measuring import measure
    from lit_did.data.dataset import Example

    pairs = [
        Example(np.array([60], np.int32), np.array(a, np.int32), np.array(b, np.int32), i, 1.0)
        for i, (a, b) in enumerate(zip(samples, unlikely, strict=True))
    ]
    answers = measure(pairs, reference, 8, progress=False)  # type: ignore[arg-type]
    groups = np.arange(60)
    finding, excess = _off_policy(answers, groups, groups)
    assert excess["chosen"].lower < 0 < excess["chosen"].upper
    assert excess["chosen"].upper - excess["chosen"].lower < 0.3
    assert excess["rejected"].lower > 1
    assert finding.raised
    assert len(finding.rows) == 60
    assert finding.dropped == ()  # the advice is to train the reference, not to drop pairs
    own, _ = _off_policy(answers._replace(rejected=answers.chosen), groups, groups)
    assert not own.raised
    assert not own.rows


class _Masked(torch.nn.Module):
    def __init__(self, layer, mask):
        super().__init__()
        self.layer, self.mask = layer, mask

    def forward(self, hidden):
        return self.layer(hidden) + self.mask


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ("kitten", "sitting", 1 - 3 / 7),
        ("abc", "abc", 1),
        ("abc", "xyz", 0),
        ("abcdef", "f", 1 / 6),
        ("", "", 1),
        ("", "a", 0),
    ],
)
def test_edit_similarity(one, other, expected):
    assert edit_similarity(list(map(ord, one)), list(map(ord, other))) == pytest.approx(expected)
    assert edit_similarity(list(map(ord, other)), list(map(ord, one))) == pytest.approx(expected)


def test_near_identical_sides():
    generator = np.random.default_rng(0)

    def text(count):
        return "".join(generator.choice(list("abcdefghij "), count))

    rows = [{"prompt": text(9), "chosen": text(40), "rejected": text(40)} for _ in range(30)]
    assert not examine(rows, model()).findings[1].raised
    rows[4]["rejected"] = rows[4]["chosen"][:-1] + "k"
    assert not examine([*rows, *rows[:3], *rows[5:]], model()).findings[1].raised  # 1 of 59 may be chance
    rows[17]["rejected"] = rows[17]["chosen"][:-1] + "k"
    finding = examine(rows, model()).findings[1]
    assert finding.name == "indistinct"
    assert finding.raised
    assert sorted(finding.rows) == [4, 17]
    assert finding.value.value == 2 / 30


def test_tokens_of_an_epoch():
    part = examine(ROWS, model())
    figures = part.figures["cost"]
    lengths = [(len(r["prompt"]), len(r["chosen"]) + 1, len(r["rejected"]) + 1) for r in ROWS]
    assert figures["tokens"] == sum(2 * p + c + r for p, c, r in lengths)
    assert figures["shared_tokens"] == figures["tokens"] - 10 - 27  # prompts of at least 8 tokens
    order = np.random.default_rng(0).permutation(4)
    padded = sum(2 * len(b) * max(lengths[i][0] + max(lengths[i][1:]) for i in b) for b in (order[:3], order[3:]))
    assert figures["padded_tokens"] == padded
    assert figures["fill"] == figures["tokens"] / padded
    assert figures["epoch_seconds"] == pytest.approx(0.5 * figures["tokens"] / figures["step_tokens"])


def test_values_that_are_not_finite_are_counted_and_named():
    reference = model()
    with torch.no_grad():
        reference.get_input_embeddings().weight[TOKENIZER("!")["input_ids"]] = math.nan
    rows = [*ROWS, {"prompt": "why", "chosen": "fine", "rejected": "no!"}]
    part = examine(rows, reference)
    assert part.findings[0].name == "not_finite"
    assert list(part.findings[0].rows) == [4]
    assert "1 of 5 pairs" in part.findings[0].sentence
    assert part.figures["num_not_finite"] == 1
    assert math.isnan(part.columns["rejected_reference_logprob"][4])
    assert math.isfinite(part.figures["logprob_per_token"]["rejected"].value)


def test_shares_have_intervals_within_0_and_1():
    rows = [{**ROWS[0], "prompt": str(number)} for number in range(3)]
    found = examine(rows, model()).figures["reference_prefers_chosen"]["in total"]
    assert 0 <= found.lower < found.upper <= 1


def test_hidden_states_of_many_dimensions_are_projected(monkeypatch):
    whole = examine(ROWS, model()).hidden_difference
    monkeypatch.setattr(measuring, "PROJECTED", 5)
    part = examine(ROWS, model())
    draws = np.random.default_rng(0).standard_normal((whole.shape[1], 5), dtype=np.float32)
    assert np.allclose(part.hidden_difference, whole @ draws / math.sqrt(5), rtol=1e-4, atol=1e-5)
    assert examine(ROWS, model()).columns["ches"] == part.columns["ches"]


def test_pairs_that_are_left_out_have_no_figures():
    rows = [*ROWS, {"prompt": "p" * 50, "chosen": "c", "rejected": "r"}]
    part = examine(rows, model(), Settings(tokenization={"max_length": 45, "truncation": "drop"}, progress=False))
    assert [math.isnan(value) for value in part.columns["ches"]] == [False] * 4 + [True]
    assert part.figures["num_pairs"] == 4


def test_a_step_is_measured_on_a_copy(monkeypatch):
    monkeypatch.undo()
    reference = model(dtype=torch.float32)
    before = {name: value.clone() for name, value in reference.state_dict().items()}
    modes, state = [m.training for m in reference.modules()], torch.get_rng_state()
    part = examine(ROWS, reference)
    assert part.figures["cost"]["step_seconds"] > 0
    assert part.figures["cost"]["step_peak_bytes"] > 2**20
    assert "A step of LitDPO" in part.blocks[-1].text
    assert all(torch.equal(value, before[name]) for name, value in reference.state_dict().items())
    assert modes == [m.training for m in reference.modules()]
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.requires_grad and p.grad is None for p in reference.parameters())


def test_a_step_that_cannot_be_measured(monkeypatch):
    def fail(*_):
        raise RuntimeError("no room")

    monkeypatch.setattr(cost, "measure_step", fail)
    part = examine(ROWS, model())
    assert part.figures["cost"]["step_not_measured"] == "it failed with RuntimeError: no room"
    assert part.blocks[-1].text == "No training step was measured, because it failed with RuntimeError: no room."
    monkeypatch.setattr(cost, "LONGEST", 0.0)
    assert examine(ROWS, model()).figures["cost"]["step_not_measured"].startswith("it would take about")
