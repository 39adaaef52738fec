"""What `state_dict` and checkpoints hold and accept: layers with extra state, averages of weights, other processes."""

from __future__ import annotations

import copy
import os
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from lit_did import LitDPO
from lit_did.modules.checkpoint import TrainedState, warn_unless_same_reference
from tests.modules.tiny import loader, make_pairs, tiny_llama, trainer
from tests.processes import run_program

LORA = {"r": 4, "target_modules": "all-linear"}


class Quantised(nn.Linear):
    """Keeps what no parameter or buffer is, as 4-bit, 8-bit and FP8 layers do."""

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight.quant_state.nf4"] = torch.ones(2)

    def _load_from_state_dict(self, state_dict, prefix, *arguments):
        state_dict.pop(f"{prefix}weight.quant_state.nf4", None)
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def get_extra_state(self):
        return torch.ones(1)

    def set_extra_state(self, state):
        pass


def quantised_llama() -> nn.Module:
    model = tiny_llama()
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Quantised
    return model


def whole(module: LitDPO) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.policy.named_parameters()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("lora", [None, LORA])
def test_state_dict_holds_what_is_trained_and_loads_strictly(lora):
    module, again = (LitDPO(tiny_llama(), tiny_llama(seed), lora=lora) for seed in (1, 2))
    state = module.state_dict()
    assert state.keys() == {n for n, p in module.named_parameters(remove_duplicate=False) if p.requires_grad}
    assert lora is None or not equal(whole(module), whole(again))  # the premise: adapters start at random
    assert not any(again.load_state_dict(state, strict=True))
    assert equal(whole(module), whole(again))
    name, value = state.popitem()
    with pytest.raises(RuntimeError, match=f'Missing key.*"{name}"'):
        again.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"models\.policy\.other"'):
        again.load_state_dict({**state, name: value, "models.policy.other": value})


