"""LitDPO with `cache_reference`: trained as without, the reference run once, and no cache of anything else used."""

from __future__ import annotations

import copy
import gc
import json
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import lightning
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, IterableDataset

from lit_did import DIDMonitor, LitDPO, LitDPOPG
from lit_did.batches.sequences import read_sequences
from lit_did.data import PreferenceDataModule
from lit_did.data.collating import collate_packed
from lit_did.models.trial import find
from lit_did.reference_cache import precompute
from lit_did.reference_cache.precompute import _date_hint, cached_reference
from lit_did.reference_cache.storage import CacheWriter, ReferenceCache, publish, unfinished_cache
from tests.modules.tiny import byte_tokenizer, collate, loader, make_pairs, tiny_gpt2, tiny_llama, trainer
from tests.processes import run_program

# The references here are other models than the policies start from, so that nothing is 0.
pytestmark = pytest.mark.filterwarnings("ignore:.* pairs are longer than max_length")

TOKENIZER = byte_tokenizer()
LORA = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}
OPTIMIZER = {"learning_rate": 1e-2, "adam_eps": 1e-3}  # so that Adam does not turn rounding into whole steps
ROWS = [
    {"prompt": "What is " + "so " * (n % 3), "chosen": "ab"[: n % 2 + 1] * n, "rejected": "c" * n} for n in range(1, 10)
]
TRAIN, VAL = make_pairs(6), make_pairs(5, seed=1)


class Record(lightning.Callback):
    """What was trained on and with which random numbers, and what was logged."""

    def __init__(self) -> None:
        self.batches: list[torch.Tensor] = []
        self.random: list[torch.Tensor] = []
        self.logged: list[dict[str, float]] = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.batches.append(batch["input_ids"])
        self.random.append(torch.get_rng_state())

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.logged.append({name: float(value) for name, value in trainer.logged_metrics.items()})


def pairs_of(path=None, reference: int | None = 1, lora=None, kind=LitDPO, tied=False, **arguments) -> LitDPO:
    """A module for pairs of `tests.modules.tiny`; LoRA's reference is its base model."""
    torch.manual_seed(5)  # of the adapter
    reference = None if lora or reference is None else tiny_llama(reference, tie_word_embeddings=tied)
    policy = tiny_llama(0, tie_word_embeddings=tied)
    return kind(policy, reference, lora=lora, cache_reference=path, **OPTIMIZER, **arguments)


def text_of(path=None, **arguments) -> LitDPO:
    """A module for the bytes of texts."""
    models = [tiny_llama(seed, vocab_size=len(TOKENIZER)) for seed in (0, 1)]
    return LitDPO(*models, cache_reference=path, **OPTIMIZER, **arguments)


def fit(module: LitDPO, *data, ckpt_path=None, callbacks=(), **options) -> Record:
    record = Record()
    torch.manual_seed(9)
    run = trainer(**{"max_epochs": 2, **options}, callbacks=[record, *callbacks])
    run.fit(module, *data, ckpt_path=ckpt_path)
    record.logged.append({name: float(value) for name, value in run.callback_metrics.items()})
    return record


def assert_same(one: tuple[LitDPO, Record], other: tuple[LitDPO, Record]) -> None:
    # The reference may have met a sequence in another batch: float32 rounds otherwise there.
    tolerance = 1e-5
    (module, record), (expected_module, expected) = one, other
    assert len(expected.batches) >= 2
    for name in ("batches", "random"):
        assert all(map(torch.equal, getattr(record, name), getattr(expected, name))), name
    for mine, wanted in zip(record.logged, expected.logged, strict=True):
        assert mine.keys() == wanted.keys()
        assert len(wanted) >= 14
        for name, value in wanted.items():
            assert mine[name] == pytest.approx(value, rel=tolerance, abs=tolerance), name
    for mine, wanted in zip(module.policy.parameters(), expected_module.policy.parameters(), strict=True):
        torch.testing.assert_close(mine, wanted, atol=tolerance, rtol=tolerance)


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.rglob("*") if file.is_file()}


def shuffled(**options) -> DataLoader:
    return DataLoader(TRAIN, collate_fn=collate, shuffle=True, **options)


