"""DIDCallback in TRL's own DPOTrainer: the right numbers, in the trainer's log, and no trace in what is trained."""

from __future__ import annotations

import copy

import datasets
import peft
import pytest
import torch
import transformers
import trl
from trl import DPOTrainer

from lit_did import DIDMetrics
from lit_did.integrations.trl import DIDCallback
from lit_did.models.policy_and_reference import PolicyAndReference
from tests.integrations.tiny_trl import LORA, dataset, gpt2, llama, trainer
from tests.modules.tiny import byte_tokenizer, collate, make_pairs, tiny_llama

TIMES = ("runtime", "samples_per_second", "steps_per_second", "train_runtime")


def without_did(history: list[dict]) -> list[dict]:
    """The trainer's own entries, but for its clock."""
    own = [{n: v for n, v in entry.items() if "did/" not in n and not n.endswith(TIMES)} for entry in history]
    return [entry for entry in own if entry.keys() - {"step", "epoch"}]


def did_entries(history: list[dict], prefix: str = "did/") -> dict[int, dict[str, float]]:
    return {
        entry["step"]: {n.removeprefix(prefix): v for n, v in entry.items() if n.startswith(prefix)}
        for entry in history
        if any(name.startswith(prefix) for name in entry)
    }


def own_metrics(run: DPOTrainer, model, reference, rows, **options) -> dict[str, float]:
    """By hand: the trainer's collator, whole forward passes in eval mode, labels from the completion mask."""
    metrics = DIDMetrics(beta=run.beta, **options)
    model, reference = copy.deepcopy(model).eval(), copy.deepcopy(reference).eval()
    for row in rows:
        batch = run.data_collator([row])
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100).roll(-1, 1)
        labels[:, -1] = -100
        with torch.no_grad():
            metrics.update(model(**inputs).logits, reference(**inputs).logits, labels)
    return {name: value.item() for name, value in metrics.compute().items()}


KINDS = {
    "reference": lambda: (gpt2(0, resid_pdrop=0.3), gpt2(1)),
    "lora": lambda: (llama(0), None),
    "trained adapter": lambda: (trained_adapter(), None),
}


def trained_adapter() -> peft.PeftModel:
    """An adapter that is not the base model: TRL keeps a copy of it, named "ref", as the reference."""
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    return peft.get_peft_model(llama(0), config)


@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"gradient_checkpointing": True}], ids=["f32", "bf16", "gc"])
@pytest.mark.parametrize("kind", KINDS)
def test_training_is_the_same_to_the_bit(tmp_path, kind, options):
    runs = []
    for monitored in (False, True):
        torch.manual_seed(5)
        model, reference = KINDS[kind]()
        more = {"peft_config": LORA} if kind == "lora" else {}
        run = trainer(
            tmp_path, model, reference, disable_dropout=False, logging_steps=2, max_steps=6, **more, **options
        )
        if monitored:
            run.add_callback(DIDCallback(run, every_n_steps=1))
        run.train()
        runs.append(run)
    plain, monitored = runs
    # losses, TRL's own metrics and gradient norms, in training and in evaluation
    assert without_did(monitored.state.log_history) == without_did(plain.state.log_history)
    assert sum("loss" in entry for entry in plain.state.log_history) == 3
    assert sum("eval_loss" in entry for entry in plain.state.log_history) == 3
    for (name, one), other in zip(plain.model.named_parameters(), monitored.model.parameters(), strict=True):
        assert torch.equal(one, other), name
        assert one.requires_grad == other.requires_grad
    assert plain.state.log_history[0]["loss"] != plain.state.log_history[-2]["eval_loss"]  # it trains
    assert sorted(did_entries(monitored.state.log_history)) == [1, 2, 3, 4, 5, 6]
    assert sorted(did_entries(monitored.state.log_history, "eval_did/")) == [2, 4, 6]


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_by_hand(tmp_path, kind):
    model, reference = KINDS[kind]()
    start = copy.deepcopy(model)
    run = trainer(tmp_path, model, reference, **({"peft_config": LORA} if kind == "lora" else {}))
    run.add_callback(DIDCallback(run))
    run.train()
    returned = run.evaluate()
    expected = own_metrics(run, run.model, reference or start, run.eval_dataset)
    seen = {n.removeprefix("eval_did/"): v for n, v in returned.items() if n.startswith("eval_did/")}
    assert seen == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert len(seen) == 14
    assert seen["kl"] > 1e-3  # the premise: it has moved
    last = run.state.log_history[-1]
    assert {n.removeprefix("eval_did/"): v for n, v in last.items() if n.startswith("eval_did/")} == seen
    assert "eval_rewards/margins" in last  # in the trainer's own entry


