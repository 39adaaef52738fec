"""QLoRA: adapters on 4-bit base models train, save, resume and reload, and agree with the model's own forward pass."""

from __future__ import annotations

import copy
import math
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lit_did import LitDPO, PolicyAndReference
from lit_did.models.adapters import save_policy
from lit_did.models.loading import load_model
from lit_did.models.quantisation import computes_in_half
from lit_did.models.trial import find, layout_of
from tests.modules.tiny import collate, loader, make_pairs, tiny_llama, trainer

LORA = {"r": 4, "target_modules": "all-linear"}
FOUR_BIT = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    pytest.importorskip("bitsandbytes")
    folder = tmp_path_factory.mktemp("base")
    tiny_llama(0, hidden_size=64, intermediate_size=64, vocab_size=96).save_pretrained(folder)
    return str(folder)


def qlora(base: str, **options) -> LitDPO:
    torch.manual_seed(1)
    module = LitDPO(
        base, **{"lora": LORA, "model_kwargs": {"quantization_config": FOUR_BIT}, "learning_rate": 1e-2, **options}
    )
    module.configure_model()
    return module


def fit(module: LitDPO, epochs: int, checkpoint: Path | None = None) -> LitDPO:
    trainer(max_epochs=epochs).fit(module, loader(make_pairs(4), 2), loader(make_pairs(2), 2), ckpt_path=checkpoint)
    return module


def adapter(module: LitDPO) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.policy.named_parameters() if p.requires_grad}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and len(a) > 0 and all(torch.equal(a[name], b[name]) for name in a)


def test_it_trains_saves_resumes_and_reloads(base, tmp_path):
    straight, half = fit(qlora(base), 2), fit(qlora(base), 1)
    half.trainer.save_checkpoint(tmp_path / "half.ckpt")
    checkpoint = torch.load(tmp_path / "half.ckpt", weights_only=True)
    assert all("lora_" in name for name in checkpoint["state_dict"])
    assert "weights" in checkpoint["reference_digests"]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The reference's weights differ")
        resumed, read = fit(qlora(base), 2, tmp_path / "half.ckpt"), LitDPO.load_from_checkpoint(tmp_path / "half.ckpt")
    assert equal(adapter(resumed), adapter(straight))
    assert not equal(adapter(resumed), adapter(half))  # the premise
    batch = collate(make_pairs(4))
    assert torch.equal(read.eval()(batch).log_ratio, half.eval()(batch).log_ratio)
    layer = read.policy.get_base_model().model.layers[0].mlp.up_proj.base_layer
    assert type(layer).__name__ == "Linear4bit"
    assert read.policy.get_input_embeddings().weight.dtype == torch.float32  # what is not quantised
    save_policy(half.policy, tmp_path / "out")
    loaded = load_model(tmp_path / "out", "policy", {"quantization_config": FOUR_BIT})
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    assert torch.equal(loaded(**inputs).logits, half.policy(**inputs).logits)


def test_a_4_bit_sft_adapter_is_the_reference(base, tmp_path):
    sft = fit(qlora(base), 1)
    save_policy(sft.policy, tmp_path / "sft")
    module = qlora(str(tmp_path / "sft"), lora=None, reference="adapter")
    batch = collate(make_pairs(4))
    assert module.pair_statistics(batch).loss.mean().item() == pytest.approx(math.log(2), abs=1e-5)
    fit(module, 1)
    assert (module(batch).log_ratio.abs() > 1e-3).all()


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}, {"recompute_elementwise": True}])
@pytest.mark.parametrize("skipped", [None, []])
@pytest.mark.parametrize("evaluated", [False, True])
@pytest.mark.filterwarnings("ignore:.* does not expose last hidden states")
def test_log_ratios_and_gradients_are_those_of_the_dequantised_models_own_passes(base, options, skipped, evaluated):
    """With no skipped modules the output layer is quantised too."""
    config = BitsAndBytesConfig(**FOUR_BIT, llm_int8_skip_modules=skipped)
    policy = AutoModelForCausalLM.from_pretrained(base, quantization_config=config, dtype=torch.float32)
    inputs = {name: value for name, value in collate(make_pairs(3)).items() if name != "labels"}
    if evaluated:  # on some CPUs, bitsandbytes rearranges the weights then, for a kernel without a gradient
        with torch.no_grad():
            policy(**inputs)
    module = qlora(policy, lora=LORA | {"target_modules": ["up_proj", "q_proj"]}, model_kwargs=None, **options).train()
    with torch.no_grad():
        for parameter in module.policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    plain = copy.deepcopy(module.policy).eval()
    batch = collate(make_pairs(3))
    statistics = module(batch)
    found = layout_of(module.policy, module.read(batch))
    assert found.kind == "packed"
    plain = dequantised(plain)
    logits = plain(**inputs).logits
    with torch.no_grad(), plain.disable_adapter():
        others = plain(**inputs).logits
    labels = batch["labels"]
    one, other = (
        (x.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0] * (labels != -100)).sum(1)
        for x in (logits, others)
    )
    torch.testing.assert_close(statistics.log_ratio, one - other, rtol=1e-3, atol=1e-3)
    assert statistics.log_ratio.abs().max() > 1e-2  # the premise
    statistics.policy_logprob.sum().backward()
    one.sum().backward()
    expected = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    gradients = {name: p.grad for name, p in module.policy.named_parameters() if p.grad is not None}
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-3 * expected[name].abs().max().item())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_packed_rows_with_shared_prompts_are_used_in_each_compute_dtype(base, dtype):
    """Rounding in bfloat16 depends on the layout. It is no sign that a layout is wrong."""
    module = qlora(base, model_kwargs={"quantization_config": FOUR_BIT | {"bnb_4bit_compute_dtype": dtype}})
    found = find(module.policy, module.read(collate(make_pairs(3))))
    assert (found.kind, found.share) == ("packed", True)
    if computes_in_half(module.policy) != (dtype == "bfloat16"):
        pytest.skip("old versions of bitsandbytes compute in the dtype of the inputs")


