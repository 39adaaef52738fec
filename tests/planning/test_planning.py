"""lit_did.planning: plans equal measured steps on the CPU, few layers stand for all, and the command prints it."""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
import warnings

import pytest
import torch
from transformers import GPTNeoXConfig, LlamaConfig, MixtralConfig

from lit_did.cli.main import main
from lit_did.planning import HOLDERS, Plan, Run, fits, known_shapes, plan, plan_of, read_config
from lit_did.planning.advice import _changes
from lit_did.planning.counting import EXCHANGE, OUTPUT_LAYER, WEIGHTS, TensorBytes
from lit_did.planning.step import trace
from tests.planning.real_run import CONFIG, RUN, measured
from tests.processes import run_program

SMALL = {"tokens": 256, "length": 64, "prompt_length": 16}
SWITCHES = [
    {},
    {"gradient_checkpointing": True, "precision": "bf16-mixed", "micro_batches": 2},
    {"recompute_elementwise": True, "reference_free": True, "precision": "bf16-true"},
    {"lora": 4, "gradient_checkpointing": True},
]


def config_of(**changes) -> LlamaConfig:
    return LlamaConfig(**{**CONFIG, **changes})


def test_options_are_those_of_a_run():
    options = list(inspect.signature(plan).parameters.values())[1:]
    assert {option.name: option.default for option in options} == vars(Run())


def check(found: Plan, real: dict[str, int]) -> None:
    assert found.weights == real["weights"]
    assert found.optimizer == real["optimizer"]
    assert found.peak == pytest.approx(real["tensors"], rel=0.01)
    # The library takes scratch memory for bfloat16 products on some processors (with AMX): 0.4 MB of 8.
    assert found.peak == pytest.approx(real["allocated"], rel=0.06)
    assert sum(found.held.values()) == found.peak == max(found.parts.values())


@pytest.mark.parametrize("switches", SWITCHES)
def test_equals_a_measured_step(switches):
    config, run = config_of(tie_word_embeddings="lora" in switches), Run(**RUN | switches)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        real = measured(config, run)
    check(plan_of(config, run), real)


def test_equals_a_measured_step_on_two_processes(tmp_path):
    """gloo allocates copies of what it sends, so that only tensors are compared. No operator returns DDP's buckets."""
    cases = [
        {"gpus": 2, "strategy": "ddp"},
        {"gpus": 2, "gradient_checkpointing": True, "precision": "bf16-mixed", "reference_dtype": "float32"},
        {"gpus": 2, "lora": 4},
        {"gpus": 2, "tensor_parallel": 2},
    ]
    run_program(sys.executable, "-m", "tests.planning.real_run", tmp_path, json.dumps(cases))
    of_ranks = [json.loads((tmp_path / rank).read_text()) for rank in "01"]
    for number, switches in enumerate(cases):
        found = plan_of(config_of(), Run(**RUN | switches))
        for measurements in of_ranks:
            real = measurements[number]
            if found.run.replicated:
                assert found.peak == pytest.approx(real["allocated"], rel=0.1)
                real |= {"tensors": found.peak}
            check(found, real | {"allocated": found.peak})


@pytest.mark.parametrize(
    "switches",
    [
        {"micro_batches": 2, "cached_reference": True},
        {"gpus": 2, "strategy": "ddp", "lora": 4},
        {"gpus": 4, "gradient_checkpointing": True},
        {"gpus": 4, "tensor_parallel": 2},
    ],
)
def test_few_layers_stand_for_all(switches):
    config, run = config_of(num_hidden_layers=7), Run(**SMALL | switches)
    found, whole = plan_of(config, run), trace(config, run)
    highest = max(whole.peaks.values(), key=lambda peak: peak.total)
    assert found.peak == highest.total
    assert {h: b for h, b in found.held.items() if b} == {h: b for h, b in highest.held.items() if b}
    numbers = found.weights, found.reference, found.optimizer, found.parameters, found.trained_parameters
    assert numbers == whole[1:]


def test_tiles_are_those_of_a_gpu():
    """The output layer's logits take up to 1 GiB, which is CUDA's default, and not the 256 MiB of the CPU."""
    config = config_of(vocab_size=131_072, hidden_size=8, intermediate_size=8, head_dim=2)
    tokens = 4096
    found = plan_of(config, Run(tokens=tokens, length=256, prompt_length=1, precision="32-true"))
    gradients = 2 * 4 * 8 * (131_072 + tokens)  # of the weight and of hidden states
    assert 0.95 * 2**30 < found.held[OUTPUT_LAYER] < 1.05 * 2**30 + gradients