def test_training_values_are_of_the_weights_and_pairs_of_the_step(tmp_path):
    """Beside TRL's own means: equal where these are means over pairs, too."""
    run = trainer(tmp_path, llama(0), llama(1))
    run.add_callback(DIDCallback(run))
    run.train()
    did = did_entries(run.state.log_history)
    trl = {entry["step"]: entry for entry in run.state.log_history if "loss" in entry}
    assert sorted(did) == sorted(trl) == [1, 2, 3, 4]
    for step, values in did.items():
        assert values["reward_margin"] == pytest.approx(trl[step]["rewards/margins"], rel=1e-4, abs=1e-5)
        assert values["reward_accuracy"] == pytest.approx(trl[step]["rewards/accuracies"])
        assert 0.1 * values["chosen_log_ratio"] == pytest.approx(trl[step]["rewards/chosen"], rel=1e-4, abs=1e-5)
    assert did[1]["reward_margin"] != pytest.approx(did[4]["reward_margin"], rel=0.1)


class Reporter(transformers.TrainerCallback):
    """Stands for what `report_to` names: it is given what `log` is given."""

    def __init__(self) -> None:
        self.seen: list[dict] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs))


@pytest.mark.parametrize(
    ("options", "every", "steps"),
    [
        ({"logging_steps": 3}, None, [3, 6]),
        ({"logging_steps": 3, "logging_first_step": True}, None, [1, 3, 6]),
        ({"logging_steps": 50}, 2, [2, 4, 6]),
        ({"logging_steps": 0.5}, None, [3, 6]),  # a share of all steps
        ({}, 0, []),
    ],
)
def test_every_n_steps_through_the_trainers_log(tmp_path, options, every, steps):
    reporter = Reporter()
    run = trainer(tmp_path, llama(0), llama(1), max_steps=6, callbacks=[reporter], **options)
    run.add_callback(DIDCallback(run, every_n_steps=every))
    run.train()
    assert sorted(did_entries(run.state.log_history)) == steps
    assert sum("did/kl" in logs for logs in reporter.seen) == len(steps)
    assert sum("eval_did/kl" in logs for logs in reporter.seen) == 3
    assert not any("did/kl" in logs and "rewards/margins" in logs for logs in reporter.seen)  # an entry of its own


def test_evaluation_alone_prediction_and_removal(tmp_path):
    run = trainer(tmp_path, llama(0), llama(1))
    callback = DIDCallback(run)
    assert not any("did" in name for name in run.evaluate())  # not added yet
    run.add_callback(callback)
    expected = own_metrics(run, run.model, run.ref_model, run.eval_dataset)["kl"]
    assert run.evaluate()["eval_did/kl"] == pytest.approx(expected, rel=1e-4)
    assert run.predict(run.eval_dataset).metrics["test_did/kl"] == pytest.approx(expected, rel=1e-4)
    assert run.evaluate(metric_key_prefix="held_out")["held_out_did/kl"] == pytest.approx(expected, rel=1e-4)
    run.remove_callback(callback)
    assert not any("did" in name for name in run.evaluate())


def test_an_interrupted_evaluation_leaves_nothing_behind(tmp_path):
    run = trainer(tmp_path, llama(0), llama(1))
    run.add_callback(DIDCallback(run))
    expected = run.evaluate()["eval_did/kl"]
    original, calls = run.compute_loss, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    run.compute_loss = interrupted
    with pytest.raises(KeyboardInterrupt):
        run.evaluate()
    run.compute_loss = original
    assert run.evaluate()["eval_did/kl"] == expected