def texts(**options) -> PreferenceDataModule:
    return PreferenceDataModule(ROWS, TOKENIZER, val=ROWS[:3], max_length=40, seed=3, **options)


CASES = {
    "full": (pairs_of, lambda: [loader(TRAIN, 3), loader(VAL, 2)], {}),
    "lora": (partial(pairs_of, lora=LORA), lambda: [loader(TRAIN, 3), loader(VAL, 2)], {}),
    "projected": (partial(pairs_of, kind=LitDPOPG), lambda: [loader(TRAIN, 3), loader(VAL, 2)], {}),
    "bfloat16": (pairs_of, lambda: [loader(TRAIN, 3), loader(VAL, 2)], {"precision": "bf16-mixed"}),
    "parts of batches, no validation": (
        partial(pairs_of, gradient_checkpointing=True, micro_batch_tokens=16),
        lambda: [loader(TRAIN, 3)],
        {},
    ),
    "validation left out": (pairs_of, lambda: [loader(TRAIN, 3), loader(VAL, 2)], {"limit_val_batches": 0}),
    "validation later": (
        pairs_of,
        lambda: [loader(TRAIN, 3), loader(VAL, 2)],
        {"num_sanity_val_steps": 0, "check_val_every_n_epoch": 2},
    ),
    "several validation loaders": (pairs_of, lambda: [loader(TRAIN, 3), [loader(VAL, 2), loader(TRAIN, 4)]], {}),
    "batches as a dataset": (pairs_of, lambda: [DataLoader([collate(TRAIN), collate(VAL)], batch_size=None)], {}),
    "shuffled by a worker": (pairs_of, lambda: [shuffled(batch_size=4, drop_last=True, num_workers=1)], {}),
    "padded texts": (text_of, lambda: [texts(batch_size=4, drop_last=True)], {}),
    "packed texts": (text_of, lambda: [texts(tokens_per_batch=120, num_workers=1)], {}),
}


@pytest.mark.parametrize("case", CASES)
def test_trains_as_without_the_cache(tmp_path, case):
    make, data, options = CASES[case]
    module = make()
    expected = module, fit(module, *data(), **options)
    for _ in ("filled", "found"):
        module = make(tmp_path / "cache")
        assert_same((module, fit(module, *data(), **options)), expected)
        if case not in ("full", "lora", "packed texts"):
            break


def try_out(model) -> None:
    """Models are tried on sequences as long as the batch's before they are used."""
    batch = read_sequences(collate([*TRAIN, *VAL] * 2))
    with torch.no_grad():
        find(model, batch)


def test_the_reference_runs_once_over_each_pair_and_never_again(tmp_path):
    def reference_tokens() -> int:
        module, tokens = pairs_of(tmp_path), []
        try_out(module.reference)
        body = module.reference.model.register_forward_hook(
            lambda _, args, kwargs, output: tokens.append(kwargs["input_ids"].numel()), with_kwargs=True
        )
        fit(module, shuffled(batch_size=4, drop_last=True), loader(VAL, 2), num_sanity_val_steps=0)
        body.remove()
        return sum(tokens)

    # Packed, without the last token, which predicts nothing; their prompts are too short to be shared.
    pairs = [*TRAIN, *VAL]
    assert reference_tokens() == sum(len(p) + len(side) - 1 for p, *sides in pairs for side in sides)
    assert reference_tokens() == 0


@pytest.mark.parametrize("shown", [True, False])
def test_progress_is_shown_where_the_trainer_shows_it(tmp_path, capsys, shown):
    fit(pairs_of(tmp_path), loader(TRAIN, 4), enable_progress_bar=shown)
    assert ("Reference: " in capsys.readouterr().err) == shown
    fit(pairs_of(tmp_path), loader(TRAIN, 4), enable_progress_bar=shown)
    assert "Reference" not in capsys.readouterr().err


