"""`export_policy`: what plain transformers and peft open, what it reads, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from peft import AutoPeftModelForCausalLM, LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_did import LitDPO, LitDPOPG, PreferenceDataModule
from lit_did.exporting import export_module, export_policy
from lit_did.exporting.export import check_new
from lit_did.models.loading import load_model
from tests.exporting.runs import LORA, ROWS, TEMPLATE, run
from tests.modules.tiny import loader, make_pairs, tiny_llama, trainer
from tests.processes import run_program

IDS = torch.tensor([[5, 9, 2, 7, 7, 1]])


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def opened(folder: Path) -> torch.Tensor:
    return logits(AutoModelForCausalLM.from_pretrained(folder))


@pytest.fixture(scope="module")
def lora_run(tiny_model, tmp_path_factory):
    """A LoRA run by names: the module after training and its checkpoint."""
    module, _, checkpoint = run(tmp_path_factory.mktemp("lora"), str(tiny_model), lora=LORA)
    return module, checkpoint


@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])
def test_a_policy_by_name(tiny_model, tmp_path, capsys, lora):
    module_class = LitDPO if lora else LitDPOPG
    module, _, checkpoint = run(tmp_path / "run", str(tiny_model), lora=lora, module_class=module_class)
    capsys.readouterr()
    written = export_policy(checkpoint, tmp_path / "out")
    printed = capsys.readouterr().out
    assert printed == written.describe() + "\n"
    assert str(tmp_path / "out") in printed
    assert "an adapter" in printed if lora else "a whole model" in printed
    assert ("For other machines, export with --merge." in printed) == bool(lora)  # the base is a folder
    assert not torch.allclose(opened(tiny_model), opened(tmp_path / "out"), atol=1e-3)  # the premise: it has learned
    torch.testing.assert_close(opened(tmp_path / "out"), logits(module.policy), atol=1e-5, rtol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(tiny_model).chat_template
    assert tokenizer("What?").input_ids == AutoTokenizer.from_pretrained(tiny_model)("What?").input_ids
    names = {path.name for path in (tmp_path / "out").iterdir()}
    weights = {"adapter_config.json", "adapter_model.safetensors"} if lora else {"config.json", "model.safetensors"}
    assert weights | {"README.md", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= names
    assert lora or "generation_config.json" in names
    assert not any(name.endswith((".bin", ".pt", ".ckpt")) for name in names)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "run"]  # nothing is left beside it


def test_a_merged_adapter(lora_run, tmp_path):
    export_policy(lora_run[1], tmp_path / "adapter", quiet=True)
    export_policy(lora_run[1], tmp_path / "merged", merge=True, quiet=True)
    adapter = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(opened(tmp_path / "merged"), logits(adapter), atol=1e-4, rtol=1e-4)
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    assert "lora" not in json.dumps(sorted(torch.load(lora_run[1])["hyper_parameters"]["lora"]))


def test_a_merged_model_has_the_bases_dtype(tiny_model, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).save_pretrained(base)
    lora = {**LORA, "modules_to_save": ["lm_head"]}  # a whole layer, which trains in float32
    module, _, checkpoint = run(tmp_path / "run", str(base), lora=lora)
    assert {p.dtype for p in module.policy.parameters()} == {torch.float32}  # the premise
    export_policy(checkpoint, tmp_path / "merged", merge=True, quiet=True)
    written = load_file(tmp_path / "merged" / "model.safetensors").values()
    assert {value.dtype for value in written} == {torch.bfloat16}
    torch.testing.assert_close(opened(tmp_path / "merged").float(), logits(module.policy), atol=0.1, rtol=0.1)
    export_policy(checkpoint, tmp_path / "adapter", quiet=True)
    adapter = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32)
    torch.testing.assert_close(logits(adapter), logits(module.policy), atol=1e-5, rtol=1e-5)


def test_full_weights_keep_the_dtype_of_the_training(tiny_model, tmp_path):
    module, _, checkpoint = run(tmp_path / "run", str(tiny_model), precision="bf16-true")
    export_policy(checkpoint, tmp_path / "out", quiet=True)
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {p.dtype for p in written.parameters()} == {torch.bfloat16}
    for (name, mine), theirs in zip(written.named_parameters(), module.policy.parameters(), strict=True):
        assert torch.equal(mine, theirs), name


def test_the_exported_folder_generates_in_plain_transformers(lora_run, tmp_path):
    export_policy(lora_run[1], tmp_path / "out", quiet=True)
    program = f"""
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = (c.from_pretrained({str(tmp_path / "out")!r}) for c in (AutoModelForCausalLM, AutoTokenizer))
inputs = tokenizer.apply_chat_template([{{"role": "user", "content": "Hi"}}], add_generation_prompt=True,
    return_dict=True, return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=4, do_sample=False, pad_token_id=0)
