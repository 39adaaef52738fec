"""DIDMonitor: the right numbers, of LightningModules that are not ours, and no trace in what is trained."""

from __future__ import annotations

import contextlib
import copy
import csv

import lightning
import peft
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader

from lit_did import DIDMetrics, DIDMonitor, LitDPO, PolicyAndReference, sequence_statistics
from tests.modules.steps import loader as steps_loader
from tests.modules.steps import make
from tests.modules.tiny import collate, loader, make_pairs, tiny_gpt2, tiny_llama, trainer

LORA = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}


def collate_as_transformers(pairs) -> dict:
    """Labels as transformers wants them: not shifted."""
    batch = collate(pairs)
    batch["labels"] = batch["labels"].roll(1, 1)
    return batch


class Own(lightning.LightningModule):
    """Somebody's DPO, which knows nothing of lit_did."""

    def __init__(self, net: nn.Module, frozen: nn.Module | None = None) -> None:
        super().__init__()
        self.net = net
        self.frozen = None if frozen is None else frozen.requires_grad_(False)

    def logprob(self, model: nn.Module, batch: dict) -> torch.Tensor:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        picked = logits.float().log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        return (picked * (labels != -100)).sum(1)

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            reference = self.logprob(self.frozen or self.net, batch)
        chosen, rejected = (self.logprob(self.net, batch) - reference).chunk(2)
        return -nn.functional.logsigmoid(0.1 * (chosen - rejected)).mean()

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        pass

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.net.parameters() if p.requires_grad], lr=0.1)


class Record(lightning.Callback):
    """What is logged at every optimiser step, and the weights after it."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.weights: list[list[torch.Tensor]] = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if len(self.steps) < trainer.global_step:
            self.steps.append({name: float(value) for name, value in trainer.callback_metrics.items()})
            self.weights.append([p.detach().clone() for p in module.parameters() if p.requires_grad])


def of(metrics: dict, prefix: str) -> dict[str, float]:
    return {name.removeprefix(prefix): float(v) for name, v in metrics.items() if name.startswith(prefix)}


def transformers_loader(pairs, batch_size: int) -> DataLoader:
    return DataLoader(pairs, batch_size=batch_size, collate_fn=collate_as_transformers)


def test_somebodys_module_is_validated_as_litdpo_is():
    pairs = make_pairs(7)
    run, ours = trainer(callbacks=[DIDMonitor()]), trainer()
    run.validate(Own(tiny_llama(0), tiny_llama(1)), transformers_loader(pairs, 3), verbose=False)
    ours.validate(LitDPO(tiny_llama(0), tiny_llama(1)), loader(pairs, 4), verbose=False)
    expected = of(ours.callback_metrics, "val/")
    del expected["loss"]
    seen = of(run.callback_metrics, "did/val/")
    assert seen == pytest.approx(expected, rel=1e-4, abs=1e-6)  # the batches are others: float32 logits differ
    assert len(seen) == 14
    assert seen["kl"] > 0.1  # the premise: two different models


@pytest.mark.parametrize("lora", [None, LORA])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_in_training_it_sees_what_litdpo_logs_itself(lora, accumulate):
    """LitDPO's metrics come from its training forward pass, the monitor's from one of its own: all micro-batches."""
    record = Record()
    module = LitDPO(tiny_llama(0), None if lora else tiny_llama(1), lora=lora, learning_rate=1e-2)
    run = trainer(max_epochs=2, accumulate_grad_batches=accumulate, callbacks=[DIDMonitor(every_n_steps=1), record])
    run.fit(module, loader(make_pairs(10), 2))  # 5 batches: the last step of an epoch has fewer micro-batches
    assert len(record.steps) == {1: 10, 3: 4}[accumulate]
    for step in record.steps:
        expected = of(step, "train/")
        del expected["loss"]
        assert of(step, "did/train/") == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert record.steps[0]["did/train/kl"] != pytest.approx(record.steps[-1]["did/train/kl"], rel=1e-2)


def test_packed_batches():
    record = Record()
    run = trainer(max_epochs=1, callbacks=[DIDMonitor(every_n_steps=1), record])
    run.fit(make(), steps_loader(packed=True), steps_loader(packed=True))
    for step in record.steps:
        expected = of(step, "train/")
        del expected["loss"]
        assert of(step, "did/train/") == pytest.approx(expected, rel=1e-4, abs=1e-5)
    validated = of(run.callback_metrics, "val/")
    del validated["loss"]
    assert of(run.callback_metrics, "did/val/") == pytest.approx(validated, rel=1e-4, abs=1e-5)


def test_it_measures_in_the_precision_that_is_trained_in():
    """Under autocast as LitDPO's own metrics are: in float32 they would be others."""
    values = {}
    for precision in ("bf16-mixed", "32-true"):
        record = Record()
        run = trainer(max_steps=1, precision=precision, callbacks=[DIDMonitor(every_n_steps=1), record])
        run.fit(LitDPO(tiny_llama(0), tiny_llama(1)), loader(make_pairs(6), 6))
        values[precision] = record.steps[0]
        assert record.steps[0]["did/train/kl"] == pytest.approx(record.steps[0]["train/kl"], rel=1e-5)
    assert values["bf16-mixed"]["did/train/kl"] != pytest.approx(values["32-true"]["did/train/kl"], rel=1e-4)