@pytest.mark.parametrize("tied", [False, True])
def test_of_the_reference_only_the_output_layer_is_kept(tmp_path, tied):
    gc.disable()  # what waits for the collector can wait for long
    try:
        module = pairs_of(tmp_path / "cache", tied=tied)
        kept = module.reference.get_output_embeddings().weight.clone()
        layer = weakref.ref(module.reference.model.layers[0].mlp)
        parameter = weakref.ref(layer().up_proj.weight)
        run = trainer(max_epochs=1)
        run.fit(module, loader(TRAIN, 3), loader(VAL, 2))
        assert layer() is None
        assert parameter() is None
    finally:
        gc.enable()
    (weight,) = module.reference.parameters()
    assert torch.equal(weight, kept)
    assert not weight.requires_grad
    run.save_checkpoint(tmp_path / "last.ckpt")
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert state.keys() == {f"models.policy.{name}" for name in module.policy.state_dict()}


def test_a_bias_and_the_scales_of_the_output_layer_are_kept(tmp_path):
    def models() -> list[torch.nn.Module]:
        made = [tiny_gpt2(seed) for seed in (0, 1)]
        for model in made:
            model.lm_head.bias = torch.nn.Parameter(torch.randn(model.config.vocab_size))
        return made

    runs = []
    for path in (None, tmp_path):
        module = LitDPO(*models(), cache_reference=path, **OPTIMIZER)
        runs.append((module, fit(module, loader(TRAIN, 3))))
    assert runs[1][0].reference.bias is not None
    assert_same(*runs)


def test_a_lora_policy_keeps_its_layers_and_shares_the_cache_of_full_fine_tuning(tmp_path):
    module = pairs_of(tmp_path, reference=None)
    fit(module, loader(TRAIN, 3))
    index = tmp_path / "reference" / "index.json"
    written = index.stat().st_mtime_ns
    adapted = pairs_of(tmp_path, lora=LORA)
    before = {name: value.clone() for name, value in adapted.policy.state_dict().items()}
    fit(adapted, loader(TRAIN, 3))
    assert index.stat().st_mtime_ns == written
    assert {file.name for file in tmp_path.iterdir()} == {".lock", "reference"}
    after = adapted.policy.state_dict()
    assert after.keys() == before.keys()
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert moved == {name for name in after if "lora_" in name}


@pytest.mark.parametrize("options", [{"batch_size": 2}, {"tokens_per_batch": 120, "num_workers": 1}])
def test_a_run_resumed_in_the_middle_of_an_epoch(tmp_path, options):
    module = text_of()
    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole = fit(module, texts(**options), callbacks=[save], enable_checkpointing=True)
    steps = len(whole.batches)
    assert steps // 2 > 2  # the premise: in the second epoch, and not its first batch
    done = steps // 2 + 1
    expected = module
    for path in (None, tmp_path / "cache", tmp_path / "cache"):
        module = text_of(path)
        resumed = fit(module, texts(**options), ckpt_path=tmp_path / f"step={done}.ckpt")
        assert len(resumed.batches) == steps - done
        assert all(map(torch.equal, resumed.batches, whole.batches[done:]))
        assert resumed.logged[-1] == pytest.approx(whole.logged[-1], rel=1e-5, abs=1e-5)
        for mine, wanted in zip(module.policy.parameters(), expected.policy.parameters(), strict=True):
            torch.testing.assert_close(mine, wanted, atol=1e-5, rtol=1e-5)


def test_after_training(tmp_path):
    runs = []
    for path in (None, tmp_path):
        module = pairs_of(path)
        first = fit(module, loader(TRAIN, 3), loader(VAL, 2))
        second = fit(module, loader(VAL, 2), loader(TRAIN, 4))  # the same pairs, another way
        first.logged += second.logged
        first.logged += trainer().validate(module, loader(VAL, 3), verbose=False)
        first.logged[-1] = {name: float(value) for name, value in first.logged[-1].items()}
        predicted = trainer().predict(module, loader(TRAIN, 4))
        runs.append((module, first, predicted))
    assert_same(runs[1][:2], runs[0][:2])
    for mine, wanted in zip(runs[1][2], runs[0][2], strict=True):
        torch.testing.assert_close(mine, wanted, atol=1e-5, rtol=1e-5)
        assert wanted.chosen.reference_logprob.abs().min() > 0.1


