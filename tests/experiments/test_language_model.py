"""What the experiments on a language model are made of, and both of them whole, on a tiny random one."""

from __future__ import annotations

import csv
import math

import pytest
import torch
from torch.utils.data import DataLoader

from lit_did.experiments import __main__ as command
from lit_did.experiments import entropy, language_model, tempered
from lit_did.experiments.language_model import LanguageModel, batch_of, sample, score, train
from lit_did.models.loading import add_lora
from tests.modules.tiny import byte_tokenizer, tiny_llama


@pytest.fixture(scope="module")
def tiny() -> LanguageModel:
    tokenizer = byte_tokenizer()
    model = tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=1024, eos_token_id=tokenizer.eos_token_id)
    return LanguageModel(model.eval().requires_grad_(False), tokenizer)


def untrained_policy(tiny: LanguageModel, scale: float = 0.0):
    policy = add_lora(tiny_llama(vocab_size=tiny.model.config.vocab_size, max_position_embeddings=1024), {"r": 2})
    generator = torch.Generator().manual_seed(0)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=scale, generator=generator)
    return policy.eval()


# --- language_model ---------------------------------------------------------------------------------------------------


def test_samples_are_the_models_and_end_once(tiny):
    prompt = torch.tensor([[5, 6, 7]])
    model = tiny_llama(vocab_size=9, eos_token_id=[2, 3])
    draws = sample(model, prompt, count=3000, max_new_tokens=6, seed=0, temperature=0.5)
    assert torch.equal(draws, sample(model, prompt, count=3000, max_new_tokens=6, seed=0, temperature=0.5))
    for row in draws[:200].tolist():
        ends = [i for i, token in enumerate(row) if token in (2, 3)]
        assert ends == [row.index(-1) - 1] if -1 in row else ends in ([], [5])
        assert -1 not in row or set(row[row.index(-1) :]) == {-1}
    assert (draws == -1).any()
    with torch.no_grad():
        chance = (model(prompt).logits[0, -1].double() / 0.5).softmax(-1)
    z = (draws[:, 0].bincount(minlength=9) - 3000 * chance) / (3000 * chance * (1 - chance)).sqrt()
    assert z.abs().max() < 5  # of nine standard normal numbers: all tokens may come, not the likeliest alone


def test_scores_are_the_completions(tiny):
    policy, prompt = untrained_policy(tiny, 0.5), torch.tensor([[70, 71, 72]])
    completions = torch.tensor([[80, 81, 82], [90, -1, -1]])
    statistics = score(policy, prompt, completions)
    assert statistics.num_tokens.tolist() == [3, 1]
    for row, completion in enumerate([[80, 81, 82], [90]]):
        ids = torch.cat([prompt[0], torch.tensor(completion)])[None]
        with torch.no_grad():
            logits = [policy(ids).logits[0, 2:-1], tiny.model(ids).logits[0, 2:-1]]
        expected = [float(x.log_softmax(-1).gather(1, ids[0, 3:, None]).sum()) for x in logits]
        assert statistics.policy_logprob[row].item() == pytest.approx(expected[0], abs=1e-4)  # float32
        assert statistics.reference_logprob[row].item() == pytest.approx(expected[1], abs=1e-4)
    assert abs(statistics.log_ratio).min() > 1e-3


def test_scores_keep_their_order_whatever_the_lengths(tiny):
    policy = untrained_policy(tiny, 0.5)
    generator = torch.Generator().manual_seed(0)
    sequences = [
        tuple(torch.randint(60, 120, shape, generator=generator) for shape in ((1, int(t)), (int(n),)))
        for t, n in torch.randint(1, 12, (19, 2), generator=generator)
    ]
    both, alone = (
        language_model.score_all(policy, tiny.model, sequences),
        language_model.score_all(policy, None, sequences),
    )
    for row, (prompt, completion) in enumerate(sequences):
        one = score(policy, prompt, completion[None])
        assert both.num_tokens[row] == alone.num_tokens[row] == len(completion)
        # float32, in batches of other lengths
        assert both.log_ratio[row].item() == pytest.approx(one.log_ratio.item(), abs=1e-4)
        assert both.token_did_entropy[row].item() == pytest.approx(one.token_did_entropy.item(), abs=1e-4)
        assert alone.policy_logprob[row].item() == pytest.approx(one.policy_logprob.item(), abs=1e-4)
        assert alone.policy_entropy[row].item() == pytest.approx(one.policy_entropy.item(), abs=1e-4)


def test_training_moves_the_policy_and_leaves_the_model(tiny):
    before = {name: value.clone() for name, value in tiny.model.state_dict().items()}
    prompt = torch.tensor([[70, 71, 72]])
    pairs = [tempered.Pair(prompt, torch.tensor([80, 81]), torch.tensor([90, 91, 92]))] * 4
    policies = [
        train(tiny, DataLoader(pairs, 2, collate_fn=tempered.collate), steps=6, seed=seed) for seed in (0, 0, 1)
    ]
    margins = []
    for policy in policies:
        log_ratio = score(policy, prompt, torch.tensor([[80, 81, -1], [90, 91, 92]])).log_ratio
        margins.append(float(log_ratio[0] - log_ratio[1]))
    assert margins[0] > 0.01
    assert margins[0] == margins[1] != margins[2]
    assert all(torch.equal(value, before[name]) for name, value in tiny.model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in tiny.model.parameters())