@pytest.mark.parametrize(("every", "log_every", "steps"), [(2, 50, [1, 3, 5]), (4, 1, [3]), (None, 3, [2, 5])])
def test_every_n_steps_reach_the_logger_once(tmp_path, every, log_every, steps):
    logger = CSVLogger(tmp_path, name="", version="", flush_logs_every_n_steps=1)
    monitor = DIDMonitor(every_n_steps=every)
    run = trainer(max_steps=6, log_every_n_steps=log_every, logger=logger, callbacks=[monitor])
    run.fit(Own(tiny_llama(0), tiny_llama(1)), transformers_loader(make_pairs(12), 2))
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    assert [int(row["step"]) for row in rows if row["did/train/kl"]] == steps


@pytest.mark.parametrize("done", [2, 3])  # counted from its own start, the second run would measure 2 and 4, or only 4
def test_a_resumed_run_goes_on_with_the_same_steps(tmp_path, done):
    data = transformers_loader(make_pairs(12), 2)
    first = trainer(max_steps=done)
    first.fit(Own(tiny_llama(0), tiny_llama(1)), data)
    first.save_checkpoint(tmp_path / "last.ckpt")
    logger = CSVLogger(tmp_path, name="", version="", flush_logs_every_n_steps=1)
    run = trainer(max_steps=6, logger=logger, callbacks=[DIDMonitor(every_n_steps=2)])
    run.fit(Own(tiny_llama(0), tiny_llama(1)), data, ckpt_path=tmp_path / "last.ckpt")
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    assert [int(row["step"]) for row in rows if row["did/train/kl"]] == [3, 5]


def test_no_measurement_but_where_one_is_due(monkeypatch):
    calls = []
    original = PolicyAndReference.measure
    monkeypatch.setattr(PolicyAndReference, "measure", lambda *a, **k: (calls.append(1), original(*a, **k))[1])
    data = transformers_loader(make_pairs(12), 2)
    for every, expected in ((0, 0), (3, 2)):
        calls.clear()
        run = trainer(max_steps=6, callbacks=[DIDMonitor(every_n_steps=every)], num_sanity_val_steps=2)
        run.fit(Own(tiny_llama(0), tiny_llama(1)), data, None if every else data)
        assert len(calls) == expected + (0 if every else 6)  # and none for the sanity check


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("kind", ["reference", "lora", "logits_fn"])
def test_training_is_the_same_to_the_bit(precision, kind):
    """With dropout, whose random numbers it must not use up, and under autocast, whose cache it must not fill."""
    records = []
    for monitored in (False, True):
        torch.manual_seed(3)
        policy = tiny_gpt2(0, resid_pdrop=0.3)
        policy.transformer.h[0].eval()  # a part that its owner wants in eval mode
        if kind == "lora":
            options = {"r": 4, "target_modules": ["c_attn"], "fan_in_fan_out": True, "lora_dropout": 0.3}
            policy = peft.get_peft_model(policy, peft.LoraConfig(**options))
            frozen = next(p for n, p in policy.named_parameters() if "lora_A" in n).requires_grad_(False)
        module = Own(policy, None if kind == "lora" else tiny_gpt2(1))
        monitor = DIDMonitor(noisy if kind == "logits_fn" else None, every_n_steps=1)
        record = Record()
        run = trainer(max_epochs=2, precision=precision, callbacks=[monitor, record] if monitored else [record])
        torch.manual_seed(4)
        data = transformers_loader(make_pairs(6), 2)
        run.fit(module, data, data)
        records.append(record)
        if kind == "lora":
            assert not frozen.requires_grad
    plain, monitored = records
    assert len(plain.weights) == 6
    for one, other in zip(plain.weights, monitored.weights, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(plain.weights[0], plain.weights[-1], strict=True))  # it trains
    assert "did/train/kl" in monitored.steps[0]
    assert not any("did" in name for name in plain.steps[0])