def test_after_training_another_precision_is_refused(tmp_path):
    for lora in (None, LORA):
        module = pairs_of(tmp_path / str(lora is None), lora=lora)
        fit(module, loader(TRAIN, 3))
        with pytest.raises(
            ValueError,
            match="but got 0 other sequences and precision bf16-mixed" if lora is None else "differs in precision",
        ):
            fit(module, loader(TRAIN, 3), precision="bf16-mixed")


@pytest.mark.parametrize("lora", [None, LORA])
def test_after_training_a_module_can_be_copied(tmp_path, lora):
    module = pairs_of(tmp_path, lora=lora)
    fit(module, loader(TRAIN, 3))
    other = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    batch = next(iter(loader(TRAIN, 3)))
    assert (
        other.pair_statistics(batch)
        .chosen.reference_logprob.ne(module.pair_statistics(batch).chosen.reference_logprob)
        .all()
    )


def test_the_reference_that_was_given_gets_its_own_attention_back(tmp_path):
    module = pairs_of(tmp_path)
    reference = module.reference
    fit(module, loader(TRAIN, 3))
    assert reference.config._attn_implementation == "sdpa"


def test_after_training_other_pairs_are_refused(tmp_path):
    others = loader(make_pairs(4, seed=7), 2)
    for lora in (None, LORA):
        module = pairs_of(tmp_path / str(lora is None), lora=lora)
        fit(module, loader(TRAIN, 3))
        for use in ("validate", "predict"):
            with pytest.raises(ValueError, match="hold every sequence, but 4 of 4 are missing"):
                getattr(trainer(), use)(module, others)
        refused = "layers were freed, but got 8 other sequences" if lora is None else "differs in pairs"
        with pytest.raises(ValueError, match=refused):
            fit(module, others)


CHANGED = {
    "reference": ("reference", ""),
    "dtype": ("reference", ""),
    "precision": ("precision", ""),
    "pairs": ("pairs", "16 of the run's 16"),
    "length": ("pairs", "1 of the run's 14"),  # some are cut to the same tokens
    "template": ("pairs", "0 of the run's 18"),
    "tokenizer": ("pairs", "0 of the run's 18"),
}
"""what changes: the part of the fingerprint that differs, and how many sequences are in the cache all the same"""


@pytest.mark.parametrize("kind", ["hidden_states", "logprobs"])
@pytest.mark.parametrize("changed", CHANGED)
def test_a_stale_cache_is_refused_before_any_step(tmp_path, changed, kind):
    make = partial(text_of, cache_kind=kind)
    given = {"train": ROWS, "tokenizer": TOKENIZER, "val": ROWS[:3], "max_length": 40, "batch_size": 4}
    given["as_chat"] = changed == "template"
    fit(make(tmp_path), PreferenceDataModule(**given))
    written = contents(tmp_path)
    options, module = {}, make(tmp_path)
    if changed == "reference":
        with torch.no_grad():
            module.reference.model.layers[1].mlp.up_proj.weight[0, 0] += 1e-3
    elif changed == "dtype":
        module.reference.bfloat16()
    elif changed == "precision":
        options = {"precision": "bf16-mixed"}
    elif changed == "tokenizer":
        given["tokenizer"] = byte_tokenizer(shift=1)
    else:
        given |= {
            "pairs": {"train": ROWS[1:], "val": ROWS[2:3]},
            "length": {"max_length": 12},
            "template": {"chat_template": "{% for m in messages %}{{ m.content }} {% endfor %}"},
        }[changed]
    part, kept = CHANGED[changed]
    common = rf" {kept} sequences are among its 18\." if kept else ""
    record = Record()
    with pytest.raises(ValueError, match=rf"differs in {part} \([^)]*\)\.{common} Pass another folder"):
        fit(module, PreferenceDataModule(**given), callbacks=[record], **options)
    assert not record.batches
    assert contents(tmp_path) == written


class OfItsOwn(PreferenceDataModule):
    """Has batches that may hold anything."""

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train_dataset, 4, collate_fn=lambda examples: collate_packed(examples))


