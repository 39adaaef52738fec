"""score_pairs: a row a pair with the numbers of LitDPO's predict_step and of plain transformers."""

from __future__ import annotations

import copy
import json
import math
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from lit_did import LitDPO, PreferenceDataModule
from lit_did.ops import SequenceStatistics
from lit_did.scoring import PairScorer, score_pairs
from tests.modules.tiny import byte_tokenizer, tiny_gpt2, tiny_llama, trainer

pandas = pytest.importorskip("pandas")
ROWS = [
    {"prompt": f"Question {i}? " + "go on " * (i % 3), "chosen": "yes " * (1 + i % 4), "rejected": "no " * (5 - i % 5)}
    for i in range(9)
]
OPTIONS = {"tokenizer": byte_tokenizer(), "progress": False}


def model(seed: int, dtype: torch.dtype = torch.float32):
    return tiny_llama(seed, vocab_size=300, max_position_embeddings=256).to(dtype).eval()


@torch.no_grad()
def plain(row, policy, reference, tokenizer) -> dict[str, float]:
    """A pair's row by a loop over its tokens in float64."""
    values = {}
    prompt = tokenizer(row["prompt"])["input_ids"]
    for side in ("chosen", "rejected"):
        ids = tokenizer(row["prompt"] + row[side])["input_ids"] + [tokenizer.eos_token_id]
        logits = [m(torch.tensor([ids])).logits[0].double() for m in (policy, reference)]
        tokens = []
        for t in range(len(prompt) - 1, len(ids) - 1):
            log_pi, log_rho = (x[t].log_softmax(-1) for x in logits)
            log_q = (log_pi - log_rho).log_softmax(-1)
            entropies = [-(p.exp() * p).sum() for p in (log_q, log_pi, log_rho)]
            kl, reverse = (log_pi.exp() * (log_pi - log_rho)).sum(), (log_rho.exp() * (log_rho - log_pi)).sum()
            log_partition = (log_pi - log_rho).logsumexp(-1)
            tokens.append([log_pi[ids[t + 1]], log_rho[ids[t + 1]], *entropies, kl, reverse, log_partition])
        logprob, reference_logprob, did, entropy, reference_entropy, kl, reverse, partition = torch.tensor(tokens).T
        values |= {
            f"{side}_policy_logprob": logprob.sum(),
            f"{side}_reference_logprob": reference_logprob.sum(),
            f"{side}_log_ratio": (logprob - reference_logprob).sum(),
            f"{side}_token_did_entropy": did.mean(),
            f"{side}_token_did_concentration": math.log(300) - did.mean(),
            f"{side}_policy_entropy": entropy.mean(),
            f"{side}_reference_entropy": reference_entropy.mean(),
            f"{side}_kl": kl.mean(),
            f"{side}_reverse_kl": reverse.mean(),
            f"{side}_token_did_log_partition": partition.sum(),
            f"{side}_num_tokens": len(tokens),
        }
    margin = values["chosen_log_ratio"] - values["rejected_log_ratio"]
    return {**values, "margin": margin, "reward_margin": 0.3 * margin, "prompt_num_tokens": len(prompt)}


def test_equals_a_plain_loop_in_float64():
    policy, reference, tokenizer = model(0, torch.float64), model(1, torch.float64), OPTIONS["tokenizer"]
    frame = score_pairs(ROWS, policy, reference, beta=0.3, batch_size=4, **OPTIONS)
    assert frame["index"].tolist() == list(range(9))
    assert not frame["truncated"].any()
    for row, scored in zip(ROWS, frame.to_dict("records"), strict=True):
        expected = plain(row, policy, reference, tokenizer)
        assert set(scored) == {*expected, "index", "truncated"}
        assert {name: scored[name] for name in expected} == pytest.approx({n: float(v) for n, v in expected.items()})


