"""Digests of sequences, pairs and references: the same for the same, others for others."""

from __future__ import annotations

import numpy as np
import peft
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from lit_did.batches.sequences import Sequences, read_sequences
from lit_did.reference_cache.fingerprint import exact_digest, fingerprint, quick_digest, sequence_keys
from tests.modules.tiny import collate, make_pairs, tiny_llama

KEYS = [bytes([i]) * 16 for i in range(5)]


def keys_of(batch: dict[str, torch.Tensor], packed: bool = False) -> list[bytes]:
    if packed:
        kept = batch["attention_mask"].bool()
        bounds = torch.cat([torch.zeros(1), kept.sum(1).cumsum(0)]).int()
        batch = {name: batch[name][kept][None] for name in ("input_ids", "labels")} | {"cu_seqlens": bounds}
    return sequence_keys(read_sequences(batch))


def test_keys_know_a_sequence_whatever_is_around_it():
    pairs = make_pairs(6)
    keys = keys_of(collate(pairs))
    assert len(set(keys)) == 12
    assert {len(key) for key in keys} == {16}
    assert keys_of(collate(pairs), packed=True) == keys
    alone = [keys_of(collate([pair])) for pair in pairs]
    assert [key for key, _ in alone] + [key for _, key in alone] == keys
    swapped = keys_of(collate([(prompt, rejected, chosen) for prompt, chosen, rejected in pairs]))
    assert swapped == keys[6:] + keys[:6]
    batch = collate(pairs)
    assert keys_of(batch | {"input_ids": batch["input_ids"] + 60 * (1 - batch["attention_mask"])}) == keys


def test_keys_change_with_any_token_and_any_label():
    def key(ids: list[int], labels: list[int]) -> bytes:
        ids, labels = np.array(ids), np.array(labels)
        return sequence_keys(Sequences(ids, np.arange(len(ids)), labels, np.array([0, len(ids)])))[0]

    def replaced(values: list[int], position: int, value: int) -> list[int]:
        return [value if i == position else old for i, old in enumerate(values)]

    ids, labels = [5, 6, 7, 8], [-100, 7, 8, 9]
    changed = [(ids, labels), ([5, 6], [7, 8]), ([5], [6])]
    changed += [(replaced(ids, position, 40), labels) for position in range(4)]
    changed += [(ids, replaced(labels, position, 40)) for position in range(4)]
    changed += [(ids, replaced(labels, position, -100)) for position in (1, 2, 3)]
    assert len({key(*one) for one in changed}) == len(changed)


def test_positions_that_do_not_count_from_zero_have_no_key():
    batch = collate(make_pairs(1))
    batch["position_ids"] = torch.arange(batch["input_ids"].shape[1]) + 1
    with pytest.raises(ValueError, match="`position_ids` to count from 0 in every sequence"):
        keys_of(batch)


def test_fingerprint_of_data():
    def data(*keys):
        return fingerprint(nn.Identity(), keys)["pairs"]

    assert data(*KEYS) == data(*reversed(KEYS), KEYS[2])
    assert len({data(), data(*KEYS), data(*KEYS[1:]), data(*KEYS[1:], b"?" * 16)}) == 4


def model_part(model: nn.Module) -> str:
    return fingerprint(model, [])["reference"]