assert "lit_did" not in sys.modules
print(output[0, inputs["input_ids"].shape[1]:].tolist())
"""
    ids = json.loads(run_program(sys.executable, "-c", program, cwd=tmp_path).splitlines()[-1])
    assert 1 <= len(ids) <= 4


def test_the_chat_template_is_that_of_the_training(tiny_model, tmp_path):
    data = PreferenceDataModule(
        ROWS, str(tiny_model), batch_size=6, max_length=64, as_chat=True, chat_template=TEMPLATE
    )
    _, _, checkpoint = run(tmp_path / "run", str(tiny_model), lora=LORA, data=data)
    export_policy(checkpoint, tmp_path / "out", quiet=True)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == TEMPLATE
    export_policy(checkpoint, tmp_path / "other", tokenizer=str(tiny_model), quiet=True)
    assert AutoTokenizer.from_pretrained(tmp_path / "other").chat_template == TEMPLATE


def test_only_the_policy_is_loaded(lora_run, tiny_model, tmp_path, monkeypatch):
    """Neither a reference, nor a copy of the policy, nor the optimiser's states."""
    checkpoint = torch.load(lora_run[1])
    checkpoint["hyper_parameters"]["reference"] = "/nowhere"
    del checkpoint["optimizer_states"]
    torch.save(checkpoint, tmp_path / "x.ckpt")
    loads, load = [], AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: loads.append(a) or load(*a, **k))
    export_policy(tmp_path / "x.ckpt", tmp_path / "out", quiet=True)
    assert len(loads) == 1


def test_a_policy_object_has_to_be_named(tiny_model, tmp_path):
    model, tokenizer = (c.from_pretrained(tiny_model) for c in (AutoModelForCausalLM, AutoTokenizer))
    data = PreferenceDataModule(ROWS, tokenizer, batch_size=6, max_length=64, as_chat=True)
    module, _, checkpoint = run(tmp_path / "run", model, lora=LoraConfig(**LORA, task_type="CAUSAL_LM"), data=data)
    with pytest.raises(ValueError, match=rf"loaded from {tiny_model}\. Pass `--policy NAME`"):
        export_policy(checkpoint, tmp_path / "out")
    export_policy(checkpoint, tmp_path / "out", policy=str(tiny_model), quiet=True)
    torch.testing.assert_close(opened(tmp_path / "out"), logits(module.policy), atol=1e-5, rtol=1e-5)


def test_an_adapter_of_another_name_is_at_the_top(tiny_model, tmp_path):
    from peft import get_peft_model

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    policy = get_peft_model(model, LoraConfig(**LORA, task_type="CAUSAL_LM"), adapter_name="mine")
    data = PreferenceDataModule(ROWS, str(tiny_model), batch_size=6, max_length=64, as_chat=True)
    module, _, checkpoint = run(tmp_path / "run", policy, data=data)
    export_policy(checkpoint, tmp_path / "out", policy=str(tiny_model), quiet=True)
    torch.testing.assert_close(opened(tmp_path / "out"), logits(module.policy), atol=1e-5, rtol=1e-5)


