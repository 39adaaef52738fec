"""LitDPO with `cache_kind="logprobs"`: trained as without a cache. What needs whole distributions is for validation."""

from __future__ import annotations

import gc
import json
import re
import sys
import weakref
from functools import partial

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn.functional import logsigmoid

from lit_did import DIDMonitor, LitDPO, LitDPOPG
from lit_did.modules.pairs import OF_DISTRIBUTIONS
from lit_did.reference_cache import storage
from tests.modules.tiny import loader, make_pairs, tiny_llama, trainer
from tests.processes import run_program

LORA = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}
TRAIN, VAL = make_pairs(6), make_pairs(5, seed=1)


def pairs_of(path=None, *, kind=LitDPO, lora=None, seeds=(0, 1), **arguments) -> LitDPO:
    policy, reference = (tiny_llama(seed).double() for seed in seeds)
    torch.manual_seed(5)  # of the adapter
    cache = {} if path is None else {"cache_reference": path, "cache_kind": "logprobs"}
    options = {"learning_rate": 1e-2, "adam_eps": 1e-3, "micro_batch_tokens": 16}
    return kind(policy, None if lora else reference, lora=lora, **{**options, **cache, **arguments})


def fit(module: LitDPO, *data, ckpt_path=None, **options) -> dict[str, float]:
    torch.manual_seed(9)
    run = trainer(**{"max_epochs": 2, **options})
    run.fit(module, *(data or (loader(TRAIN, 3), loader(VAL, 2))), ckpt_path=ckpt_path)
    return {name: float(value) for name, value in run.callback_metrics.items()}


def assert_same_weights(one: LitDPO, other: LitDPO) -> None:
    for mine, expected in zip(one.policy.parameters(), other.policy.parameters(), strict=True):
        torch.testing.assert_close(mine, expected, atol=1e-9, rtol=0)


def of_log_ratios(chosen, rejected):
    return -logsigmoid(0.1 * (chosen.log_ratio - rejected.log_ratio)) + 0.01 * chosen.policy_entropy


LOSSES = {
    "sigmoid": {},
    "sigmoid_norm": {"loss": "sigmoid_norm", "beta": 1.0},
    "robust": {"loss": "robust", "label_smoothing": 0.1},
    "hinge": {"loss": "hinge"},
    "ipo": {"loss": "ipo"},
    "a mixture": {"loss": {"sigmoid": 0.7, "ipo": 0.1, "sft": 0.2}},
    "sft": {"loss": "sigmoid", "nll_weight": 0.3},
    "a function": {"loss": of_log_ratios},
    "projected": {"kind": LitDPOPG},
    "lora": {"lora": LORA},
    "lora start": {"lora": LORA, "reference": "adapter"},
}


@pytest.mark.parametrize("name", LOSSES)
def test_trains_as_without_a_cache(name, tmp_path):
    make = partial(pairs_of, **LOSSES[name])
    if name == "lora start":  # LitDPO makes the adapter, and then its copy

        def make(path=None, **arguments):
            arguments |= {"cache_reference": path, "cache_kind": "logprobs"} if path else {}
            torch.manual_seed(5)
            return LitDPO(tiny_llama().double(), learning_rate=1e-2, adam_eps=1e-3, **LOSSES[name], **arguments)

    expected = make()
    wanted = fit(expected)
    for _ in ("filled", "found"):
        module = make(tmp_path)
        logged = fit(module)
        assert_same_weights(module, expected)
        missing = {f"train/{metric}" for metric in OF_DISTRIBUTIONS}
        assert wanted.keys() - logged.keys() == missing
        assert logged == pytest.approx({name: wanted[name] for name in logged}, abs=1e-9)  # validation is whole
    assert not all(map(torch.equal, expected.policy.parameters(), make().policy.parameters()))  # the premise


def test_bfloat16_and_no_plain_output_layer(tmp_path):
    """Log-probabilities need no hidden states."""

    class Logits(type(tiny_llama())):
        def forward(self, *arguments, **options):
            output = super().forward(*arguments, **options)
            return type(output)(logits=output.logits.tanh())

    def make(**cache) -> LitDPO:
        torch.manual_seed(0)
        return LitDPO(*(Logits(tiny_llama(seed).config) for seed in (0, 1)), learning_rate=1e-2, adam_eps=1e-3, **cache)

    runs = []
    for cache in ({}, {"cache_reference": tmp_path, "cache_kind": "logprobs"}):
        module = make(**cache)
        with pytest.warns(UserWarning, match="does not expose last hidden states"):
            fit(module, precision="bf16-mixed")
        runs.append(module)
    for mine, expected in zip(*(module.policy.parameters() for module in runs), strict=True):
        torch.testing.assert_close(mine, expected, atol=1e-3, rtol=1e-3)