def test_layers_of_two_kinds_are_all_run():
    from transformers import Gemma2Config

    changes = {**CONFIG, "num_hidden_layers": 6, "head_dim": 16, "sliding_window": 32}
    config, run = Gemma2Config(**changes), Run(**SMALL)
    whole = trace(config, run)
    assert plan_of(config, run).peak == max(peak.total for peak in whole.peaks.values())


def test_what_the_known_shapes_take():
    assert known_shapes() == ["llama3-70b", "llama3-8b"]
    for name, number in (("llama3-8b", 8_030_261_248), ("llama3-70b", 70_553_706_496)):
        with torch.device("meta"):
            from transformers import AutoModelForCausalLM

            model = AutoModelForCausalLM.from_config(read_config(name))
        assert sum(parameter.numel() for parameter in model.parameters()) == number


def test_each_holder_gets_its_bytes():
    """An output that is not used makes the peak; what a switch frees is gone from its holder alone."""
    config = config_of()
    full, cached = (plan_of(config, Run(**SMALL, cached_reference=cached)) for cached in (False, True))
    number = sum(p.numel() for p in _on_meta(config).parameters())
    assert full.weights - 4 * number == full.reference - 4 * number == 64  # inv_freq, float32
    assert cached.reference == 4 * CONFIG["vocab_size"] * CONFIG["hidden_size"]
    assert full.parts["optimiser"] - cached.parts["optimiser"] == full.reference - cached.reference
    sharded, alone = (plan_of(config, Run(**SMALL, gpus=2, cached_reference=cached)) for cached in (False, True))
    assert (alone.weights, alone.reference) == (sharded.weights, 0)
    assert sharded.parts["optimiser"] - alone.parts["optimiser"] == sharded.reference > 0
    replicated = plan_of(config, Run(**SMALL, gpus=2, strategy="ddp"))
    assert replicated.peak - full.peak == 4 * number
    assert replicated.held[EXCHANGE] - full.held[EXCHANGE] == 4 * number
    assert tuple(full.held) == HOLDERS


def test_settings_of_sharding():
    """Replicas hold larger shards, and a reference on the CPU holds nothing but its buffers."""
    config, plain = config_of(), SMALL | {"precision": "32-true"}
    whole = plan_of(config, Run(**plain))
    sharded, replicated, offloaded, without = (
        plan_of(config, Run(**plain, gpus=4, **settings))
        for settings in ({}, {"dp_replicate_size": 2}, {"fsdp_cpu_offload": "reference"}, {"reference_free": True})
    )
    for found, shards in ((sharded, 4), (replicated, 2), (offloaded, 4)):
        assert (found.weights - 64) * shards == whole.weights - 64  # inv_freq
    assert (sharded.reference, offloaded.reference) == (sharded.weights, 64)
    layer = sum(p.numel() for p in _on_meta(config).model.layers[0].parameters())
    assert sharded.held[EXCHANGE] >= 4 * layer > whole.held[EXCHANGE] == 0
    # Nothing that FSDP has gathered of the reference is left.
    assert sharded.parts["optimiser"] - without.parts["optimiser"] == sharded.reference
    assert offloaded.parts["optimiser"] - without.parts["optimiser"] == offloaded.reference


def _on_meta(config):
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def test_counts_storages_once_and_what_is_resized():
    with TensorBytes() as counted:
        one = torch.empty(100, dtype=torch.uint8)
        view = one.view(10, 10)
        del one
        assert counted.now == 100
        view.untyped_storage().resize_(40)
        assert counted.now == 40
        counted.claim([view], WEIGHTS)
        assert counted.held[WEIGHTS] == 40
        del view
        assert counted.now == counted.held[WEIGHTS] == 0
    assert counted.peaks[None].total == 100
    assert torch.UntypedStorage.resize_ is not None
    torch.empty(3)  # no longer counted
    assert counted.now == 0


def test_fits():
    assert fits(int(0.9 * 24 * 2**30), 24)
    assert not fits(int(0.9 * 24 * 2**30) + 1, 24)