def test_the_adapter_that_is_the_reference_stays_behind(lora_run, tmp_path):
    export_policy(lora_run[1], tmp_path / "sft", quiet=True)
    data = PreferenceDataModule(ROWS, str(tmp_path / "sft"), batch_size=6, max_length=64, as_chat=True)
    module, _, checkpoint = run(tmp_path / "run", str(tmp_path / "sft"), reference="adapter", data=data, beta=0.5)
    assert any("lit_did_reference" in name for name in torch.load(checkpoint)["state_dict"])  # the premise
    export_policy(checkpoint, tmp_path / "out", quiet=True)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in (tmp_path / "sft").iterdir()}
    assert "reference" not in " ".join(load_file(tmp_path / "out" / "adapter_model.safetensors"))
    torch.testing.assert_close(opened(tmp_path / "out"), logits(module.policy), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(opened(tmp_path / "out"), opened(tmp_path / "sft"), atol=1e-3)


@pytest.mark.filterwarnings("ignore:.*the intent is to save in a single process")
def test_a_folder_of_shards(lora_run, tmp_path):
    """As `ModelParallelStrategy(save_distributed_checkpoint=True)` writes them."""
    content = torch.load(lora_run[1])
    tensors = {"state_dict": content.pop("state_dict"), "optimizer_0": content.pop("optimizer_states")[0]["state"]}
    dcp.save(tensors, checkpoint_id=tmp_path / "run" / "x.ckpt", no_dist=True)
    torch.save(content, tmp_path / "run" / "x.ckpt" / "meta.pt")
    for number, path in enumerate((tmp_path / "run" / "x.ckpt", tmp_path / "run")):
        export_policy(path, tmp_path / str(number), quiet=True)
        torch.testing.assert_close(opened(tmp_path / str(number)), logits(lora_run[0].policy), atol=1e-5, rtol=1e-5)
    next((tmp_path / "run" / "x.ckpt").glob("*.distcp")).unlink()
    with pytest.raises(ValueError, match="a part of it is missing"):
        export_policy(tmp_path / "run" / "x.ckpt", tmp_path / "out")


def test_a_run_without_a_data_module_gets_the_policys_tokenizer(tiny_model, tmp_path):
    module, fit = LitDPO(str(tiny_model), lora=LORA), trainer(max_steps=1)
    fit.fit(module, loader(make_pairs(2), 2))
    fit.save_checkpoint(tmp_path / "x.ckpt")
    export_policy(tmp_path / "x.ckpt", tmp_path / "out", quiet=True)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    card = (tmp_path / "out" / "README.md").read_text()
    assert "No validation was made" in card
    assert "## Data" not in card


def test_a_tokenizer_of_another_size_is_refused(lora_run, tiny_model, tmp_path):
    other = AutoTokenizer.from_pretrained(tiny_model)
    other.add_tokens(["<new>"])
    other.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match=r"have the 258 tokens of the training, but .* has 259"):
        export_policy(lora_run[1], tmp_path / "out", tokenizer=str(tmp_path / "tokenizer"))


@pytest.mark.filterwarnings("ignore:The policy is exported as one of")
def test_another_policy_is_refused(lora_run, tmp_path):
    tiny_llama(num_hidden_layers=1).save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match=r"4 of 8 have no place in it.*layers\.1\.self_attn"):
        export_policy(lora_run[1], tmp_path / "out", policy=str(tmp_path / "small"))
    tiny_llama(hidden_size=16).save_pretrained(tmp_path / "narrow")
    with pytest.raises(ValueError, match=r"or another shape.*layers\.0\.self_attn"):
        export_policy(lora_run[1], tmp_path / "out", policy=str(tmp_path / "narrow"))
    assert not (tmp_path / "out").exists()


def test_nothing_to_merge(tiny_model, tmp_path):
    _, _, checkpoint = run(tmp_path / "run", str(tiny_model))
    with pytest.raises(ValueError, match="Expected `merge` to be False"):
        export_policy(checkpoint, tmp_path / "out", merge=True)