@pytest.mark.parametrize("strategy", ["no", "epoch"])
def test_a_trainer_that_does_not_log_by_steps(tmp_path, strategy):
    run = trainer(tmp_path, llama(0), llama(1), logging_strategy=strategy)
    run.add_callback(DIDCallback(run))
    run.train()
    assert did_entries(run.state.log_history) == {}
    assert sorted(did_entries(run.state.log_history, "eval_did/")) == [2, 4]
    asked = trainer(tmp_path, llama(0), llama(1), logging_strategy=strategy)
    asked.add_callback(DIDCallback(asked, every_n_steps=3))
    asked.train()
    assert sorted(did_entries(asked.state.log_history)) == [3]


def test_early_stopping_on_the_did(tmp_path):
    """Although the callback is added after those that the trainer is made with."""
    stopping = transformers.EarlyStoppingCallback(early_stopping_patience=1)
    run = trainer(
        tmp_path,
        llama(0),
        llama(1),
        max_steps=8,
        learning_rate=0.0,  # nothing gets better
        callbacks=[stopping],
        metric_for_best_model="eval_did/reward_margin",
        load_best_model_at_end=True,
        save_strategy="steps",
        save_steps=2,
    )
    run.add_callback(DIDCallback(run))
    run.train()
    assert run.state.global_step == 4


def test_a_given_reference_is_autocast_as_the_policy_is(tmp_path):
    run = trainer(tmp_path, llama(0), llama(1), bf16=True, learning_rate=0.0)
    run.add_callback(DIDCallback(run, reference=llama(0)))
    run.train()  # accelerate wraps the policy's forward in autocast, and the given reference's not
    for values in did_entries(run.state.log_history).values():
        assert values["kl"] == 0
        assert values["reward_margin"] == 0
    own = [entry["rewards/margins"] for entry in run.state.log_history if "loss" in entry]
    assert all(margin != 0 for margin in own)  # the trainer's own reference is another


def test_what_is_given_as_reference_is_not_changed(tmp_path):
    base = llama(1)
    run = trainer(tmp_path, llama(0), llama(1))
    run.add_callback(DIDCallback(run, reference=base.train()))
    run.evaluate()
    assert base.training
    assert all(p.requires_grad for p in base.parameters())
    policy = llama(0)
    adapted = trainer(tmp_path, policy, peft_config=LORA)
    with pytest.raises(ValueError, match=r"For a PeftModel, leave `reference` out"):
        DIDCallback(adapted, reference=policy)
    assert any(p.requires_grad for p in adapted.model.parameters())


def test_adapters_that_cannot_be_switched_off_are_refused(tmp_path):
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    for config in (prompt, peft.LoraConfig(target_modules=["c_attn"], bias="all", fan_in_fan_out=True)):
        run = trainer(tmp_path, gpt2(0), peft_config=config)
        with pytest.raises(ValueError, match=r"PROMPT_TUNING|use bias='none'"):
            DIDCallback(run)


def test_the_models_are_put_together_once(tmp_path, monkeypatch):
    made, make = [], PolicyAndReference.__init__
    monkeypatch.setattr(
        PolicyAndReference, "__init__", lambda *given, **options: made.append(1) or make(*given, **options)
    )
    run = trainer(tmp_path, llama(0), llama(1))
    run.add_callback(DIDCallback(run, every_n_steps=1))
    run.train()
    assert len(made) == 1


def test_errors_of_the_reference_adapter_name_it(tmp_path):
    run = trainer(tmp_path, trained_adapter())
    assert "ref" in run.model.peft_config  # the premise
    run.model.get_input_embeddings().requires_grad_(True)
    with pytest.raises(ValueError, match="its reference is the policy with another adapter, but 1 other"):
        DIDCallback(run)
    run.model.get_input_embeddings().requires_grad_(False)
    run.model.set_adapter("ref")
    with pytest.raises(ValueError, match="got 'ref', which is active"):
        DIDCallback(run)