def test_frozen_layers_are_left_out_and_kept():
    policy = tiny_llama()
    policy.model.layers[0].requires_grad_(False)
    policy.model.layers[0].register_buffer("scale", torch.ones(1))
    policy.model.layers[1].register_buffer("scale", torch.ones(1))
    module = LitDPO(policy)
    assert not any("layers.0" in name for name in module.state_dict())
    assert "models.policy.model.layers.1.scale" in module.state_dict()
    again = LitDPO(copy.deepcopy(policy))
    again.load_state_dict({name: value + 1 for name, value in module.state_dict().items()})
    moved = {name for name, p in whole(again).items() if not torch.equal(p, whole(module)[name])}
    assert moved == {name for name, p in policy.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("lora", [None, LORA])
def test_layers_with_extra_state_resume(tmp_path, lora):
    def module() -> LitDPO:
        return LitDPO(quantised_llama(), lora=lora, learning_rate=1e-2)

    run, first = trainer(max_epochs=1), module()
    run.fit(first, loader(make_pairs(4), 2))
    run.save_checkpoint(tmp_path / "last.ckpt")
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    extra = [name for name in state if "extra" in name or "quant" in name]
    assert len(extra) == (0 if lora else 30)  # with LoRA the layers are frozen
    second = module()
    trainer(max_epochs=1).fit(second, loader(make_pairs(4), 2), ckpt_path=tmp_path / "last.ckpt")
    assert equal(whole(first), whole(second)) or lora
    trained = {n: p for n, p in whole(second).items() if "lora_" in n or not lora}
    assert all(torch.equal(p, whole(first)[n]) for n, p in trained.items())


def test_a_folder_that_one_process_resumes_names_the_remedy(tmp_path):
    with pytest.raises(IsADirectoryError) as caught:
        trainer(max_epochs=1).fit(LitDPO(tiny_llama()), loader(make_pairs(4), 2), ckpt_path=tmp_path)
    assert "consolidate_checkpoint(folder, file)`" in caught.value.__notes__[0]


def test_another_reference_by_name_is_noticed_where_weights_are_sharded(tmp_path):
    """Sharded weights have no digest, so the digests of their files are compared."""

    def loaded(seed: int) -> dict[str, str]:
        tiny_llama(seed).save_pretrained(tmp_path / "model")
        module = LitDPO(tmp_path / "model")
        module.configure_model()
        return module._reference_digests

    saved = {"files": loaded(0)["files"]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_unless_same_reference(saved, loaded(0))
        warn_unless_same_reference(saved, {})
    with pytest.warns(UserWarning, match="The reference's weights differ"):
        warn_unless_same_reference(saved, loaded(1))


@pytest.mark.parametrize("lora", [None, LORA])
@pytest.mark.parametrize(
    "average",
    [
        lambda: EMAWeightAveraging(decay=0.5),
        lambda: WeightAveraging(use_buffers=False),
        lambda: StochasticWeightAveraging(1e-2, swa_epoch_start=1),
    ],
    ids=["EMA", "average", "SWA"],
)
def test_averages_of_weights_resume(tmp_path, average, lora):
    def run(epochs: int, checkpoint: str | None = None) -> LitDPO:
        torch.manual_seed(5)  # of the adapter
        module = LitDPO(tiny_llama(), lora=lora, learning_rate=1e-2)
        saved = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        callbacks = [average(), saved]
        data = loader(make_pairs(4), 2), loader(make_pairs(2), 2)
        trainer(max_epochs=epochs, callbacks=callbacks, enable_checkpointing=True).fit(
            module, *data, ckpt_path=checkpoint, weights_only=False
        )
        return module

    straight = run(3)
    checkpoint = torch.load(tmp_path / "epoch=1.ckpt", weights_only=False)
    names = [*checkpoint["state_dict"], *checkpoint.get("current_model_state", ())]
    assert not any(name.startswith("models.reference.") for name in names)
    assert lora is None or all("lora_" in name for name in names)
    resumed = run(3, str(tmp_path / "epoch=1.ckpt"))
    assert equal(whole(straight), whole(resumed))


@pytest.mark.long
def test_a_process_that_trained_hands_its_weights_back(tmp_path):
    # Without a seed of Lightning's, which forked processes would begin with.
    environment = {n: value for n, value in os.environ.items() if n not in ("PL_GLOBAL_SEED", "OMP_NUM_THREADS")}
    run_program(
        sys.executable, "-m", "tests.modules.forked", tmp_path, environment=environment | {"OMP_NUM_THREADS": "1"}
    )


@pytest.mark.parametrize("compiled", [False, True])
def test_a_compiled_policy_reads_a_plain_ones_checkpoint_and_the_other_way_round(tmp_path, compiled):
    def policy(compiled: bool) -> nn.Module:
        return torch.compile(tiny_llama(), backend="eager") if compiled else tiny_llama()

    def weights(module: LitDPO) -> dict[str, torch.Tensor]:
        return {name.removeprefix("_orig_mod."): p for name, p in whole(module).items()}

    module, run = LitDPO(policy(compiled), learning_rate=1e-2), trainer(max_steps=1)
    run.fit(module, loader(make_pairs(2), 2))
    run.save_checkpoint(tmp_path / "last.ckpt")
    read = LitDPO.load_from_checkpoint(tmp_path / "last.ckpt", policy=policy(not compiled))
    assert equal(weights(read), weights(module))
    assert not equal(weights(read), weights(LitDPO(tiny_llama())))  # the premise


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (lambda: tiny_llama(num_hidden_layers=3), r"hold the 30 trained parameters of this policy, but 9 are missing"),
        (lambda: tiny_llama(num_hidden_layers=1), r"parameters of this policy only, but .* 9 of them"),
    ],
)
def test_another_policys_shards_are_refused(policy, message):
    """A strategy that shards has loaded the weights that fit, and leaves no `state_dict`."""
    module, checkpoint = LitDPO(tiny_llama()), {}
    module._trainer = SimpleNamespace(strategy=None)
    TrainedState.on_save_checkpoint(module, checkpoint)
    again = LitDPO(policy(), policy())
    with pytest.raises(ValueError, match=message):
        again.on_load_checkpoint(checkpoint)


def test_an_adapter_of_another_rank_is_refused():
    checkpoint = {"state_dict": LitDPO(tiny_llama(), lora=LORA).state_dict()}
    with pytest.raises(ValueError, match=r"this policy's shapes, but .*lora_A.* has \[4, \d+\] there and \[2, \d+\]"):
        LitDPO(tiny_llama(), lora=LORA | {"r": 2}).on_load_checkpoint(checkpoint)


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("lora", [None, LORA])
@pytest.mark.filterwarnings("ignore:FSDP")
def test_fsdp_1_saves_and_loads_what_is_trained(one_process, lora):
    """FSDP 1 wraps the whole module, and its hooks want every parameter that it holds, frozen ones too."""
    module = LitDPO(tiny_llama(), lora=lora)
    expected = {name: value.clone() for name, value in module.state_dict().items()}
    wrapper = FullyShardedDataParallel(
        module,
        device_id=torch.device("cpu"),
        use_orig_params=True,
        auto_wrap_policy=ModuleWrapPolicy({LlamaDecoderLayer}),
    )
    module._trainer = SimpleNamespace(strategy=SimpleNamespace(model=wrapper))
    for _ in range(2):
        state = wrapper.state_dict()
        assert state.keys() == expected.keys()
        assert not any(wrapper.load_state_dict({name: value + 1 for name, value in state.items()}))
    for name, value in wrapper.state_dict().items():
        torch.testing.assert_close(value, expected[name] + 2)