def noisy(module: Own, batch: dict):
    torch.rand(5)
    assert not any(part.training for part in module.modules())
    assert not torch.is_grad_enabled()
    return own_logits(module, batch)


def own_logits(module: Own, batch: dict):
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    return module.net(**inputs).logits, module.frozen(**inputs).logits, batch["labels"].roll(-1, 1)


def test_logits_fn():
    pairs = make_pairs(5)
    values = []
    for get in (
        None,
        own_logits,
        lambda module, batch: sequence_statistics(*own_logits(module, batch)),
        lambda module, batch: list(own_logits(module, batch)),
    ):
        run = trainer(callbacks=[DIDMonitor(get, beta=0.5)])
        run.validate(Own(tiny_llama(0), tiny_llama(1)), transformers_loader(pairs, 2), verbose=False)
        values.append(of(run.callback_metrics, "did/val/"))
    for other in values[1:]:
        assert other == pytest.approx(values[0], rel=1e-4, abs=1e-6)
    half = trainer(callbacks=[DIDMonitor(beta=0.25)])
    half.validate(Own(tiny_llama(0), tiny_llama(1)), transformers_loader(pairs, 2), verbose=False)
    assert of(half.callback_metrics, "did/val/")["reward_margin"] == pytest.approx(values[0]["reward_margin"] / 2)


def test_adapter_reference_is_the_base_model():
    base = tiny_llama(0)
    policy = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**LORA))
    values = []
    for module in (Own(policy), Own(copy.deepcopy(policy), base)):
        run = trainer(callbacks=[DIDMonitor()])
        run.validate(module, transformers_loader(make_pairs(4), 2), verbose=False)
        values.append(of(run.callback_metrics, "did/val/"))
    assert values[0] == values[1]
    assert values[0]["kl"] > 1e-2


def test_reference_by_name_or_as_a_model_stays_out_of_the_module(tmp_path):
    tiny_llama(1).save_pretrained(tmp_path / "reference")
    pairs = make_pairs(4)
    expected = trainer(callbacks=[DIDMonitor()])
    expected.validate(Own(tiny_llama(0), tiny_llama(1)), transformers_loader(pairs, 2), verbose=False)
    for reference in (str(tmp_path / "reference"), tmp_path / "reference", tiny_llama(1)):
        monitor = DIDMonitor(reference=reference)
        module = Own(tiny_llama(0))
        run = trainer(callbacks=[monitor], max_steps=1)
        run.validate(module, transformers_loader(pairs, 2), verbose=False)
        assert of(run.callback_metrics, "did/val/") == of(expected.callback_metrics, "did/val/")
        run.fit(module, transformers_loader(pairs, 2))  # another stage loads nothing again
        assert not any("frozen" in name for name, _ in module.named_parameters())


class Beside(Own):
    """Somebody's DPO that holds its models in a `PolicyAndReference`."""

    def __init__(self, policy: nn.Module, reference: nn.Module | None = None) -> None:
        lightning.LightningModule.__init__(self)
        self.models = PolicyAndReference(policy, reference)

    @property
    def net(self) -> nn.Module:
        return self.models.policy

    def training_step(self, batch, batch_idx):
        chosen, rejected = self.models(batch).log_ratio.chunk(2)
        return -nn.functional.logsigmoid(0.1 * (chosen - rejected)).mean()