@pytest.mark.long
def test_compiled_models(tmp_path):
    run = trainer(tmp_path, llama(0), llama(1), torch_compile=True, torch_compile_backend="eager", max_steps=2)
    run.add_callback(DIDCallback(run))
    assert hasattr(run.ref_model, "_orig_mod")  # the premise: the trainer has compiled both
    run.train()
    expected = own_metrics(run, llama(0), llama(1), [])  # the names alone
    assert did_entries(run.state.log_history)[1].keys() == expected.keys()


def test_several_data_sets_and_the_best_model(tmp_path):
    sets = {"one": dataset(3, seed=1), "two": dataset(4, seed=2)}
    run = trainer(
        tmp_path,
        llama(0),
        llama(1),
        eval_dataset=sets,
        save_strategy="best",
        metric_for_best_model="eval_two_did/reward_accuracy",
    )
    run.add_callback(DIDCallback(run))
    run.train()
    metrics = run.evaluate()
    for name in sets:
        expected = own_metrics(run, run.model, run.ref_model, run.eval_dataset[name])
        assert metrics[f"eval_{name}_did/kl"] == pytest.approx(expected["kl"], rel=1e-4)
    assert run.state.best_metric is not None


@pytest.mark.parametrize("given", ["name", "model"])
def test_reference_given_where_the_trainer_keeps_none(tmp_path, given):
    llama(1).save_pretrained(tmp_path / "reference")
    reference = str(tmp_path / "reference") if given == "name" else llama(1)
    policy = llama(0)
    policy.save_pretrained(tmp_path / "policy")
    run = trainer(
        tmp_path, str(tmp_path / "policy"), precompute_ref_log_probs=True, model_init_kwargs={"dtype": "float32"}
    )
    with pytest.raises(
        ValueError, match=r"`reference` to be a model, but got None.*`ref_model` is None.*not a PeftModel"
    ):
        DIDCallback(run)
    run.add_callback(DIDCallback(run, reference=reference))
    metrics = run.evaluate()
    expected = own_metrics(run, policy, llama(1), run.eval_dataset)
    assert metrics["eval_did/kl"] == pytest.approx(expected["kl"], rel=1e-4)


class Plain(transformers.Trainer):
    """A Trainer of somebody's own, with `labels` as transformers wants them and no `log` or `_metrics` of TRL."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], labels=inputs["labels"])
        return (outputs.loss, outputs) if return_outputs else outputs.loss


def collate_as_transformers(pairs) -> dict:
    batch = collate(pairs)
    batch["labels"] = batch["labels"].roll(1, 1)
    return batch


def test_any_trainer_with_a_preference_batch(tmp_path):
    pairs = make_pairs(6)
    arguments = transformers.TrainingArguments(
        str(tmp_path), use_cpu=True, report_to="none", max_steps=2, logging_steps=1,
        eval_strategy="steps", eval_steps=2, per_device_train_batch_size=3, per_device_eval_batch_size=4,
        remove_unused_columns=False, disable_tqdm=True,
    )  # fmt: skip
    run = Plain(
        tiny_llama(0), arguments, data_collator=collate_as_transformers, train_dataset=pairs, eval_dataset=pairs
    )
    run.add_callback(DIDCallback(run, reference=tiny_llama(1), beta=0.5))
    run.train()
    assert sorted(did_entries(run.state.log_history)) == [1, 2]
    metrics = DIDMetrics(beta=0.5)
    batch = collate(pairs)
    with torch.no_grad():
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        metrics.update(run.model.eval()(**inputs).logits, tiny_llama(1)(**inputs).logits, batch["labels"])
    expected = {name: value.item() for name, value in metrics.compute().items()}
    assert did_entries(run.state.log_history, "eval_did/")[2] == pytest.approx(expected, rel=1e-4, abs=1e-5)


OF_PAIRS = {"reward_margin", "reward_accuracy", "chosen_fell"}


class MyKTOTrainer(trl.KTOTrainer):
    """A trainer of the user's."""