def test_the_reference_does_not_run_in_training(tmp_path):
    fit(pairs_of(tmp_path))
    module = pairs_of(tmp_path)
    stages = set()
    handle = module.reference.model.register_forward_pre_hook(lambda *_: stages.add(module.trainer.state.stage.value))
    fit(module)
    handle.remove()
    assert stages == {"sanity_check", "validate"}


@pytest.mark.parametrize("validated", [True, False])
def test_a_reference_that_nobody_needs_is_freed(tmp_path, validated):
    gc.disable()
    try:
        module = pairs_of(tmp_path)
        layer = weakref.ref(module.reference.model.layers[0].mlp.up_proj.weight)
        data = [loader(TRAIN, 3)] + [loader(VAL, 2)] * validated
        fit(module, *data)
        assert (layer() is None) == (module.reference is None) == (not validated)
    finally:
        gc.enable()
    others = loader(make_pairs(4, seed=7), 2)
    if validated:
        (metrics,) = trainer().validate(module, others, verbose=False)
        assert metrics["val/kl"] > 0
    else:
        (metrics,) = trainer().validate(module, loader(TRAIN, 4), verbose=False)
        assert "val/kl" not in metrics
        assert metrics["val/chosen_log_ratio"] != 0
        with pytest.raises(ValueError, match="hold every sequence, but 4 of 4 are missing"):
            trainer().validate(module, others, verbose=False)
        with pytest.raises(ValueError, match="layers were freed, but got 8 other sequences"):
            fit(module, others)
        with pytest.raises(ValueError, match=r"Expected one child of LitDPO .*that does not train"):
            fit(module, *data, callbacks=[DIDMonitor(every_n_steps=1)])


def test_size(tmp_path):
    """The key, the length and the value of each sequence: 32 bytes."""
    sizes = {}
    for kind in ("logprobs", "hidden_states"):
        fit(pairs_of(tmp_path / kind, cache_kind=kind), max_steps=1)
        (file,) = (tmp_path / kind / "reference").glob("*.safetensors")
        sizes[kind] = file.stat().st_size
    sequences = 2 * (len(TRAIN) + len(VAL))
    header = 300
    tokens = sum(len(side) for _, *sides in [*TRAIN, *VAL] for side in sides)
    assert 32 * sequences < sizes["logprobs"] < 32 * sequences + header
    assert (24 + 8 * 32 * tokens / sequences) * sequences < sizes["hidden_states"]  # 32 numbers of float64 a token


def test_shards_have_at_most_so_many_sequences(tmp_path, monkeypatch):
    monkeypatch.setattr(
        storage.CacheWriter.__init__,
        "__kwdefaults__",
        {**storage.CacheWriter.__init__.__kwdefaults__, "shard_sequences": 5},
    )
    expected, module = pairs_of(), pairs_of(tmp_path)
    fit(expected)
    fit(module)
    assert_same_weights(module, expected)
    shards = json.loads((tmp_path / "reference" / "index.json").read_text())["shards"]
    assert len(shards) == 5  # of 22 sequences


def test_the_start_is_cached_and_not_the_policy_that_is_resumed(tmp_path):
    """A run that goes on from a checkpoint fills the folder with what the first run would have."""
    made = []
    for lora in (None, LORA):
        for where in ("first", "resumed"):
            module = pairs_of(tmp_path / f"{where} {lora}", lora=lora, seeds=(0, 0))
            save = ModelCheckpoint(tmp_path, filename=f"{lora is None}", every_n_train_steps=2)
            options = {"callbacks": [save], "enable_checkpointing": True} if where == "first" else {"max_epochs": 3}
            checkpoint = tmp_path / f"{lora is None}.ckpt" if where == "resumed" else None
            fit(module, ckpt_path=checkpoint, **options)
            (file,) = (tmp_path / f"{where} {lora}" / "reference").glob("*.safetensors")
            made.append(file.read_bytes())
    assert made[0] == made[1]
    assert made[2] == made[3]