@pytest.mark.parametrize("lora", [None, LORA])
def test_models_side_by_side_are_found(lora):
    records = []
    for kind in (Own, Beside):
        torch.manual_seed(0)
        policy = tiny_llama(0) if lora is None else peft.get_peft_model(tiny_llama(0), peft.LoraConfig(**lora))
        # Own trains against a module; the base model of the same seed is what the adapter was added to.
        base = tiny_llama(1 if lora is None else 0)
        module = kind(policy, None if kind is Beside and lora is not None else base)
        record = Record()
        run = trainer(max_epochs=1, callbacks=[DIDMonitor(every_n_steps=1), record])
        run.fit(module, transformers_loader(make_pairs(6), 2), transformers_loader(make_pairs(4), 2))
        records.append((record, of(run.callback_metrics, "did/val/")))
    (own, own_val), (beside, beside_val) = records
    assert beside_val == pytest.approx(own_val, rel=1e-3, abs=1e-5)
    for one, other in zip(own.steps, beside.steps, strict=True):
        assert of(other, "did/train/") == pytest.approx(of(one, "did/train/"), rel=1e-3, abs=1e-5)
    assert beside.steps[0]["did/train/kl"] > 1e-2


class TwoOptimizers(Own):
    """Manual optimisation: every batch is stepped on twice."""

    def __init__(self, *models: nn.Module) -> None:
        super().__init__(*models)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(self.net.parameters(), lr=0.05) for _ in range(2)]


@pytest.mark.parametrize(("every", "steps"), [(1, [0, 1, 2, 3, 4, 5]), (2, [1, 3, 5])])
def test_manual_optimisation_with_two_optimisers(tmp_path, every, steps):
    logger = CSVLogger(tmp_path, name="", version="", flush_logs_every_n_steps=1)
    run = trainer(max_epochs=1, logger=logger, callbacks=[DIDMonitor(every_n_steps=every)])
    run.fit(TwoOptimizers(tiny_llama(0), tiny_llama(1)), transformers_loader(make_pairs(12), 2))
    rows = [row for row in csv.DictReader((tmp_path / "metrics.csv").open()) if row["did/train/kl"]]
    assert [int(row["step"]) for row in rows] == steps  # batches, as Lightning counts what it logs
    assert all(0 < float(row["did/train/kl"]) < 10 for row in rows)


def test_beta_is_the_modules():
    pairs = make_pairs(4)
    module = LitDPO(tiny_llama(0), tiny_llama(1), beta=0.5)
    run = trainer(callbacks=[DIDMonitor()])
    run.validate(module, loader(pairs, 2), verbose=False)
    both = [run.callback_metrics[f"{prefix}val/reward_margin"].item() for prefix in ("", "did/")]
    assert both[0] == pytest.approx(both[1], rel=1e-4)
    own = Own(tiny_llama(0), tiny_llama(1))
    own.beta = 0.25
    for options, factor in (({}, 0.5), ({"beta": 1.0}, 2.0)):
        run = trainer(callbacks=[DIDMonitor(**options)])
        run.validate(own, transformers_loader(pairs, 2), verbose=False)
        assert run.callback_metrics["did/val/reward_margin"].item() == pytest.approx(factor * both[0], rel=1e-4)


def test_compiled_models():
    pairs = make_pairs(4)
    values = []
    for wrap in (lambda model: model, lambda model: torch.compile(model, backend="eager")):
        module = Own(wrap(tiny_llama(0)), wrap(tiny_llama(1)))
        run = trainer(callbacks=[DIDMonitor()])
        run.validate(module, transformers_loader(pairs, 2), verbose=False)
        values.append(of(run.callback_metrics, "did/val/"))
    assert values[0] == values[1]


def test_what_is_given_as_reference_is_not_changed():
    base = tiny_llama(1).train()
    trainer(callbacks=[DIDMonitor(reference=base)]).validate(
        Own(tiny_llama(0)), transformers_loader(make_pairs(2), 2), verbose=False
    )
    assert base.training
    assert all(p.requires_grad for p in base.parameters())
    policy = peft.get_peft_model(base, peft.LoraConfig(**LORA))
    with pytest.raises(ValueError, match=r"For a PeftModel, leave `reference` out"):
        trainer(callbacks=[DIDMonitor(reference=base)]).validate(
            Own(policy), transformers_loader(make_pairs(2), 2), verbose=False
        )
    assert any(p.requires_grad for p in policy.parameters())


def test_other_ignore_index_in_the_batch():
    def collate_otherwise(pairs):
        batch = collate_as_transformers(pairs)
        batch["labels"][batch["labels"] == -100] = -1
        return batch

    pairs, values = make_pairs(4), []
    for options, function in (({}, collate_as_transformers), ({"ignore_index": -1}, collate_otherwise)):
        run = trainer(callbacks=[DIDMonitor(**options)])
        data = DataLoader(pairs, batch_size=2, collate_fn=function)
        run.validate(Own(tiny_llama(0), tiny_llama(1)), data, verbose=False)
        values.append(of(run.callback_metrics, "did/val/"))
    assert values[0] == values[1]