@pytest.mark.parametrize("kind", [trl.KTOTrainer, MyKTOTrainer, trl.SFTTrainer])
def test_trainers_of_single_completions_log_no_metrics_of_pairs(tmp_path, kind):
    config = trl.SFTConfig if kind is trl.SFTTrainer else trl.KTOConfig
    rows = [{"prompt": "a", "completion": "b" * (n + 1), "label": n % 2 == 0} for n in range(4)]
    if kind is trl.SFTTrainer:
        rows = [{name: row[name] for name in ("prompt", "completion")} for row in rows]
    arguments = config(
        str(tmp_path), use_cpu=True, report_to="none", max_steps=1, per_device_train_batch_size=4, bf16=False,
        logging_steps=1, disable_tqdm=True, save_strategy="no", gradient_checkpointing=False,
    )  # fmt: skip
    of_kto = {} if kind is trl.SFTTrainer else {"ref_model": llama(1)}
    run = kind(
        model=llama(0),
        args=arguments,
        processing_class=byte_tokenizer(),
        train_dataset=datasets.Dataset.from_list(rows),
        **of_kto,
    )
    callback = DIDCallback(run, reference=llama(1))
    run.add_callback(callback)
    run.train()
    logged = did_entries(run.state.log_history)[1]
    assert "reward" in logged
    assert OF_PAIRS.isdisjoint(logged)
    run.remove_callback(callback)
    run.add_callback(DIDCallback(run, reference=llama(1), pairs=True))
    if kind is not trl.SFTTrainer:  # rows of one prompt look like pairs
        with pytest.raises(ValueError, match=r"Expected a batch of pairs.*`pairs=False`"):
            run.train()


def test_packed_sequences_are_measured_one_by_one(tmp_path):
    rows = [{"prompt": "ab" * (n % 3 + 1), "completion": "c" * (n + 1)} for n in range(6)]
    measured = []
    for options in ({}, {"packing": True, "max_length": 40}):
        arguments = trl.SFTConfig(
            str(tmp_path), use_cpu=True, report_to="none", per_device_eval_batch_size=6, bf16=False, disable_tqdm=True,
            **options,
        )  # fmt: skip
        data = datasets.Dataset.from_list(rows)
        run = trl.SFTTrainer(
            model=llama(0), args=arguments, processing_class=byte_tokenizer(), train_dataset=data, eval_dataset=data
        )
        run.add_callback(DIDCallback(run, reference=llama(1)))
        measured.append({name: value for name, value in run.evaluate().items() if "did/" in name})
    plain, packed = measured
    assert packed == pytest.approx(plain, rel=1e-4, abs=1e-5)
    assert len(plain) == 8


def test_batches_without_completions_are_refused(tmp_path):
    arguments = trl.GRPOConfig(
        str(tmp_path), use_cpu=True, report_to="none", max_steps=1, per_device_train_batch_size=2, num_generations=2,
        max_completion_length=2, logging_steps=1, bf16=False, disable_tqdm=True, gradient_checkpointing=False,
    )  # fmt: skip
    run = trl.GRPOTrainer(
        model=llama(0),
        args=arguments,
        reward_funcs=lambda completions, **_: [1.0] * len(completions),
        processing_class=byte_tokenizer(),
        train_dataset=datasets.Dataset.from_list([{"prompt": "a"}] * 4),
    )
    run.add_callback(DIDCallback(run, reference=llama(1)))
    with pytest.raises(TypeError, match="Trainers that generate completions during training"):
        run.train()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"every_n_steps": -1}, ValueError, "`every_n_steps` to be an integer of at least 0, but got -1"),
        ({"every_n_steps": 0.5}, TypeError, "`every_n_steps` to be an integer of at least 0, but got 0.5"),
        ({"beta": -1.0}, ValueError, "`beta` to be above 0"),
        ({"reference": 3}, TypeError, "`reference` to be a model or its name, but got int"),
        ({"reference": tiny_llama(0)}, ValueError, "the policy's vocabulary, 258 entries, but got 67"),
    ],
)
def test_arguments_out_of_range(tmp_path, options, error, message):
    run = trainer(tmp_path, llama(0), llama(1))
    with pytest.raises(error, match=message):
        DIDCallback(run, **options)
    with pytest.raises(TypeError, match=r"`trainer` to be a transformers.Trainer, but got str"):
        DIDCallback("trainer")