def test_keys_of_tokens_on_disk_are_made_once(tmp_path, monkeypatch):
    """A later run reads no pair for them, and refuses other pairs all the same."""

    def data(rows=ROWS, kind=PreferenceDataModule, **options) -> PreferenceDataModule:
        file = tmp_path / f"{len(rows)}.jsonl"
        file.write_text("\n".join(map(json.dumps, rows)))
        return kind(file, TOKENIZER, cache_tokens=tmp_path / "tokens", max_length=40, **options)

    read = []
    sequences = precompute._Batch.sequences
    monkeypatch.setattr(precompute._Batch, "sequences", lambda *given: read.append(given) or sequences(*given))
    run = partial(text_of, tmp_path / "cache", cache_kind="logprobs")
    fit(run(), data())
    assert len(read) == 2 * 2  # batches, for keys and for the reference
    (kept,) = (tmp_path / "cache" / ".keys").iterdir()
    assert (tmp_path / "tokens" / kept.name / "tokens.bin").exists()
    read.clear()
    for options in ({"batch_size": 3, "seed": 4}, {"tokens_per_batch": 120}):
        fit(run(), data(**options))
        assert not read
    fit(run(), data(kind=OfItsOwn))
    assert len(read) == 3
    for _ in ("made", "kept"):
        read.clear()
        with pytest.raises(ValueError, match=r"differs in pairs .* 16 of the run's 16 sequences are among its 18"):
            fit(run(), data(ROWS[1:]))
    assert not read


DATED = "{{ strftime_now('%d') }} {% for m in messages %}{{ m.content }} {% endfor %}"
DATED_OR_GIVEN = "{% if date_string is not defined %}{% set date_string = strftime_now('%d') %}{% endif %}" + DATED


@pytest.mark.parametrize(
    ("data", "remedy"),
    [
        ({"chat_template": DATED}, "Pass the data module a `chat_template` with a fixed date"),
        ({"chat_template": DATED_OR_GIVEN}, 'Pass the data module `chat_template_kwargs={"date_string": '),
        ({"tokenizer": SimpleNamespace(chat_template={"default": "x", "tool_use": DATED})}, "a `chat_template` with"),
        ({"chat_template": DATED_OR_GIVEN, "chat_template_kwargs": {"date_string": "today"}}, None),
        ({"chat_template": "x", "tokenizer": SimpleNamespace(chat_template=DATED)}, None),
        ({"tokenizer": SimpleNamespace(chat_template=None)}, None),
        ({}, None),
    ],
)
def test_todays_date_in_a_template_is_named_as_the_cause_of_other_data(data, remedy, tmp_path):
    with unfinished_cache(tmp_path) as folder:
        writer = CacheWriter(folder)
        writer.add([bytes(16)], torch.zeros(1, 2), np.array([0, 1]))
        writer.finish()
        publish(folder, {"reference": "a", "pairs": "b"})
    hint = _date_hint(SimpleNamespace(datamodule=SimpleNamespace(**data)))
    assert (remedy in hint) if remedy else not hint
    for mark, named in (({"reference": "a", "pairs": "c"}, remedy), ({"reference": "c", "pairs": "b"}, None)):
        with pytest.raises(ValueError, match="it differs in") as raised:
            ReferenceCache.open(tmp_path, mark, (), hint)
        assert ("today's date" in str(raised.value)) == bool(named)


def test_a_dated_cache_is_refused_with_the_date(tmp_path):
    def data(count):
        return PreferenceDataModule(ROWS[:count], TOKENIZER, max_length=40, as_chat=True, chat_template=DATED)

    fit(text_of(tmp_path), data(3), max_epochs=1)
    with pytest.raises(ValueError, match=r"differs in pairs .*today's date into every prompt \(`strftime_now`\)"):
        fit(text_of(tmp_path), data(4))