def test_an_adapter_of_a_4_bit_base(tiny_model, tmp_path):
    pytest.importorskip("bitsandbytes")
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    tiny_llama(vocab_size=258, hidden_size=64, intermediate_size=64).save_pretrained(base)
    four_bit = {"quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}}
    module, _, checkpoint = run(tmp_path / "run", str(base), lora=LORA, model_kwargs=four_bit)
    export_policy(checkpoint, tmp_path / "out", quiet=True)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| Quantisation of the base model | load_in_4bit=True, bnb_4bit_quant_type=nf4 |" in card
    again = load_model(tmp_path / "out", "policy", four_bit)
    torch.testing.assert_close(logits(again), logits(module.policy), atol=1e-5, rtol=1e-5)
    assert opened(tmp_path / "out").isfinite().all()  # on the base model as it is on disk
    with pytest.raises(ValueError, match="Expected a base model that is not quantised"):
        export_policy(checkpoint, tmp_path / "merged", merge=True)


# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["files", "trailing slash", "file", "link", "dangling link"])
def test_folders_that_hold_something_are_refused(lora_run, tmp_path, kind):
    out, target = tmp_path / "out", tmp_path / "target"
    given = out
    if kind in ("files", "trailing slash"):
        out.mkdir()
        (out / "notes.txt").write_text("mine")
        given = f"{out}/" if kind == "trailing slash" else out
    elif kind == "file":
        out.write_text("mine")
    else:
        if kind == "link":
            target.mkdir()
        out.symlink_to(target)
    before = {path: path.read_bytes() if path.is_file() else None for path in tmp_path.rglob("*")}
    with pytest.raises(FileExistsError, match=f"Expected `folder` to be new or empty, but {out} is a "):
        export_policy(lora_run[1], given)
    assert {path: path.read_bytes() if path.is_file() else None for path in tmp_path.rglob("*")} == before


def test_new_parents_and_empty_folders(lora_run, tmp_path):
    export_policy(lora_run[1], tmp_path / "new" / "out", quiet=True)
    (tmp_path / "empty").mkdir()
    export_policy(lora_run[1], f"{tmp_path}/empty/", quiet=True)
    assert torch.equal(opened(tmp_path / "empty"), opened(tmp_path / "new" / "out"))


def test_nothing_half_written_is_left(lora_run, tmp_path, monkeypatch):
    from transformers import PreTrainedTokenizerBase

    def full(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", full)
    with pytest.raises(OSError, match="No space"):
        export_policy(lora_run[1], tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "is not there"),
        ("empty", "it is empty"),
        ("truncated", "it is cut off, or no checkpoint"),
        ("text", "it is cut off, or no checkpoint"),
        ("foreign", "something else's"),
        ("weights", "something else's"),
        ("no facts", "describe its run, but parts of `run` or `hyper_parameters` are missing"),
        ("no arguments", "describe its run"),
        ("object", "holds a Python object, pathlib.PosixPath, which is not loaded"),
    ],
)
def test_bad_checkpoints(lora_run, tmp_path, kind, message):
    path = tmp_path / "x.ckpt"
    whole = lora_run[1].read_bytes()
    if kind == "foreign":
        torch.save({"state_dict": {"layer.weight": torch.ones(1)}, "epoch": 1}, path)
    elif kind == "weights":
        torch.save(torch.load(lora_run[1])["state_dict"], path)
    elif kind.startswith("no "):
        changed = {"run": {}} if kind == "no facts" else {"hyper_parameters": None}
        torch.save(torch.load(lora_run[1]) | changed, path)
    elif kind == "object":
        torch.save(torch.load(lora_run[1]) | {"more": Path("/")}, path)
    elif kind != "missing":
        path.write_bytes({"empty": b"", "text": b"hello " * 99, "truncated": whole[: len(whole) // 2]}[kind])
    with pytest.raises((ValueError, FileNotFoundError), match=f"{path}.*{message}"):
        export_policy(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def checkpoints(folder: Path, like: Path, scores: dict[str, dict[str, float]], last: str | None = None) -> None:
    """Copies of a checkpoint whose callbacks name the best ones: {monitor: {file: score}}."""
    folder.mkdir(parents=True)
    content = torch.load(like)
    content["callbacks"] = {
        f"ModelCheckpoint{{{monitor}}}": {
            "monitor": monitor,
            "best_model_path": f"/elsewhere/{min(files, key=files.get)}",
            "best_model_score": torch.tensor(min(files.values())),
        }
        for monitor, files in scores.items()
    }
    names = dict.fromkeys([name for files in scores.values() for name in files] + [last] * (last is not None))
    for second, name in enumerate(names):
        torch.save(content, folder / name)
        os.utime(folder / name, (second, second))


def test_a_runs_folder_gives_its_best_checkpoint(lora_run, tmp_path, capsys):
    checkpoints(tmp_path / "run" / "deep", lora_run[1], {"val/loss": {"a.ckpt": 0.5, "b.ckpt": 0.25}}, "last.ckpt")
    exported = export_policy(tmp_path / "run", tmp_path / "out")
    assert exported.checkpoint == tmp_path / "run" / "deep" / "b.ckpt"
    assert capsys.readouterr().out.startswith(f"Read: {exported.checkpoint}, the best by val/loss (0.25).\n")


def test_of_several_runs_it_is_the_newest_ones_best(lora_run, tmp_path):
    for name, when in zip("abcdefgh", (2, 9, 1, 3, 4, 5, 6, 7), strict=True):
        checkpoints(tmp_path / "runs" / name, lora_run[1], {"val/loss": {"best.ckpt": 0.5}}, "last.ckpt")
        for path in (tmp_path / "runs" / name).iterdir():
            os.utime(path, (when, when))
    exported = export_policy(tmp_path / "runs", tmp_path / "out", quiet=True)
    assert exported.checkpoint == tmp_path / "runs" / "b" / "best.ckpt"


def test_a_folder_without_a_best_one_gives_the_newest_whole_one(lora_run, tmp_path, capsys):
    checkpoints(tmp_path / "run", lora_run[1], {}, "old.ckpt")
    torch.save(torch.load(lora_run[1]) | {"callbacks": {}}, tmp_path / "run" / "new.ckpt")
    (tmp_path / "run" / "last.ckpt").write_bytes(lora_run[1].read_bytes()[:1000])  # cut off by a kill
    exported = export_policy(tmp_path / "run", tmp_path / "out")
    assert exported.checkpoint == tmp_path / "run" / "new.ckpt"
    assert "the newest of 3; 1 newer cannot be read" in capsys.readouterr().out


def test_folders_with_several_best_ones_or_none(lora_run, tmp_path):
    scores = {"val/loss": {"a.ckpt": 0.5}, "val/reward_margin": {"b.ckpt": 0.25}}
    checkpoints(tmp_path / "run", lora_run[1], scores)
    with pytest.raises(ValueError, match=r"several: .*a\.ckpt \(the best by val/loss \(0\.5\)\), .*b\.ckpt"):
        export_policy(tmp_path / "run", tmp_path / "out")
    (tmp_path / "none").mkdir()
    with pytest.raises(FileNotFoundError, match="holds none"):
        export_policy(tmp_path / "none", tmp_path / "out")
    (tmp_path / "none" / "x.ckpt").write_text("")
    with pytest.raises(ValueError, match=r"none of 1 is: Expected .*x\.ckpt"):
        export_policy(tmp_path / "none", tmp_path / "out")


def test_another_base_of_the_same_shape_is_warned_of(lora_run, tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "other")
    with pytest.warns(UserWarning, match=r"exported as one of .*other, but the run of .* started from"):
        export_policy(lora_run[1], tmp_path / "out", policy=str(tmp_path / "other"), quiet=True)
    export_policy(lora_run[1], tmp_path / "same", policy=f"{tiny_model}/", quiet=True)  # no warning


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`")
def test_an_adapter_of_tied_embeddings_is_not_merged(tiny_model, tmp_path):
    base = tmp_path / "tied"
    shutil.copytree(tiny_model, base)
    size = AutoTokenizer.from_pretrained(tiny_model)
    tiny_llama(vocab_size=len(size), max_position_embeddings=512, tie_word_embeddings=True).save_pretrained(base)
    lora = {"r": 2, "target_modules": ["q_proj", "embed_tokens"]}
    _, _, checkpoint = run(tmp_path / "run", str(base), lora=lora)
    with pytest.raises(ValueError, match=r"changes model\.embed_tokens, which shares its weight"):
        export_policy(checkpoint, tmp_path / "out", merge=True)
    assert not (tmp_path / "out").exists()


def test_a_merged_model_that_differs_is_refused(lora_run, tmp_path, monkeypatch):
    monkeypatch.setattr("peft.PeftModel.merge_and_unload", lambda self, **_: self.unload(), raising=False)
    monkeypatch.setattr("peft.tuners.lora.LoraModel.merge_and_unload", lambda self, **_: self.unload())
    with pytest.raises(ValueError, match="to give the logits of the model with its adapter, but they differ by"):
        export_policy(lora_run[1], tmp_path / "out", merge=True)


def test_an_adapter_with_dora_is_opened_by_peft(tiny_model, tmp_path):
    module, _, checkpoint = run(tmp_path / "run", str(tiny_model), lora={**LORA, "use_dora": True})
    written = export_policy(checkpoint, tmp_path / "out", quiet=True)
    assert "peft.AutoPeftModelForCausalLM" in written.describe()
    assert "--merge" in written.describe()
    assert "AutoPeftModelForCausalLM.from_pretrained" in (tmp_path / "out" / "README.md").read_text()
    peft = logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out"))
    torch.testing.assert_close(peft, logits(module.policy), atol=1e-5, rtol=1e-5)
    export_policy(checkpoint, tmp_path / "merged", merge=True, quiet=True)
    torch.testing.assert_close(opened(tmp_path / "merged"), logits(module.policy), atol=1e-4, rtol=1e-4)


def test_the_card_names_the_optimiser_that_trained(tiny_model, tmp_path):
    def sgd(parameters):
        return torch.optim.SGD(parameters, lr=1e-2, weight_decay=0.25)

    def exponential(optimizer):
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)

    _, _, checkpoint = run(tmp_path / "run", str(tiny_model), lora=LORA, optimizer=sgd, lr_scheduler=exponential)
    export_policy(checkpoint, tmp_path / "out", quiet=True)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| Optimiser | SGD |" in card
    assert "| Weight decay | 0.25 |" in card
    assert "| Schedule | ExponentialLR |" in card


def test_a_folder_that_cannot_be_made_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="Expected `folder` to be a folder that can be made"):
        check_new(tmp_path / "file" / "out")


def test_the_configuration_keeps_its_dropout(tiny_model, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.125}))
    module, _, _ = run(tmp_path / "run", str(base))
    export_module(module, tmp_path / "out", tokenizer=AutoTokenizer.from_pretrained(base))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["attention_dropout"] == 0.125
    assert module.policy.config.attention_dropout == 0