def test_reference_by_the_name_of_an_attribute():
    pairs, values = make_pairs(4), []
    for reference in (None, "frozen"):
        run = trainer(callbacks=[DIDMonitor(reference=reference)])
        run.validate(Own(tiny_llama(0), tiny_llama(1)), transformers_loader(pairs, 2), verbose=False)
        values.append(of(run.callback_metrics, "did/val/"))
    assert values[0] == values[1]


def test_what_logits_fn_must_return():
    run = trainer(callbacks=[DIDMonitor(lambda module, batch: None)])
    with pytest.raises(TypeError, match=r"`logits_fn` to return policy logits, .* but got NoneType"):
        run.validate(Own(tiny_llama(0), tiny_llama(1)), transformers_loader(make_pairs(2), 2), verbose=False)


def test_a_prompt_tuned_policy_is_refused():
    policy = peft.get_peft_model(tiny_llama(0), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(ValueError, match="adapter inside its layers, such as LoRA, but got PROMPT_TUNING"):
        trainer(callbacks=[DIDMonitor()]).validate(Own(policy), transformers_loader(make_pairs(2), 2), verbose=False)


class Fails(Own):
    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        raise RuntimeError("in the middle of a run")


@pytest.mark.parametrize("first", [Own, Fails])
def test_another_module_is_measured_with_its_own_models(first):
    data, monitor = transformers_loader(make_pairs(2), 2), DIDMonitor()
    with pytest.raises(RuntimeError, match="in the middle") if first is Fails else contextlib.nullcontext():
        trainer(callbacks=[monitor]).validate(first(tiny_llama(2), tiny_llama(3)), data, verbose=False)
    values = []
    for callback in (monitor, DIDMonitor()):
        run = trainer(callbacks=[callback])
        run.validate(Own(tiny_llama(0), tiny_llama(1)), data, verbose=False)
        values.append(of(run.callback_metrics, "did/val/"))
    assert values[0] == values[1]


def test_nothing_is_logged_of_a_sanity_check():
    class Seen(lightning.Callback):
        def on_sanity_check_end(self, trainer, module):
            self.names = set(trainer.callback_metrics)

    class Logs(Own):
        def validation_step(self, batch, batch_idx):
            self.log("own", 1.0)

    seen = Seen()
    data = transformers_loader(make_pairs(4), 2)
    run = trainer(max_epochs=1, num_sanity_val_steps=1, callbacks=[DIDMonitor(), seen])
    run.fit(Logs(tiny_llama(0), tiny_llama(1)), data, data)
    assert seen.names == {"own"}
    assert "did/val/kl" in run.callback_metrics  # the validation after it is


def test_several_loaders_and_test():
    parts = [make_pairs(3, seed=1), make_pairs(5, seed=2)]
    module = Own(tiny_llama(0), tiny_llama(1))
    for stage in ("validate", "test"):
        run = trainer(callbacks=[DIDMonitor()])
        getattr(run, stage)(module, [transformers_loader(pairs, 2) for pairs in parts], verbose=False)
        name = {"validate": "val"}.get(stage, stage)
        for i, pairs in enumerate(parts):
            metrics = DIDMetrics()
            with torch.no_grad():
                metrics.update(*own_logits(module.eval(), collate_as_transformers(pairs)))
            seen = run.callback_metrics[f"did/{name}/kl/dataloader_idx_{i}"].item()
            assert seen == pytest.approx(metrics.compute()["kl"].item(), rel=1e-4)


def test_completions_that_are_no_pairs():
    def one_side(pairs):
        return {name: value[: len(pairs)] for name, value in collate_as_transformers(pairs).items()}

    data = DataLoader(make_pairs(3), batch_size=3, collate_fn=one_side)
    module = Own(tiny_llama(0), tiny_llama(1))
    run = trainer(callbacks=[DIDMonitor(pairs=False)])
    run.validate(module, data, verbose=False)
    assert "did/val/kl" in run.callback_metrics
    assert "did/val/reward_margin" not in run.callback_metrics
    with pytest.raises(ValueError, match="even number of sequences"):
        trainer(callbacks=[DIDMonitor()]).validate(module, data, verbose=False)


@pytest.mark.parametrize("kind", ["label", "interleaved"])
def test_batches_that_only_look_like_pairs_are_refused(kind):
    def collated(pairs):
        batch = collate_as_transformers(pairs)
        if kind == "label":
            return batch | {"label": torch.ones(2 * len(pairs))}
        order = torch.arange(2 * len(pairs)).view(2, -1).T.flatten()
        return {name: value[order] for name, value in batch.items()}

    module, data = Own(tiny_llama(0), tiny_llama(1)), DataLoader(make_pairs(2), batch_size=2, collate_fn=collated)
    with pytest.raises(ValueError, match="the chosen sequences first"):
        trainer(callbacks=[DIDMonitor()]).validate(module, data, verbose=False)
    run = trainer(callbacks=[DIDMonitor(pairs=False)])
    run.validate(module, data, verbose=False)
    assert "did/val/reward" in run.callback_metrics


def test_pairs_that_only_fill_a_batch_do_not_count():
    pairs = make_pairs(4)

    def weighted(pairs):
        return collate(pairs) | {"weight": torch.tensor([1.0] * (len(pairs) - 1) + [0.0])}

    run, fewer = trainer(callbacks=[DIDMonitor()]), trainer(callbacks=[DIDMonitor()])
    module = LitDPO(tiny_llama(0), tiny_llama(1))
    run.validate(module, DataLoader(pairs, batch_size=4, collate_fn=weighted), verbose=False)
    fewer.validate(module, loader(pairs[:3], 3), verbose=False)
    assert of(run.callback_metrics, "did/val/") == pytest.approx(of(fewer.callback_metrics, "did/val/"), rel=1e-4)


class Two(Own):
    def __init__(self) -> None:
        super().__init__(tiny_llama(0), tiny_llama(1))
        self.other = tiny_llama(2)


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (lambda: Two(), {}, r"one child of Two to be a causal language model that trains, but got 2 \(.*net, frozen"),
        (lambda: Own(tiny_llama(0)), {}, r"policy to be a PeftModel, but got 0 .*\. Pass `reference` or `logits_fn`"),
        (lambda: Two(), {"policy": "nett"}, "`policy` to be an attribute of Two, but got 'nett'"),
        (
            lambda: Own(tiny_llama(0)),
            {"reference": tiny_llama(1, vocab_size=68)},
            "the policy's vocabulary, 67 entries, but got 68",
        ),
    ],
)
def test_what_is_missing_is_told(module, options, message):
    run = trainer(callbacks=[DIDMonitor(**options)])
    with pytest.raises(ValueError, match=message):
        run.validate(module(), transformers_loader(make_pairs(2), 2), verbose=False)