def test_equals_predict_step():
    policy, reference = model(0), model(1)
    data = {"max_length": 48, "truncation": "prompt", "as_chat": True}
    with pytest.warns(UserWarning, match="are longer than max_length=48"):
        frame = score_pairs(ROWS, policy, reference, beta=0.1, batch_size=2, **data, **OPTIONS)
    module = LitDPO(copy.deepcopy(policy), reference, beta=0.1)
    with pytest.warns(UserWarning, match="are longer than max_length=48"):
        batches = trainer().predict(
            module, PreferenceDataModule(None, OPTIONS["tokenizer"], predict=ROWS, batch_size=4, **data)
        )
    for side in ("chosen", "rejected"):
        for name in SequenceStatistics._fields:
            expected = torch.cat([getattr(getattr(batch, side), name) for batch in batches])
            torch.testing.assert_close(torch.tensor(frame[f"{side}_{name}"]).to(expected), expected)
    rewards = torch.cat([batch.reward_margin for batch in batches])
    torch.testing.assert_close(torch.tensor(frame["reward_margin"]).float(), rewards, rtol=1e-4, atol=1e-5)
    assert 0 < frame["truncated"].sum() < len(ROWS)


def test_the_models_stay_as_they_are():
    policy, reference = model(0).train(), model(1).train()
    before = copy.deepcopy(policy.state_dict())
    score_pairs(ROWS[:2], policy, reference, **OPTIONS)
    assert policy.training
    assert reference.training
    assert all(parameter.requires_grad for m in (policy, reference) for parameter in m.parameters())
    assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())


def test_an_adapter_is_compared_with_its_base():
    peft = pytest.importorskip("peft")
    base = model(0)
    config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    policy = peft.get_peft_model(copy.deepcopy(base), config)
    with_base = score_pairs(ROWS, policy, base, **OPTIONS)
    assert with_base["margin"].abs().min() > 1e-3
    pandas.testing.assert_frame_equal(score_pairs(ROWS, policy, **OPTIONS), with_base, rtol=1e-4, atol=1e-4)


def test_models_by_name(tiny_model):
    frame = score_pairs(ROWS[:2], tiny_model, tiny_model, dtype=torch.float64, device="cpu", progress=False)
    assert frame["margin"].tolist() == [0, 0]


def test_the_folder_of_an_adapter(tiny_model, tmp_path):
    """Its base is the reference, and its base's tokenizer is used."""
    peft = pytest.importorskip("peft")
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    policy = peft.get_peft_model(base, config)
    policy.save_pretrained(tmp_path)
    frame = score_pairs(ROWS[:3], tmp_path, device="cpu", progress=False)
    assert frame["margin"].abs().min() > 1e-3
    pandas.testing.assert_frame_equal(frame, score_pairs(ROWS[:3], policy, **OPTIONS), rtol=1e-4, atol=1e-4)
    with_base = score_pairs(ROWS[:3], tmp_path, tiny_model, device="cpu", progress=False)
    pandas.testing.assert_frame_equal(frame, with_base, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"reference": None}, ValueError, "Expected `reference` for a policy without an adapter"),
        ({"reference": "adapter"}, ValueError, "Expected `reference` to be a model, but got 'adapter', which is for"),
        ({"reference": "./nowhere"}, FileNotFoundError, r"Expected `reference` to be a folder .* nowhere is not a"),
        ({"reference": tiny_gpt2()}, ValueError, "Expected `reference` to have the policy's vocabulary"),
        ({"tokenizer": None}, ValueError, "Expected `tokenizer` for a policy that was not loaded by name"),
        ({"batch_size": 0}, ValueError, "Expected `batch_size` to be an integer of at least 1"),
        ({"beta": 0.0}, ValueError, r"Expected `beta` to be in \(0, inf\)"),
        ({"max_lenght": 3}, TypeError, "unexpected keyword argument 'max_lenght'"),
        ({"texts": 1}, TypeError, "Expected `texts` to be a bool"),
        ({"pairs": "nowhere.jsonl"}, FileNotFoundError, "Expected a data file, but nowhere.jsonl does not exist"),
    ],
)
def test_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        score_pairs(**{"pairs": ROWS[:2], "policy": model(0), "reference": model(1), **OPTIONS, **arguments})