# --- dynamics, on a language model ------------------------------------------------------------------------------------


def test_rejected_completions_come_from_the_closed_form():
    # l = r + beta (r - r / temperature), drawn from r at one temperature.
    logits = torch.randn(9, generator=torch.Generator().manual_seed(0))
    for temperature in tempered.TARGETS.values():
        rejected = logits + tempered.BETA * (logits - logits / temperature)
        of_sampling = 1 / (1 + tempered.BETA * (1 - 1 / temperature))
        torch.testing.assert_close((logits / of_sampling).softmax(0), rejected.softmax(0))
        # and the target follows from it: softmax(r + (r - l) / beta)
        target = logits + (logits - rejected) / tempered.BETA
        torch.testing.assert_close(target.softmax(0), (logits / temperature).softmax(0))


def test_pairs_follow_their_laws(tiny, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        tempered,
        "sample",
        lambda model, prompt, **options: drawn.append(options) or torch.tensor([[70, 71, -1], [72, 73, 74]]),
    )
    size = tempered.Size(3, 2, 2, 3, 1, 1)
    pairs = tempered.draw(tiny, 0.7, size, seed=0)
    assert len(pairs) == 10
    assert [pair.chosen.tolist() for pair in pairs[:2]] == [[70, 71], [72, 73, 74]]
    assert torch.equal(pairs[0].prompt, pairs[1].prompt)
    assert {(options["count"], options["max_new_tokens"]) for options in drawn} == {(2, 3)}
    assert [options["temperature"] for options in drawn[::2]] == [1.0] * 5
    assert [options["temperature"] for options in drawn[1::2]] == [pytest.approx(1 / (1 + 0.5 * (1 - 1 / 0.7)))] * 5
    assert len({options["seed"] for options in drawn}) == 10
    other = tempered.draw(tiny, 0.7, size, seed=1)
    assert [pair.prompt.tolist() for pair in pairs] != [pair.prompt.tolist() for pair in other]


def test_theory_at_the_target(tiny):
    generator = torch.Generator().manual_seed(0)
    pairs = [
        tempered.Pair(*(torch.randint(60, 120, shape, generator=generator) for shape in ((1, 4), (n,), (m,))))
        for n, m in ((3, 2), (1, 5))
    ]
    theory = tempered.at_target(tiny.model, pairs, 0.7)
    chosen_change = rejected_change = entropy_change = token_did_entropy = 0.0
    for pair in pairs:
        for side in ("chosen", "rejected"):
            completion = getattr(pair, side)
            ids = torch.cat([pair.prompt, completion[None]], 1)
            with torch.no_grad():
                r = tiny.model(ids).logits[0, 3:-1].double()
            rho, pi = r.log_softmax(-1), (r / 0.7).log_softmax(-1)
            if side == "chosen":
                chosen_change += float((rho.exp() * (pi - rho)).sum()) / 4
                entropy_change += float((rho.exp() * rho - pi.exp() * pi).sum()) / 4
                did = (pi - rho).log_softmax(-1)
                token_did_entropy -= float((did.exp() * did).sum()) / 4
            else:
                rejected_change += float((pi - rho).gather(1, completion[:, None]).sum()) / 7
    assert theory["chosen_change"] == pytest.approx(chosen_change, abs=1e-4)  # float32
    assert theory["rejected_change"] == pytest.approx(rejected_change, abs=1e-4)
    assert theory["entropy_change"] == pytest.approx(entropy_change, abs=1e-4)
    assert theory["token_did_entropy"] == pytest.approx(token_did_entropy, abs=1e-4)
    assert theory["chosen_change"] < 0
    assert theory["entropy_change"] < 0


# --- entropy ----------------------------------------------------------------------------------------------------------


def test_held_out_pairs_are_not_trained_on():
    train_pairs, held_out = entropy.split(3, 10)
    for kind in entropy.KINDS:
        assert (len(train_pairs[kind]), len(held_out[kind])) == (70, 10)
        assert {pair["tag"] for pair in train_pairs[kind] + held_out[kind]} == {kind}
        trained_on = {(pair["prompt"], pair["chosen"]) for pair in train_pairs[kind]}
        assert not trained_on & {(pair["prompt"], pair["chosen"]) for pair in held_out[kind]}
    assert entropy.split(3, 10) == (train_pairs, held_out)
    assert entropy.split(4, 10)[1] != held_out


def test_an_unchanged_policy_knows_nothing(tiny):
    policy = untrained_policy(tiny)
    _, held_out = entropy.split(0, 3)
    size = entropy.QUICK._replace(max_length=160)
    language_model_rows = entropy.measurements(tiny, policy, "factual", held_out, size, 0)
    for name in ("token_did_concentration", "kl", "chosen_log_ratio", "margin"):
        assert language_model_rows[name] == pytest.approx(0, abs=1e-4)  # rounding of log V in float32
    for row in entropy.did_rows(tiny, policy, "factual", held_out, size, 0):
        # T / V: completions that end early make strings of T tokens the fewer.
        assert row["concentration"] == pytest.approx(0, abs=4.1 / 256), row