@pytest.mark.parametrize("damage", ["truncated", "changed", "missing"])
def test_a_damaged_cache_is_refused_before_any_step(tmp_path, damage):
    fit(pairs_of(tmp_path), loader(TRAIN, 3))
    (file,) = tmp_path.glob("reference/*.safetensors")
    content = bytearray(file.read_bytes())
    if damage == "truncated":
        file.write_bytes(content[:-100])
    elif damage == "changed":
        content[len(content) // 2] ^= 1  # of a hidden state
        file.write_bytes(content)
    else:
        file.unlink()
    expected = {"truncated": "bytes instead of", "changed": "has the checksum", "missing": "is missing"}
    record, module = Record(), pairs_of(tmp_path)
    with pytest.raises(ValueError, match=rf"Expected the cache .*{expected[damage]}.*Delete this folder"):
        fit(module, loader(TRAIN, 3), callbacks=[record])
    assert len(record.batches) == (damage == "changed")  # contents are checked when they are first used
    assert all(map(torch.equal, module.policy.parameters(), pairs_of().policy.parameters()))


def test_an_interrupted_run_leaves_nothing_that_would_be_used(tmp_path):
    path, module = tmp_path / "cache", pairs_of(tmp_path / "cache")
    batches = []

    def interrupt(*_):
        batches.append(None)
        if len(batches) == 2:
            raise RuntimeError("power cut")

    try_out(module.reference)
    module.reference.model.register_forward_hook(interrupt)
    with pytest.raises(RuntimeError, match="power cut"):
        fit(module, loader(TRAIN, 3))
    assert not ReferenceCache.exists(path)
    assert [file.name for file in path.iterdir()] == [".lock"]
    module, expected = pairs_of(path), pairs_of()
    assert_same((module, fit(module, loader(TRAIN, 3))), (expected, fit(expected, loader(TRAIN, 3))))


class Logits(type(tiny_llama())):
    """A Llama whose logits are not those of a linear layer."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        return type(output)(logits=output.logits.tanh())


class Stream(IterableDataset):
    def __iter__(self):
        return iter(TRAIN)


def test_what_cannot_be_cached_is_refused(tmp_path):
    refused = {
        r"has a known length with `cache_reference`, but got Stream": DataLoader(Stream(), 2, collate_fn=collate),
        r"Expected DataLoaders .* but got Batches": Batches([collate(TRAIN)]),
        r"`position_ids` to count from 0 in every sequence": DataLoader(TRAIN, 2, collate_fn=_later_positions),
        r"labels that are not shifted": DataLoader(TRAIN, 2, collate_fn=_unshifted),
        r"`input_ids` to be below the policy's 67 embeddings, but got 70": loader([([70], [2], [3])], 1),
    }
    for message, data in refused.items():
        with pytest.raises((TypeError, ValueError), match=message):
            fit(pairs_of(tmp_path), data, max_epochs=1)
    reference = Logits(tiny_llama(1).config)
    with (
        pytest.warns(UserWarning, match="does not expose last hidden states"),
        pytest.raises(ValueError, match=r"exposes last hidden states .* with `cache_reference`.*Logits"),
    ):
        fit(LitDPO(tiny_llama(0), reference, cache_reference=tmp_path), loader(TRAIN, 3))
    with pytest.raises(ValueError, match="`cache_reference` to be None with `loss='simpo'`"):
        LitDPO(tiny_llama(0), loss="simpo", cache_reference=tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="Expected `cache_reference` to be a folder"):
        fit(pairs_of(tmp_path / "file"), loader(TRAIN, 3))
    assert not ReferenceCache.exists(tmp_path)


def test_monitored(tmp_path):
    """The monitor uses the cache, and what `logits_fn` returns."""
    for lora, monitor in (
        (None, DIDMonitor(every_n_steps=1)),
        (None, DIDMonitor(lambda module, batch: module(batch), every_n_steps=1)),
        (LORA, DIDMonitor(every_n_steps=1)),
    ):
        logged = fit(pairs_of(tmp_path / str(lora), lora=lora), loader(TRAIN, 3), callbacks=[monitor]).logged[-1]
        compared = 0
        for name, value in logged.items():
            if name.startswith("did/train/"):
                compared += 1
                assert value == pytest.approx(logged[name.removeprefix("did/")], rel=1e-4, abs=1e-5), name
        assert compared >= 13


@pytest.mark.long
def test_two_processes_write_a_shard_each_and_train_as_one_without_a_cache(tmp_path):
    run_program(sys.executable, "-m", "tests.modules.two_processes", "cached", tmp_path)
    files = {file.name for file in (tmp_path / "2.cache" / "reference").iterdir()}
    assert files == {"00000-00000.safetensors", "00001-00000.safetensors", "index.json"}
    one = torch.load(tmp_path / "1.0")
    for rank in range(2):
        mine = torch.load(tmp_path / f"2.{rank}")
        assert mine["parameters"] == len(one["weights"]) + 1  # of the reference, the output layer alone
        for name, weight in one["weights"].items():
            # float32 sums in another order, through four steps of Adam
            torch.testing.assert_close(mine["weights"][name], weight, atol=1e-5, rtol=1e-4)
        for values in (mine["steps"][0], one["steps"][0]):  # the policy equals the reference: rounding breaks ties
            values.pop("train/reward_accuracy", None)
            values.pop("train/calibration_error", None)
        for values, expected in zip([*mine["steps"], mine["val"]], [*one["steps"], one["val"]], strict=True):
            assert values == pytest.approx(expected, rel=1e-3, abs=1e-4)


class Processes:
    """Runs `cached_reference` in threads that stand for processes: their collectives are a barrier."""

    def __init__(self, path: Path, number: int) -> None:
        self.path, self.barrier, self.values = path, threading.Barrier(number), [None] * number
        self.model = pairs_of().reference

    def exchange(self, rank: int, value):
        self.values[rank] = value
        self.barrier.wait(60)
        values = list(self.values)
        self.barrier.wait(60)
        return values

    def one(self, rank: int, outputs, batch_size: int):
        strategy = SimpleNamespace(
            broadcast=lambda value: self.exchange(rank, value)[0],
            reduce_boolean_decision=lambda value: all(self.exchange(rank, value)),
        )
        fake = SimpleNamespace(
            global_rank=rank,
            distributed_sampler_kwargs={"num_replicas": len(self.values), "rank": rank},
            strategy=strategy,
            precision="32-true",
            precision_plugin=trainer().precision_plugin,
            enable_validation=False,
            train_dataloader=loader(TRAIN, batch_size),
            val_dataloaders=None,
            progress_bar_callback=None,
        )
        try:
            return cached_reference(
                str(self.path), fake, self.model, read_sequences, partial(outputs, rank), None
            ).cache
        except Exception as error:
            return error

    def run(self, outputs=lambda rank, sequences: ones(sequences), batch_size: int = 2) -> list:
        with ThreadPoolExecutor(len(self.values)) as pool:
            return list(pool.map(lambda rank: self.one(rank, outputs, batch_size), range(len(self.values))))


def ones(sequences) -> SimpleNamespace:
    return SimpleNamespace(hidden=torch.ones(sequences.num_labels, 4))


def test_fewer_batches_than_processes(tmp_path):
    for cache in Processes(tmp_path, 2).run(batch_size=6):
        assert len(cache.keys()) == 12
    assert {file.name for file in (tmp_path / "reference").iterdir()} == {"00000-00000.safetensors", "index.json"}


def test_if_one_process_fails_all_raise(tmp_path):
    def outputs(rank, sequences):
        return ones(sequences) if rank != 1 else fail()

    def fail():
        raise RuntimeError("out of memory")

    def refused(errors, failed: int, message: str):
        assert isinstance(errors[failed], Exception)
        assert message in str(errors[failed])
        others = [str(error) for rank, error in enumerate(errors) if rank != failed]
        assert others == ["The reference cache failed on another process, whose error names the cause."] * 2

    processes = Processes(tmp_path, 3)
    refused(processes.run(outputs), 1, "out of memory")
    assert [file.name for file in tmp_path.iterdir()] == [".lock"]
    assert not any(isinstance(cache, Exception) for cache in processes.run())


class Batches:
    """Batches to go through, and no dataset."""

    def __init__(self, batches: list) -> None:
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def _later_positions(pairs: list) -> dict[str, torch.Tensor]:
    batch = collate(pairs)
    return batch | {"position_ids": torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"]) + 1}


def _unshifted(pairs: list) -> dict[str, torch.Tensor]:
    batch = collate(pairs)
    return batch | {"labels": batch["labels"].roll(1, 1)}