def test_a_folder_without_an_adapter_needs_a_reference(tiny_model):
    with pytest.raises(ValueError, match="Expected `reference` for a policy without an adapter"):
        score_pairs("nowhere.jsonl", tiny_model)  # before anything is read


def test_a_model_that_is_broken():
    broken = model(0)
    broken.lm_head.weight.data[:] = torch.nan
    with pytest.warns(UserWarning, match=r"The margins of 2 of 2 pairs are not finite. The first is row 0"):
        frame = score_pairs(ROWS[:2], broken, model(1), **OPTIONS)
    assert frame["margin"].isna().all()


def test_a_tokenizer_of_another_model():
    small = tiny_llama(vocab_size=100, max_position_embeddings=256)
    with pytest.raises(ValueError, match=r"Expected .* below .*100"):
        score_pairs(ROWS[:2], small, copy.deepcopy(small), **OPTIONS)


def test_without_pandas(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs pandas. Run pip install 'lit-did\[tables\]'"):
        score_pairs("nowhere.jsonl", "nowhere")  # before anything is read


def test_rows_that_are_left_out_are_reported():
    rows = [*ROWS * 3, {**ROWS[0], "chosen": ""}, {**ROWS[0], "chosen": "long " * 50}]
    with pytest.warns(UserWarning, match="rows") as warned:
        frame = score_pairs(rows, model(0), model(1), max_length=128, truncation="drop", **OPTIONS)
    assert frame["index"].tolist() == list(range(27))
    texts = [str(warning.message) for warning in warned]
    assert sum("1 of 29 rows cannot be trained on and is skipped" in text for text in texts) == 1
    assert sum("1 of 29 rows are longer than max_length=128 and are left out" in text for text in texts) == 1


@pytest.mark.parametrize("batch_size", [1, 4, 50])
def test_goes_on_after_any_batch_with_the_same_bits(batch_size):
    whole = PairScorer(ROWS, OPTIONS["tokenizer"], batch_size=batch_size)
    whole.load(model(0), model(1))
    batches = list(whole.batches(progress=False))
    assert len(batches) == whole.num_batches
    for start in range(whole.num_batches + 1):
        again = PairScorer(ROWS, OPTIONS["tokenizer"], batch_size=batch_size)
        again.load(model(0), model(1))
        assert list(again.batches(start, progress=False)) == batches[start:]


def test_a_run_that_goes_on_chooses_the_same_layouts(monkeypatch):
    """Of a model that is right for short sequences only, in packed batches."""
    from lit_did.models import trial

    def tried(start: int) -> list[tuple]:
        scorer = PairScorer(ROWS, OPTIONS["tokenizer"], batch_size=1)
        models = scorer.load(model(0), model(1))
        list(scorer.batches(start, progress=False))
        return trial._known[models.policy].found

    assert tried(0) == tried(5)


def test_the_sources_columns(tmp_path):
    rows = [{**row, "tag": f"t{i}", "score": i / 2, "meta": {"a": [i]}} for i, row in enumerate(ROWS[:3])]
    del rows[1]["score"]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    for source in (rows, path):
        frame = score_pairs(source, model(0), model(1), **OPTIONS)
        assert frame["tag"].tolist() == ["t0", "t1", "t2"]
        assert frame["meta"].tolist() == [{"a": [0]}, {"a": [1]}, {"a": [2]}]
        assert frame["score"].isna().tolist() == [False, True, False]
        assert "chosen" not in frame
    texts = score_pairs(rows, model(0), model(1), texts=True, **OPTIONS)
    assert texts["chosen"].tolist() == [row["chosen"] for row in rows]