def test_abilities(tiny):
    _, held_out = entropy.split(0, 6)
    able = entropy.abilities(tiny, tiny.model, held_out, entropy.QUICK._replace(max_length=160, samples=8), 0)
    gaps = []
    for pair in held_out["factual"]:
        prompt, means = tiny.prompt(pair["prompt"]), []
        for side in ("chosen", "rejected"):
            answer = [*tiny.tokenizer(pair[side])["input_ids"], tiny.tokenizer.eos_token_id]
            ids = torch.cat([prompt[0], torch.tensor(answer)])[:160][None]
            with torch.no_grad():
                logprob = tiny.model(ids).logits[0, prompt.shape[1] - 1 : -1].log_softmax(-1)
            means.append(float(logprob.gather(1, ids[0, prompt.shape[1] :, None]).mean()))
        gaps.append(means[0] - means[1])
    assert able["factual_margin"] == pytest.approx(sum(gaps) / 6, abs=1e-4)
    assert able["factual_accuracy"] == pytest.approx(sum(gap > 0 for gap in gaps) / 6)
    assert 0 < able["policy_entropy"] < math.log(tiny.model.config.vocab_size)
    assert 0.5 < able["diversity"] <= 1


def test_differences_are_of_one_seed():
    rows, smc = [], []
    for seed in (0, 1):
        for kind, method in [(k, m) for k in entropy.KINDS for m in entropy.METHODS] + [("nothing", "reference")]:
            level = 10 * seed + 2 * (kind == "factual") + (method == "DPO-PG")
            about = {"trained_on": kind, "method": method, "seed": seed}
            names = (*entropy.AT_THE_REFERENCE, "policy_entropy", "diversity", "factual_accuracy")
            rows.append(about | dict.fromkeys(names, level))
            smc.append(about | {"concentration": -level})
    found = entropy.differences(rows, smc, (0, 1))
    by = {(row["of"], row["between"], row["seed"]): row["difference"] for row in found}
    assert by["token DID concentration", "factual, DPO - open-ended, DPO", 1] == 2
    assert by["SMC concentration", "open-ended, DPO-PG - open-ended, DPO", 0] == -1
    assert by["diversity", "factual, DPO-PG - nothing, reference", 1] == 3
    assert len(by) == len(found)


def test_means_over_prompts():
    rows = [{"K": k, "seed": 0, "prompt": p, "x": float(k + p), "reliable": p == 0} for k in (8, 16) for p in (0, 1)]
    assert entropy.average(rows, ("K", "seed")) == [
        {"K": 8, "seed": 0, "x": 8.5, "reliable": 0.5},
        {"K": 16, "seed": 0, "x": 16.5, "reliable": 0.5},
    ]


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.* longer than max_length=160")
@pytest.mark.parametrize("name", ["entropy", "dynamics"])
def test_whole_run(name, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(entropy, "QUICK", entropy.QUICK._replace(max_length=160))  # tokens here are bytes
    for module in (entropy, tempered):
        monkeypatch.setattr(module, "load", lambda quick: tiny)
    assert command.main([name, "--quick", "--seeds", "2", "--output", str(tmp_path / "out")]) == 0
    expected = {
        "entropy": ["", "_facts", "_candidates", "_smc", "_differences", "_candidates_prompts", "_smc_prompts"],
        "dynamics": ["_language_model"],
    }
    for table in expected[name]:
        with (tmp_path / "out" / f"{name}{table}.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert {row["seed"] for row in rows} == {"0", "1"}
        numbers = [float(v) for row in rows for k, v in row.items() if k in ("kl", "concentration", "chosen_change")]
        assert all(map(math.isfinite, numbers))
    assert (tmp_path / "out" / f"{name}.png").stat().st_size > 10_000
    assert "SMC" in capsys.readouterr().out or name == "dynamics"


def test_batches_are_those_that_lit_dpo_documents():
    batch = batch_of([(torch.tensor([[5, 6]]), torch.tensor([7, 8])), (torch.tensor([[5]]), torch.tensor([9]))])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [5, 9, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 7, 8, -100], [9, -100, -100, -100]]


def test_the_quick_model_is_small_and_random(tiny_model, monkeypatch):
    monkeypatch.setattr("lit_did.demo.smollm2", lambda: tiny_model)
    whole, quick, again = language_model.load(False), language_model.load(True), language_model.load(True)
    assert quick.model.config.vocab_size == whole.model.config.vocab_size
    assert quick.model.config.hidden_size == 32
    weights = [x.model.get_output_embeddings().weight for x in (quick, again, whole)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    prompt = quick.prompt("Hello")
    assert quick.tokenizer.decode(prompt[0]).endswith("<|im_start|>assistant\n")
    assert quick.model.generation_config.eos_token_id is not None