def test_a_policy_that_is_no_module_is_a_type_error():
    run = trainer(callbacks=[DIDMonitor(policy="training")])
    with pytest.raises(TypeError, match=r"`policy` \('training'\) to be a module, but got bool"):
        run.validate(Two(), transformers_loader(make_pairs(2), 2), verbose=False)


def test_the_policy_by_name():
    run = trainer(callbacks=[DIDMonitor(policy="net")])
    run.validate(Two(), transformers_loader(make_pairs(2), 2), verbose=False)
    assert run.callback_metrics["did/val/kl"] > 0.1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"every_n_steps": -1}, ValueError, "`every_n_steps` to be an integer of at least 0, but got -1"),
        ({"every_n_steps": 1.5}, TypeError, "`every_n_steps` to be an integer of at least 0, but got 1.5"),
        ({"policy": 3}, TypeError, "`policy` to be the name of an attribute, but got int"),
        ({"reference": 3}, TypeError, "`reference` to be a model or its name, but got int"),
        ({"logits_fn": 3}, TypeError, "`logits_fn` to be callable, but got int"),
        ({"logits_fn": own_logits, "policy": "net"}, ValueError, "to be None with `logits_fn`"),
        ({"beta": 0}, ValueError, "`beta` to be above 0"),
        ({"unit": "bit"}, ValueError, "`unit`"),
        ({"every": 5}, TypeError, "unexpected keyword argument 'every'"),
    ],
)
def test_arguments_out_of_range(options, error, message):
    with pytest.raises(error, match=message):
        DIDMonitor(**options)