@pytest.mark.parametrize(
    "options",
    [
        {"gpus": 2, "fsdp_cpu_offload": "reference", "precision": "32-true"},
        {"gpus": 4, "dp_replicate_size": 2, "gradient_checkpointing": True},
        {"gpus": 2, "strategy": "ddp", "cached_reference": True},
    ],
)
def test_advice_goes_with_the_options(options):
    """Each change gives a run that is allowed."""
    run = Run(**SMALL | options)
    changed = [dataclasses.replace(run, **change) for *_, change in _changes(run)]
    assert len(changed) > 2
    assert run not in changed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpus": 0}, "Expected `gpus` to be an integer of at least 1"),
        ({"gpus": 3, "tensor_parallel": 2}, "Expected `tensor_parallel` to divide the number of GPUs, 3, but got 2"),
        ({"gpus": 2, "tensor_parallel": 2, "lora": 4}, "Expected `tensor_parallel` to be 1 with LoRA"),
        ({"gpus": 2, "tensor_parallel": 2, "strategy": "ddp"}, "Expected `tensor_parallel` to be 1 with DDP"),
        ({"length": 8, "prompt_length": 8}, "Expected `prompt_length` to be less than `length`, 8, but got 8"),
        ({"reference_free": True, "cached_reference": True}, "Expected `cached_reference` to be False"),
        (
            {"gpus": 4, "dp_replicate_size": 3},
            "Expected `dp_replicate_size` to divide .* 4, and to be 1 without, but got 3",
        ),
        ({"gpus": 2, "strategy": "ddp", "dp_replicate_size": 2}, "Expected `dp_replicate_size` to divide"),
        ({"gpus": 2, "lora": 4, "fsdp_cpu_offload": "reference"}, "Expected `fsdp_cpu_offload` to be None without"),
        ({"precision": "16-mixed"}, "Expected `precision` to be one of"),
    ],
)
def test_options_that_do_not_go_together(options, message):
    with pytest.raises(ValueError, match=message):
        Run(**options)


def test_other_architectures():
    """They are planned, or refused with the reason."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    found = plan_of(GPTNeoXConfig(**sizes, vocab_size=64), Run(**SMALL))
    assert found.peak > found.weights + found.reference + found.optimizer
    mixtral = MixtralConfig(**sizes, num_key_value_heads=2, vocab_size=64)
    found = plan_of(mixtral, Run(**SMALL, precision="bf16-true"))
    assert found.peak > found.weights + found.reference + found.optimizer
    with pytest.raises(ValueError, match=r"Expected `model` to run on tensors .*, but MixtralForCausalLM does not: "):
        plan_of(mixtral, Run(**SMALL, precision="32-true"))


@pytest.mark.parametrize("option", [["--context_parallel_size", "4"], ["--context-parallel-size=4"]])
def test_an_option_of_training_that_a_plan_does_not_know(option, capsys):
    assert main(["plan", "llama3-8b", *option]) == 2
    assert "divide --tokens, --length and --prompt_length by it" in capsys.readouterr().err


def test_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **CONFIG}))
    options = ["--tokens", "256", "--length", "64", "--prompt_length", "16", "--gradient_checkpointing"]
    assert main(["plan", str(tmp_path), "--lora", "4", *options]) == 0
    printed = capsys.readouterr().out
    found = plan(tmp_path, lora=4, tokens=256, length=64, prompt_length=16, gradient_checkpointing=True)
    assert f"Peak memory of a GPU: {found.peak / 2**20:.1f} MiB" in printed
    assert "It fits into a GPU of 24, 40, 80 and 141 GiB" in printed
    for switch in ("micro_batch_tokens=128", "dtype=bfloat16"):
        assert switch in printed
    assert "gradient_checkpointing " not in printed.partition("With one change")[2]
    assert "helps most" in printed

    assert main(["plan", str(tmp_path / "config.json"), "--no_advice", *options]) == 0
    assert "With one change" not in capsys.readouterr().out

    for model, message in {
        "./nowhere": "nowhere is not a folder",
        "llama3-9b": "Models whose shape lit-did knows: llama3-70b, llama3-8b",
    }.items():
        assert main(["plan", model]) == 2
        assert message in capsys.readouterr().err


def test_config_files_that_are_none(tmp_path):
    file = tmp_path / "other.json"
    for text, message in {
        "{}": "to be a model's config.json, with its model_type",
        '{"model_type": "no such"}': "to be the config.json of a model of transformers",
        json.dumps({"model_type": "llama", "quantization_config": {"load_in_4bit": True}}): "not to be quantised",
    }.items():
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_config(file)
    with pytest.raises(FileNotFoundError):
        read_config(tmp_path / "missing.json")
    with pytest.raises(TypeError, match="Expected `model` to be a name, a path or a configuration, but got int"):
        read_config(3)
