"""Adapters: loaded by name on their base, kept as a frozen reference, and saved alone."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import peft
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from lit_did import PolicyAndReference
from lit_did.models.adapters import REFERENCE_ADAPTER, save_policy
from lit_did.models.loading import load_model, load_pair, load_reference
from tests.modules.tiny import collate, make_pairs, tiny_llama

LORA = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False, "task_type": "CAUSAL_LM"}
FORMS = {
    "LoRA": {},
    "DoRA": {"use_dora": True},
    "modules_to_save": {"target_modules": ["q_proj", "down_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    "trainable tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "ranks": {"rank_pattern": {"q_proj": 2}, "use_rslora": True},
}


def sft(**config) -> peft.PeftModel:
    """A model with a trained adapter."""
    torch.manual_seed(3)
    model = peft.get_peft_model(tiny_llama(0), peft.LoraConfig(**{**LORA, **config}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture
def folders(tmp_path) -> tuple[Path, Path]:
    """A base model and an adapter on it."""
    base, adapter = tmp_path / "base", tmp_path / "sft"
    tiny_llama(0).save_pretrained(base)
    model = sft()
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(adapter)
    return base, adapter


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(1, 9)[None]).logits


def log_ratios(models: PolicyAndReference, pairs: int = 3) -> torch.Tensor:
    return models(collate(make_pairs(pairs))).log_ratio


# ---------------------------------------------------------------------------------------------------------------
# By name
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("form", FORMS)
def test_an_adapter_by_name_is_one_that_trains_on_its_base(folders, form):
    base, adapter = folders
    model = sft(**FORMS[form])
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(adapter)
    loaded = load_model(adapter, "policy", {})
    assert isinstance(loaded, peft.PeftModel)
    torch.testing.assert_close(logits(loaded), logits(model.eval()))
    assert not torch.allclose(logits(loaded), logits(tiny_llama(0)), atol=1e-2)  # the premise
    trained = {name for name, p in loaded.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in model.named_parameters() if p.requires_grad}
    assert not any(module.training for module in loaded.modules())  # as from_pretrained leaves a model
    assert {p.dtype for p in load_model(adapter, "policy", {"dtype": torch.bfloat16}).get_base_model().parameters()} > {
        torch.bfloat16
    }


def test_an_adapter_of_the_hub(folders, tmp_path):
    """What the hub's client keeps of a repository: its commit, and the files that were downloaded."""
    base, adapter = folders
    for name, folder in (("base", base), ("sft", adapter)):
        repository = tmp_path / "cache" / f"models--me--{name}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("abc")
        shutil.copytree(folder, repository / "snapshots" / "abc")
    config = tmp_path / "cache" / "models--me--sft" / "snapshots" / "abc" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "me/base"}))
    shutil.rmtree(base)
    loaded = load_model("me/sft", "policy", {"cache_dir": str(tmp_path / "cache")})
    torch.testing.assert_close(logits(loaded), logits(sft().eval()))


def test_an_adapter_as_a_reference_is_frozen_and_active(folders):
    base, adapter = folders
    reference = load_reference(adapter, tiny_llama(0))
    assert not any(p.requires_grad for p in reference.parameters())
    models = PolicyAndReference(load_model(base, "policy", {}), reference)
    expected = PolicyAndReference(tiny_llama(0), sft().merge_and_unload())
    torch.testing.assert_close(log_ratios(models), log_ratios(expected), rtol=1e-4, atol=1e-4)
    assert not any(p.requires_grad for p in models.reference.parameters())


def without_base(base: Path, adapter: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))


def on_an_adapter(base: Path, adapter: Path) -> None:
    shutil.rmtree(base)
    shutil.copytree(adapter, base)


def on_another_base(base: Path, adapter: Path) -> None:
    tiny_llama(0, hidden_size=16).save_pretrained(base)


def without_some_weights(base: Path, adapter: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(adapter / "adapter_model.safetensors")
    weights.popitem()
    save_file(weights, adapter / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (without_base, ValueError, "adapter of `policy` to name its base model in adapter_config.json"),
        (lambda base, adapter: shutil.rmtree(base), FileNotFoundError, "`base_model_name_or_path` of `policy` to be a"),
        (on_an_adapter, ValueError, "base model of `policy` .* to be a model, but got another adapter"),
        (on_another_base, ValueError, "adapter that fits its base model, but .*size mismatch"),
        (without_some_weights, ValueError, "adapter that fits its base model, but .*missing adapter keys"),
        (lambda _, adapter: tiny_llama(0).save_pretrained(adapter), ValueError, "holds both"),
        (lambda _, adapter: (adapter / "adapter_model.safetensors").unlink(), OSError, "no adapter_model.safetensors"),
    ],
)
def test_an_adapter_that_does_not_load_is_refused_in_one_line(folders, spoil, error, message):
    spoil(*folders)
    with pytest.raises(error, match=message) as raised:
        load_model(folders[1], "policy", {})
    assert "\n" not in str(raised.value)


# ---------------------------------------------------------------------------------------------------------------
# As the reference
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("form", FORMS)
def test_the_reference_is_the_policys_adapter_as_it_was(form):
    start = sft(**FORMS[form]).double()
    policy = sft(**FORMS[form]).double()
    next(p for n, p in policy.named_parameters() if "lora_A.default" in n).requires_grad_(False)  # its owner's choice
    trains = {name: p.requires_grad for name, p in policy.named_parameters()}
    models = PolicyAndReference(policy, "adapter")
    assert models.reference is None
    assert models.reference_kind == "adapter"
    assert policy.active_adapters == ["default"]
    copied = {name: p for name, p in policy.named_parameters() if name not in trains}
    assert copied
    assert {name: p.requires_grad for name, p in policy.named_parameters()} == trains | dict.fromkeys(copied, False)
    assert log_ratios(models).abs().max() < 1e-9
    second = PolicyAndReference(policy, start)  # a whole second model
    optimizer = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        log_ratios(models).sum().backward()
        optimizer.step()
    assert all(p.grad is None for p in copied.values())
    moved = log_ratios(models)
    assert moved.abs().min() > 1e-3
    torch.testing.assert_close(moved, log_ratios(second), rtol=1e-9, atol=1e-9)
    assert {name: p.requires_grad for name, p in policy.named_parameters()} == trains | dict.fromkeys(copied, False)