def test_log_probabilities_of_another_start_are_noticed(tmp_path):
    """The warning of a policy that differs from its reference, with the cause."""
    fit(pairs_of(tmp_path / "0", seeds=(0, 0)), max_steps=1)
    with pytest.warns(UserWarning, match="the policy should equal its reference.*the reference has other weights"):
        fit(pairs_of(tmp_path / "1", seeds=(0, 1)), max_steps=1)


def with_kl(chosen, rejected):
    return -logsigmoid(chosen.log_ratio - rejected.log_ratio) + chosen.kl


def test_what_needs_whole_distributions_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r'`token_did_entropy_weight` to be 0 with `cache_kind="logprobs"`.*got 0.1'):
        pairs_of(tmp_path, token_did_entropy_weight=0.1)
    with pytest.raises(ValueError, match="`loss` to be a function of log-probabilities"):
        fit(pairs_of(tmp_path, loss=with_kl))
    with pytest.raises(ValueError, match="`cache_reference` to be a folder with `cache_kind="):
        LitDPO(tiny_llama(), cache_kind="logprobs")
    with pytest.raises(ValueError, match=r"`cache_kind` to be .*'hidden_states'.*'logprobs'.* got 'logits'"):
        LitDPO(tiny_llama(), cache_reference=tmp_path, cache_kind="logits")


@pytest.mark.parametrize("kind", ["logprobs", "hidden_states"])
def test_a_cache_of_the_other_kind_is_refused(kind, tmp_path):
    fit(pairs_of(tmp_path, cache_kind=kind), max_steps=1)
    other = {"logprobs": "hidden_states", "hidden_states": "logprobs"}[kind]
    with pytest.raises(ValueError, match=re.escape(f"it differs in kind ({kind} instead of {other}).")):
        fit(pairs_of(tmp_path, cache_kind=other))


def run(folder, processes: int, *names: str) -> None:
    run_program(sys.executable, "-m", "tests.modules.sharded", folder, processes, ";".join(names))


def assert_sharded(folder, name: str, layout: str, one: dict, *, in_validation: bool = False) -> list[dict]:
    """Checks the ranks of a run against one process without a cache, and returns what they saved."""
    ranks = [torch.load(folder / f"{name}.{layout}.{rank}") for rank in range(1 if layout == "1x1" else 2)]
    for rank in ranks:
        assert rank["weights"].keys() == one["weights"].keys()
        for weight, expected in one["weights"].items():
            assert (rank["weights"][weight] - expected).abs().max() < 1e-9, (name, layout, weight)
        stages = ("train",) if in_validation else ("train", "val")
        missing = {f"{stage}/{metric}" for metric in OF_DISTRIBUTIONS for stage in stages}
        assert one["metrics"].keys() - rank["metrics"].keys() == missing
        for metric, value in rank["metrics"].items():
            assert value == pytest.approx(one["metrics"][metric], rel=1e-6, abs=1e-6), (name, layout, metric)
    return ranks


@pytest.mark.parametrize("first", [1, pytest.param(2, marks=pytest.mark.long)])
def test_sharded_models_and_one_process_share_a_cache(first, tmp_path):
    """With the cache, no sharded run loads the reference."""
    for number in (first, 3 - first):
        run(tmp_path, number, *["full"] * (number == 1), "cached")
    one = torch.load(tmp_path / "full.1x1.0")
    assert_sharded(tmp_path, "cached", "1x1", one, in_validation=True)
    for layout in ("2x1", "1x2"):
        for rank in assert_sharded(tmp_path, "cached", layout, one):
            made = first == 2 and layout == "2x1"
            assert rank["loaded"] == 1 + made
            assert len(rank["fused"]) == 1  # models in memory at the end


@pytest.mark.long
def test_sharded_models_make_the_cache(tmp_path):
    """FSDP deals seven batches to two processes, and both have to take part in each forward pass."""
    run(tmp_path, 1, "full", "lora")
    run(tmp_path, 2, "cached by each", "cached lora")
    one, lora = (torch.load(tmp_path / f"{name}.1x1.0") for name in ("full", "lora"))
    for layout in ("2x1", "1x2"):
        for rank in assert_sharded(tmp_path, "cached by each", layout, one):
            assert (rank["loaded"], len(rank["fused"])) == (2, 1)
    assert_sharded(tmp_path, "cached lora", "2x1", lora, in_validation=True)