def test_fingerprint_of_the_same_model(tmp_path):
    model = tiny_llama(0)
    expected = model_part(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for same in (tiny_llama(0), loaded, loaded.eval().requires_grad_(False), torch.compile(model, backend="eager")):
        assert model_part(same) == expected
    one, other = nn.ModuleDict(), nn.ModuleDict()
    for module, names in ((one, "ab"), (other, "ba")):
        for name in names:
            torch.manual_seed(ord(name))
            module[name] = nn.Linear(2, 2)
    assert model_part(one) == model_part(other)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_dora": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"trainable_token_indices": {"embed_tokens": [1, 2]}},
    ],
)
def test_fingerprint_of_a_base_model_without_its_adapter(options):
    config = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False, **options}
    model = peft.get_peft_model(tiny_llama(0), peft.LoraConfig(**config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 1
    assert model_part(model) == model_part(tiny_llama(0))
    with torch.no_grad():
        model.get_base_model().model.norm.weight[3] += 1e-6
    assert model_part(model) != model_part(tiny_llama(0))


def test_fingerprints_of_other_models():
    models = [
        tiny_llama(0),
        tiny_llama(1),
        tiny_llama(0).bfloat16(),
        tiny_llama(0, rms_norm_eps=1e-5),
        tiny_llama(0, rope_parameters={"rope_theta": 500.0, "rope_type": "default"}),
    ]
    for change in range(5):
        models.append(tiny_llama(0))
        with torch.no_grad():
            if change == 0:  # one bit of one weight
                models[-1].lm_head.weight.view(torch.int32)[5, 5] ^= 1
            elif change == 1:
                models[-1].model.rotary_emb.inv_freq[1] *= 2
            elif change == 2:  # the same bytes of another dtype
                models[-1].lm_head.weight = nn.Parameter(models[-1].lm_head.weight.view(torch.int32), False)
            elif change == 3:  # in another shape
                models[-1].lm_head.weight = nn.Parameter(models[-1].lm_head.weight.view(32, 67))
            else:  # elsewhere
                layers = models[-1].model.layers
                layers[0].mlp.up_proj, layers[0].mlp.gate_proj = layers[0].mlp.gate_proj, layers[0].mlp.up_proj
    models += [nn.ModuleDict({name: models[0].lm_head}) for name in "ab"]
    assert len({model_part(model) for model in models}) == len(models)


def test_a_quick_digest_counts_the_adapter_if_it_shall():
    def policy(seed: int) -> nn.Module:
        model = tiny_llama()
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
        return peft.get_peft_model(model, config)

    one, other = policy(1), policy(2)
    assert quick_digest(one) == quick_digest(other) == quick_digest(tiny_llama())
    assert quick_digest(one, adapter=True) == quick_digest(policy(1), adapter=True)
    assert quick_digest(one, adapter=True) != quick_digest(other, adapter=True)
    assert quick_digest(tiny_llama(), adapter=True) == quick_digest(tiny_llama())


class Backwards(set):
    """A set in another order, as that of another process."""

    def __iter__(self):
        return reversed(list(super().__iter__()))


def test_an_adapters_fingerprint_is_the_same_in_every_process():
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"])
    model = peft.get_peft_model(tiny_llama(0), config)
    digest = fingerprint(model, [], adapter="default")
    config = model.peft_config["default"]
    config.target_modules = Backwards(config.target_modules)
    config.base_model_name_or_path, config.revision, config.inference_mode = "elsewhere", "main", True
    assert fingerprint(model, [], adapter="default") == digest
    config.lora_alpha *= 2
    assert fingerprint(model, [], adapter="default") != digest


def test_an_exact_digest_counts_every_value_and_the_configurations():
    def policy(**options) -> nn.Module:
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", **options)
        return peft.get_peft_model(tiny_llama(0), config)

    one, other = policy(lora_alpha=8), policy(lora_alpha=80)
    assert exact_digest(one, adapter=True) == exact_digest(policy(lora_alpha=8), adapter=True)
    assert exact_digest(one, adapter=True) != exact_digest(other, adapter=True)
    assert exact_digest(one) == exact_digest(other) == exact_digest(tiny_llama(0))
    assert exact_digest(tiny_llama(0)) != exact_digest(tiny_llama(0, rms_norm_eps=1e-5))
    assert exact_digest(tiny_llama(0)) != exact_digest(tiny_llama(0).bfloat16())
    changed = tiny_llama(0)
    changed.lm_head.weight.data[3, 5] += 1
    assert quick_digest(changed) == quick_digest(tiny_llama(0))  # the premise
    assert exact_digest(changed) != exact_digest(tiny_llama(0))
    assert exact_digest(nn.Linear(2, 2, device="meta")) is None