def dequantised(model: nn.Module) -> nn.Module:
    """The model with plain layers that have the values of its 4-bit layers."""
    from bitsandbytes.functional import dequantize_4bit

    for module in list(model.modules()):
        for name, layer in list(module.named_children()):
            if type(layer).__name__ == "Linear4bit" and not hasattr(layer, "lora_A"):
                linear = nn.Linear(layer.in_features, layer.out_features, bias=False).requires_grad_(False)
                linear.weight.copy_(dequantize_4bit(layer.weight.data, layer.weight.quant_state))
                setattr(module, name, linear)
    return model


def test_a_configuration_object_is_in_checkpoints_too(base):
    config = BitsAndBytesConfig(**FOUR_BIT, bnb_4bit_compute_dtype=torch.float32)
    module = LitDPO(base, lora=LORA, model_kwargs={"quantization_config": config, "dtype": torch.float32})
    assert module.hparams["model_kwargs"] == {"quantization_config": FOUR_BIT, "dtype": "float32"}
    assert "model_kwargs" not in LitDPO(base, model_kwargs={"quantization_config": object()}).hparams


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"load_in_4bits": True}, "but got 'load_in_4bits'. Did you mean 'load_in_4bit'?"),
        (
            {"load_in_4bit": True, "bnb_4bit_compute_dtype": "fp32"},
            "arguments of transformers.BitsAndBytesConfig.*fp32",
        ),
        ({"bnb_4bit_quant_type": "nf4"}, "to set `load_in_4bit` to true"),
        ({"load_in_8bit": True}, "with `load_in_4bit`, but got `load_in_8bit`. In 8 bits, other tokens"),
    ],
)
def test_a_wrong_configuration_is_refused_before_a_model_is_loaded(config, message):
    with pytest.raises(ValueError, match=message):
        load_model("no model", "policy", {"quantization_config": config})


def test_a_missing_bitsandbytes_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    for config in (FOUR_BIT, BitsAndBytesConfig(**FOUR_BIT)):
        with pytest.raises(
            ModuleNotFoundError, match=r"needs the package bitsandbytes. Run pip install 'lit-did\[qlora\]'"
        ):
            load_model("no model", "policy", {"quantization_config": config})


def test_a_quantised_policy_without_an_adapter_can_be_validated_but_not_trained(base):
    module = qlora(base, lora=None)
    trainer().validate(module, loader(make_pairs(2), 2), verbose=False)
    with pytest.raises(ValueError, match=r"quantised `policy` to have an adapter.* Pass `lora`"):
        fit(module, 1)


# ---------------------------------------------------------------------------------------------------------------
# Without bitsandbytes
# ---------------------------------------------------------------------------------------------------------------


class Rounded(nn.Linear):
    """A layer with weights in uint8, scales in a buffer, and state that is neither."""

    def round(self) -> None:
        scale = self.weight.detach().abs().max(1, keepdim=True).values / 127
        self.register_buffer("scale", scale)
        self.weight = nn.Parameter((self.weight.detach() / scale + 128).round().to(torch.uint8), requires_grad=False)
        self.zero = 128.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, (self.weight.to(x.dtype) - self.zero) * self.scale)

    def get_extra_state(self) -> dict[str, float]:
        return {"zero": self.zero}

    def set_extra_state(self, state: dict[str, float]) -> None:
        self.zero = state["zero"]


def rounded_llama() -> nn.Module:
    model = tiny_llama(0)
    for module in model.model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Rounded
            module.round()
    return model


def test_another_quantised_layer_trains_saves_resumes_and_reloads(tmp_path):
    def module() -> LitDPO:
        torch.manual_seed(1)
        return LitDPO(rounded_llama(), lora=LORA, learning_rate=1e-2)

    straight, half = fit(module(), 2), fit(module(), 1)
    half.trainer.save_checkpoint(tmp_path / "half.ckpt")
    assert all("lora_" in n for n in torch.load(tmp_path / "half.ckpt", weights_only=True)["state_dict"])
    assert equal(adapter(fit(module(), 2, tmp_path / "half.ckpt")), adapter(straight))
    read = LitDPO.load_from_checkpoint(tmp_path / "half.ckpt", policy=rounded_llama())
    batch = collate(make_pairs(4))
    assert torch.equal(read.eval()(batch).log_ratio, half.eval()(batch).log_ratio)
    assert (half(batch).log_ratio.abs() > 1e-3).any()
    models = PolicyAndReference(half.policy, "adapter")  # a second round
    assert models(batch).log_ratio.abs().max() < 1e-5
