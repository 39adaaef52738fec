"""What a user can mend ends `lit-did fit` and the others in one line on stderr, which names the nearest good name."""

from __future__ import annotations

import pytest

from lit_did.cli import main


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    path.write_text("".join(f'{{"prompt": "q{n}", "chosen": "yes", "rejected": "no"}}\n' for n in range(4)))
    return path


@pytest.fixture
def run(tmp_path, monkeypatch, capsys, tiny_model, pairs):
    """Runs `lit-did` in an empty folder, and returns its exit status and what it wrote on stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["lit-did"])

    def go(arguments: str, recipe: str | None = None) -> tuple[int, str]:
        if recipe is not None:
            filled = recipe.replace("MODEL", str(tiny_model)).replace("PAIRS", str(pairs))
            (tmp_path / "recipe.yaml").write_text(filled, encoding="utf-8", errors="surrogateescape")
            arguments += " -c recipe.yaml"
        words = arguments.replace("MODEL", str(tiny_model)).replace("PAIRS", str(pairs)).split()
        status = main.main(words)
        return status, capsys.readouterr().err

    return go


BASE = "fit --model.policy MODEL --data.train PAIRS"
WRONG_OPTIONS = [
    ("fti", "got fti. Did you mean fit?"),
    (f"{BASE} --model.betta 1", "got betta. Did you mean beta?"),
    (f"{BASE} --modle.beta 1", "got --modle.beta. Did you mean --model"),
    (f"{BASE} --trainer.max_epoch 1", "got --trainer.max_epoch. Did you mean --trainer.max_epochs?"),
    (f"{BASE} --data.batchsize 1", "got --data.batchsize. Did you mean --data.batch_size?"),
    (f"{BASE} --outptu x", "got --outptu. Did you mean --output?"),
    (f"{BASE} pairs.jsonl", "Expected an option, which starts with --, but got pairs.jsonl."),
    ("fit --model lit_did.LitDPOG --data.train PAIRS", "lit_did has no LitDPOG. Did you mean LitDPO"),
    ("fit --model LitDPOG --data.train PAIRS", "`model` to be a class, but got LitDPOG. Did you mean LitDPO"),
    (
        f"{BASE} --model.lora.rank 8",
        "`lora` to hold arguments of peft.LoraConfig, but got 'rank'. The most used are r, lora_alpha",
    ),
    (f"{BASE} --model.lora.target_modules nothing", "Expected `lora` to fit the policy, but: Target modules nothing"),
    (f"{BASE} --optimizer SGDD", "`optimizer` to be a class, but got SGDD. Did you mean SGD?"),
    (f"{BASE} --optimizer torch.optim.SGD --optimizer.lrr 1", "options of SGD only, but got lrr. Did you mean lr?"),
    (f"{BASE} --trainer.callbacks EarlyStoping", "got EarlyStoping. Did you mean EarlyStopping?"),
    (f"{BASE} --model.beta abc", "`model.beta` to be a number, but got 'abc'."),
    (f"{BASE} --model.beta -1", "Expected `beta` to be"),
    (f"{BASE} --model.loss sigmod", "Expected `loss` to be one of"),
    (
        f"{BASE} --model.schedule cosin",
        "`model.schedule` to be one of 'constant', 'linear', 'cosine', but got 'cosin'.",
    ),
    (f"{BASE} --trainer.max_epochs abc", "`trainer.max_epochs` to be a whole number or None, but got 'abc'."),
    (f"{BASE} --data.batch_size 0", "Expected `batch_size` to be an integer of at least 1, but got 0."),
    (f"{BASE} --trainer.accelerator gpuu", "gpuu"),
    ("fit --model.policy MODEL", "Expected `data.train` to be given"),
    ("fit --data.train PAIRS", "Expected `model.policy` to be given"),
    ("fit", "Expected `data.train`, `model.policy` to be given, in a recipe (-c FILE) or as an option (--data.train)."),
    ("fit --model.beta 0.1 --data.train PAIRS", "Expected `model.policy` to be given"),
    ("fit -c none.yaml", "none.yaml: No such file"),
    ("fit -c smollm2", "smollm2: No such file or directory. Did you mean smollm2_lora_cpu?"),
    ("fit --model.policy MODEL --data.train none.jsonl", "none.jsonl"),
    ("fit --model.policy ./nowhere --data.train PAIRS", "Expected `policy` to be a folder"),
    (f"{BASE} --model.reference ./nowhere", "Expected `reference` to be a folder"),
    (f"{BASE} --ckpt_path none.ckpt", "Expected `ckpt_path` to be a checkpoint, but none.ckpt does not exist."),
    (f"{BASE} --ckpt_path last", "Expected a run in runs/dpo for `--ckpt_path last`, but there is none."),
    (f"{BASE} --output PAIRS/run", "Expected --output to be a folder that can be made"),
    (f"{BASE} --model.policy null", "Expected `model.policy` to be given, in a recipe"),
    (f"{BASE} --model.policy PAIRS", "Expected `policy` to be a folder"),
    (f"{BASE} --model.learning_rate abc", "`model.learning_rate` to be a number or None, but got 'abc'."),
    (f"{BASE} --model.loss.sigmoid abc", "`model.loss.sigmoid` to be a number, but got 'abc'."),
    (f"{BASE} --model MODEL", "To name a model, use `model.policy`."),
    (f"{BASE} --model.lora.r abc", "Expected `lora` to hold values that peft.LoraConfig accepts, but got {'r': 'abc'}"),
    (f"{BASE} --model.lora.bias foo", "Expected `lora` to hold values that peft.LoraConfig accepts"),
    (f"{BASE} --model.lora.task_type FOO", "Expected `lora` to hold values that peft.LoraConfig accepts"),
    (f"{BASE} --model.model_kwargs 3", "`model.model_kwargs` to be a mapping or None, but got '3'."),
    (f"{BASE} --model.model_kwargs.dtype float99", "`dtype` of `model_kwargs` to be a number format of torch"),
    (f"{BASE} --model.model_kwargs.foo 1", "Expected `policy` to be a folder or name that transformers loads with"),
    (f"{BASE} --model.model_kwargs.quantization_config 3", "Expected `quantization_config` to be a configuration"),
    (f"{BASE} --optimizer.lr 1", "`optimizer` to name a class before its option lr"),
    (f"{BASE} --optimizer torch.optim.SGD --optimizer.lr abc", "Expected `optimizer.lr` to be a number or Tensor"),
    (f"{BASE} --lr_scheduler CosineAnnealingLR", "`lr_scheduler.T_max` to be given, in init_args of CosineAnnealingLR"),
    (
        f"{BASE} --trainer.callbacks ModelCheckpoint --trainer.callbacks.save_top_k 3",
        "Expected arguments that ModelCheckpoint accepts, but: ModelCheckpoint(save_top_k=3, monitor=None) is not",
    ),
    (f"{BASE} --trainer 3", "Expected `trainer` to hold options, such as `trainer.accelerator`, but got 3."),
    (f"{BASE} --config", "Expected a YAML file after --config, but got nothing."),
    (f"{BASE} --quiet=1", "Expected --quiet without a value, but got --quiet=1."),
    (f"{BASE} --model.policy", "Expected a value after --model, but got none."),
    ("score PAIRS --policy MODEL --overwrit", "got --overwrit. Did you mean --overwrite?"),
    (f"{BASE} --save_every 0", "Expected `save_every` to be a whole number, at least 1, but got 0."),
    (f"{BASE} --seed -1", "Expected `seed` to be a whole number, from 0 to 4294967295, but got -1."),
    (f"{BASE} --trainer.accumulate_grad_batches 0", "`trainer.accumulate_grad_batches` to be a whole number, at least"),
    (f"{BASE} --trainer.check_val_every_n_epoch 0", "`trainer.check_val_every_n_epoch` to be a whole number, at least"),
    (
        f"{BASE} --data.val_fraction 0.5 --data.batch_size 1 --trainer.val_check_interval 100",
        "`trainer.val_check_interval` to be at most the 2 batches of an epoch, but got 100. A fraction",
    ),
    (f"{BASE} --optimizer torch.optim.SGD --optimizer.lr -1", "the run can be set up, but: Invalid learning rate: -1"),
    (f"{BASE} --optimizer SGD --optimizer.lr -2", "the run can be set up, but: Invalid learning rate: -2"),
    (f"{BASE} --optimizer=SGD --optimizer.lr -3", "the run can be set up, but: Invalid learning rate: -3"),
    (
        f"{BASE} --lr_scheduler torch.optim.lr_scheduler.OneCycleLR --lr_scheduler.max_lr 1 "
        "--lr_scheduler.total_steps -1",
        "the run can be set up, but: Expected positive integer total_steps",
    ),
    (
        f"{BASE} --trainer.logger tests.cli.kill.BrokenLogger --trainer.logger.save_dir logs",
        "with which the logger can be set up, but: no key",
    ),
    ("predict --model.policy MODEL --data.predict none.jsonl", "none.jsonl"),
    ("validate --model.policy MODEL", "Expected `val`"),
    ("predict --model.policy MODEL --data.train PAIRS", "Expected `predict`, `val` or `val_fraction` for predicting"),
    ("test --model.policy MODEL --data.train PAIRS", "Expected `test` for testing, but got None."),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG_OPTIONS)
def test_a_wrong_option_is_one_line(run, arguments, message):
    status, err = run(arguments)
    assert status == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert len(err) < 400


WRONG_RECIPES = [
    (
        "model: {policy: MODEL, betta: 1}\ndata: {train: PAIRS}\n",
        "options of LitDPO only, but got betta. Did you mean beta?",
    ),
    (
        "model: {class_path: lit_did.LitDPOG, init_args: {policy: m}}\ndata: {train: p}\n",
        "has no LitDPOG. Did you mean",
    ),
    (
        "model: {class_path: LitDPOPG, init_args: {policy: m, bta: 1}}\ndata: {train: p}\n",
        "got bta. Did you mean beta?",
    ),
    ("model: {policy: m}\ntrainr: {max_epochs: 1}\ndata: {train: p}\n", "got trainr. Did you mean trainer?"),
    (
        "model: {policy: m}\ntrainer: {max_epoch: 1}\ndata: {train: p}\n",
        "got trainer.max_epoch. Did you mean trainer.max_epochs?",
    ),
    ("model: {policy: m}\ndata: {trayn: p}\n", "got data.trayn. Did you mean data.train?"),
    (
        "model: {policy: m}\ndata: {train: p}\ntrainer:\n  callbacks:\n"
        "  - {class_path: EarlyStopping, init_args: {monitor: a, patiense: 1}}\n",
        "options of EarlyStopping only, but got patiense. Did you mean patience?",
    ),
    (
        "model: {policy: MODEL}\ndata: {train: PAIRS}\ntrainer:\n  callbacks:\n"
        "  - {class_path: EarlyStopping, init_args: {monitor: val_loss}}\n",
        "Expected `monitor` of EarlyStopping to be a metric that is logged, but got val_loss. Did you mean val/loss?",
    ),
    ("model: {policy: m, lora: 3}\ndata: {train: p}\n", "Expected `lora` to be"),
    ("model:\n  policy: m\n  loss: [1\ndata: {train: p}\n", "recipe.yaml, line 4: Expected YAML, but:"),
    ("model: {policy: m}\ndata: {train: p}\ntrainer:\n", "Expected `trainer` to hold options, but got None."),
    ("model: {policy: m}\ndata: PAIRS\n", "Expected `data` to hold options, such as `data.train`, but got"),
    ("model: [1]\ndata: {train: p}\n", "`model` to hold the options of LitDPO or None, or class_path"),
    ("model: {class_path: 3}\ndata: {train: p}\n", "`model` to hold the options of LitDPO or None, or class_path"),
    (
        "model: {class_path: lit_did.LitDPO, init_args: }\ndata: {train: p}\n",
        "`model` to hold the options of LitDPO or None, or class_path",
    ),
    (
        "model: {policy: m}\ndata: {train: p}\ntrainer:\n  callbacks:\n"
        "  - {class_path: EarlyStopping, init_args: {monitor: a, mode: up}}\n",
        "Expected arguments that EarlyStopping accepts, but: `mode` can be",
    ),
    (
        "model: {policy: m}\ndata: {train: p}\ntrainer: {logger: {class_path: CSVLogger}}\n",
        "`trainer.logger.save_dir` to be given, in init_args of CSVLogger",
    ),
    ("\udcff\udcfe", "recipe.yaml: Expected YAML in UTF-8, but"),
    ("- 3\n", "recipe.yaml: Expected YAML with options as keys, but got [3]."),
]


@pytest.mark.parametrize("command", ["demo", "doctor", "experiment reward", "bench"])
def test_a_wrong_option_of_the_other_commands_is_one_line(run, command, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(f"{command} --quie")
    assert capsys.readouterr().err == (
        "error: Expected an option of this command, but got --quie. Did you mean --quiet?\n"
    )


@pytest.mark.parametrize(
    "command", ["score PAIRS --reference MODEL", "generate PAIRS", "entropy --prompts PAIRS --reference MODEL"]
)
def test_the_policys_tokenizer_is_found_by_the_policys_name(run, command, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    status, err = run(f"{command} --policy somebody/a-model")
    assert status == 2
    assert "Expected `policy` to be a folder on this machine or a model of the Hugging Face hub" in err


def test_a_hub_that_cannot_be_reached_is_one_line(run, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    status, err = run("fit --model.policy somebody/a-model --data.train PAIRS")
    assert status == 2
    assert err.count("\n") == 1
    assert err.startswith("error: Expected `policy` to be a folder on this machine or a model of the Hugging Face hub")
    assert "cannot be reached" in err


@pytest.mark.parametrize(("recipe", "message"), WRONG_RECIPES)
def test_a_wrong_recipe_is_one_line(run, recipe, message):
    status, err = run("fit", recipe)
    assert status == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert len(err) < 400
