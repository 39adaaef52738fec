"""A reference given by name is known by its files, one given as a model by its weights."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from lit_did import LitDPO, file_digests
from lit_did.reference_cache import fingerprint
from lit_did.reference_cache.model_files import files_digest
from tests.modules.tiny import loader, make_pairs, tiny_llama, trainer

PAIRS = make_pairs(3)


@pytest.fixture
def saved(tmp_path):
    tiny_llama(1).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def _digest(folder, kept, **model_kwargs):
    return files_digest(str(folder), model_kwargs, kept)


def test_what_counts(saved, tmp_path):
    first = _digest(saved, tmp_path / "kept")
    copied = shutil.copytree(saved, tmp_path / "copy")
    (copied / "tokenizer.json").write_text("{}")
    (copied / "README.md").write_text("other")
    assert _digest(copied, tmp_path / "kept") == first
    assert _digest(saved, tmp_path / "kept", dtype=torch.bfloat16) != first
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert _digest(copied, tmp_path / "kept") != first
    weights = bytearray((saved / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (saved / "model.safetensors").write_bytes(weights)
    assert _digest(saved, tmp_path / "kept") != first


def test_files_are_read_once(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(file_digests, "_YOUNG", -1)
    first = _digest(saved, tmp_path / "kept")
    monkeypatch.delattr("hashlib.file_digest")
    assert _digest(saved, tmp_path / "kept") == first


def test_what_has_no_digest(saved, tmp_path):
    assert _digest("org/not-on-this-machine", tmp_path / "kept") is None
    (saved / "adapter_config.json").write_text("{}")
    assert _digest(saved, tmp_path / "kept") is None


def _fit(cache, change=lambda module: None, **arguments) -> None:
    module = LitDPO(cache_reference=cache, **arguments)
    module.configure_model()
    change(module)
    trainer(max_epochs=1).fit(module, loader(PAIRS, 3))


@pytest.mark.parametrize("by", ["reference", "policy", "lora"])
def test_a_run_by_name(saved, tmp_path, monkeypatch, by):
    def fit(change=lambda module: None) -> None:
        policy = tiny_llama(0) if by == "reference" else str(saved)
        more = {"reference": str(saved)} if by == "reference" else {}
        _fit(tmp_path / "cache", change, policy=policy, lora={"r": 2} if by == "lora" else None, **more)

    with monkeypatch.context() as patch:
        patch.delattr(fingerprint, "_model_digest")  # no weights are read
        fit()
        fit()
    index = json.loads((tmp_path / "cache" / "reference" / "index.json").read_text())
    assert index["fingerprint"]["reference"] == _digest(saved, tmp_path / "kept")

    def change(module: LitDPO) -> None:
        model = module.policy.get_base_model() if by == "lora" else module.reference
        with torch.no_grad():
            model.model.norm.weight += 1

    with pytest.raises(ValueError, match="differs in reference"):  # in memory
        fit(change)
    tiny_llama(2).save_pretrained(saved)
    with pytest.raises(ValueError, match="differs in reference"):  # on disk
        fit()