def test_the_copy_keeps_the_adapters_dtype_and_has_no_dropout():
    policy = sft(lora_dropout=0.5).train()
    for name, parameter in policy.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.bfloat16()
    models = PolicyAndReference(policy, "adapter").train()
    dtypes = {p.dtype for name, p in policy.named_parameters() if REFERENCE_ADAPTER in name}
    assert dtypes == {torch.bfloat16}
    batch = collate(make_pairs(3))
    with torch.no_grad():
        first, second = models(batch), models(batch)
    assert torch.equal(first.reference_logprob, second.reference_logprob)
    assert not torch.equal(first.policy_logprob, second.policy_logprob)  # the premise


def test_a_later_training_starts_from_the_present_adapter():
    policy = sft()
    first = PolicyAndReference(policy, "adapter")
    with torch.no_grad():
        next(p for n, p in policy.named_parameters() if "lora_B.default" in n).add_(1)
    assert log_ratios(first).abs().max() > 1e-3
    assert log_ratios(PolicyAndReference(policy, "adapter")).abs().max() < 1e-4
    assert list(policy.peft_config) == ["default", REFERENCE_ADAPTER]


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_adapter_that_changes_its_base_when_it_starts(init):
    """The model with the adapter off is another one then, so this reference alone starts at 0."""
    policy = peft.get_peft_model(tiny_llama(0), peft.LoraConfig(**LORA | {"init_lora_weights": init}))
    before = logits(policy)
    models = PolicyAndReference(policy, "adapter")
    torch.testing.assert_close(logits(policy), before)
    torch.testing.assert_close(logits(policy), logits(tiny_llama(0)), rtol=1e-3, atol=1e-3)
    assert log_ratios(models).abs().max() < 1e-4


def two_active() -> peft.PeftModel:
    model = sft()
    model.add_adapter("second", peft.LoraConfig(**LORA))
    model.base_model.set_adapter(["default", "second"])
    return model


def trains_embeddings() -> peft.PeftModel:
    model = sft()
    model.get_input_embeddings().weight.requires_grad_(True)
    return model


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (tiny_llama, "`policy` to have an adapter .* got LlamaForCausalLM without one.*write './adapter'"),
        (two_active, "to have one active adapter .*, but got default, second"),
        (trains_embeddings, "only the adapter of `policy` to be trained.*another adapter.*embed_tokens"),
    ],
)
def test_a_policy_without_one_adapter_is_refused(policy, message):
    with pytest.raises(ValueError, match=message):
        PolicyAndReference(policy(), "adapter")


def test_adapter_is_not_the_name_of_an_adapter_beside_it():
    with pytest.raises(ValueError, match="`adapter` to be None unless"):
        PolicyAndReference(sft(), "adapter", adapter="default")


def test_an_untrained_adapter_is_warned_of():
    new = peft.LoraConfig(r=2, target_modules="all-linear")
    with pytest.warns(UserWarning, match="was not trained yet.* the reference is the base model"):
        models = PolicyAndReference(peft.get_peft_model(tiny_llama(0), new), "adapter")
    assert log_ratios(models).abs().max() < 1e-4
    policy, reference = load_pair(tiny_llama(0), "adapter", {"r": 2}, model_kwargs={}, needs_reference=True)
    with pytest.warns(UserWarning, match="was not trained yet"):
        PolicyAndReference(policy, reference)
    trained = sft()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PolicyAndReference(trained, "adapter")


@pytest.mark.parametrize(
    ("name", "lora", "message"),
    [
        ("sft", {"r": 2}, r"`lora` to be None for a `policy` that already has an adapter"),
        ("base", None, r"`policy` to have an adapter .* but got .*base without one"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused_before_it_is_loaded(folders, name, lora, message):
    folder = folders[0].parent / name
    (folder / ("adapter_model.safetensors" if name == "sft" else "model.safetensors")).unlink()
    with pytest.raises(ValueError, match=message):
        load_pair(folder, "adapter", lora, model_kwargs={}, needs_reference=True)


def test_a_new_adapter_on_an_adapter_is_refused():
    with pytest.raises(ValueError, match="`lora` to be None for a `policy` that already has an adapter"):
        load_pair(sft(), None, {"r": 2}, model_kwargs={}, needs_reference=True)


# ---------------------------------------------------------------------------------------------------------------
# Saved
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["default", "mine"])
def test_only_the_trained_adapter_is_saved(folders, tmp_path, form, name):
    base = tiny_llama(0)
    torch.manual_seed(3)
    policy = peft.get_peft_model(base, peft.LoraConfig(**{**LORA, **FORMS[form]}), adapter_name=name)
    policy.peft_config[name].base_model_name_or_path = str(folders[0])
    PolicyAndReference(policy, "adapter")
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    save_policy(nn.DataParallel(policy), tmp_path / "out")
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    again = load_model(tmp_path / "out", "policy", {})
    torch.testing.assert_close(logits(again), logits(policy.eval()))
    assert list(again.peft_config) == ["default"]


def test_a_model_is_saved_whole(tmp_path):
    save_policy(tiny_llama(0), tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(tiny_llama(0)))
