"""Strategies that would train wrong are refused, by all processes, when training starts."""

from __future__ import annotations

import json
import re
import sys
from contextlib import nullcontext as none
from types import SimpleNamespace

import pytest
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy

from lit_did import LitDPO, LitDPOPG
from tests.modules.refusals import weights
from tests.modules.tiny import loader, make_pairs, tiny_llama, trainer
from tests.processes import run_program

REFUSED = {
    "one layer sharded": "over the 2 processes.*ModelParallelStrategy neither holds for 12 of 21 parameters",
    "an adapter and tensor parallelism": "tensor_parallel_size=1 with an adapter.*data_parallel_size=2",
    "an adapter of embeddings": "adapter of linear layers inside the decoder layers.* first is .*lora_embedding_A",
    "tensor parallelism with two batches": "sizes of the Trainer's strategy, 2 data-parallel and 1 tensor.*tp_size=2",
    "shards under DDP": "`model_kwargs` without `distributed_config`.*but got DDPStrategy",
    "a sharded module to copy": "`reference` to be given for a `policy` whose parameters are sharded",
    "other weights on the other process": "`policy` to have the same weights on all processes",
    "tied embeddings in uneven shards": "divide the 67 entries of the vocabulary.*tied embeddings.*got 2 processes",
    "layers without a plan": r'"fsdp_plan": {"transformer.h.\*": "free_full_weight"}',
    "a policy on the CPU": "`fsdp_cpu_offload` of `distributed_config` to be False, or 'reference'.*got True with 2",
    "no reference to keep on the CPU": "`fsdp_cpu_offload` of `distributed_config` to be False without a reference",
    "a reference on the CPU in one shard": "'reference' with several data-parallel processes.*got 'reference' with 1",
    "a cached reference": "`cache_kind` to be 'logprobs' and the strategy to be .* but got 'hidden_states' and Model",
    "a cached object": "given by the name of a whole model with `cache_reference` and sharded models",
}


def test_two_processes_train_right_or_both_refuse(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    run_program(sys.executable, "-m", "tests.modules.refusals", tmp_path)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second  # none goes on alone
    one = LitDPO(tiny_llama(), learning_rate=1e-2)
    trainer(max_epochs=2).fit(one, loader(make_pairs(4), 4))
    for name, (error, trained) in first.items():
        assert (error is not None) == (name in REFUSED), (name, error)
        if error is None:
            assert trained == pytest.approx(weights(one), rel=1e-6), name
            assert trained != pytest.approx(weights(LitDPO(tiny_llama())), rel=1e-4)  # the premise
        else:
            assert re.search(REFUSED[name], error), (name, error)


@pytest.mark.parametrize("kind", [LitDPO, LitDPOPG])
def test_deepspeed_which_ignores_backward_is_refused(kind):
    module = kind(tiny_llama())
    module._trainer = SimpleNamespace(
        callbacks=[], strategy=object.__new__(DeepSpeedStrategy)
    )  # the package is not installed
    with pytest.raises(ValueError, match=r"calls the module's own `backward`, but got DeepSpeed.* Use 'ddp'"):
        module.setup("fit")


def test_averages_of_other_weights_are_refused(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model")
    data = loader(make_pairs(2), 2)
    with pytest.raises(ValueError, match=r"to be modules with StochasticWeightAveraging.*or use EMAWeightAveraging"):
        trainer(max_epochs=2, callbacks=[StochasticWeightAveraging(1e-2)]).fit(LitDPO(tmp_path / "model"), data)
    for lora in (None, {"r": 2, "target_modules": "all-linear"}):  # with LoRA nothing is freed
        for policy in (tiny_llama(), tmp_path / "model"):
            module = LitDPO(policy, lora=lora, cache_reference=tmp_path / f"cache {lora is None} {type(policy)}")
            run = trainer(max_epochs=1, callbacks=[EMAWeightAveraging()])
            with (
                pytest.raises(ValueError, match="`cache_reference` to be None with WeightAvera") if not lora else none()
            ):
                run.fit(module, data)
