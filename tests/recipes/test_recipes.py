"""Every recipe is parsed by `lit-did fit` itself, and trains two steps of a tiny model on the CPU.

A recipe that is added to recipes/ is tested as it is.
"""

from __future__ import annotations

import csv
import inspect
import json
import math
import re
from importlib.util import find_spec
from pathlib import Path

import lightning
import pytest
import torch
import yaml

import lit_did
from lit_did.cli.errors import InputError
from lit_did.cli.recipes import RECIPES as PACKAGED
from lit_did.cli.recipes import with_recipes
from lit_did.cli.training import Training
from lit_did.modules import LitDPO, LitDPOPG
from tests.modules.tiny import byte_tokenizer, tiny_llama
from tests.processes import run_program

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
SMALL = {
    "model.policy": "{model}",
    "model.learning_rate": 0.01,
    "data.train": "pairs.jsonl",
    "data.val": None,
    "data.val_fraction": 0.2,
    "data.batch_size": 2,
    "trainer.accelerator": "cpu",
    "trainer.devices": 1,
    "trainer.accumulate_grad_batches": 1,
    "trainer.max_epochs": 1,
    "trainer.max_steps": 2,
    "trainer.val_check_interval": 1,
    "trainer.check_val_every_n_epoch": 1,
    "trainer.enable_progress_bar": False,
    "output": "run",
}
"""what makes any recipe small; all else is the recipe's"""

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*bitsandbytes",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A folder with a random Llama, as wide as bitsandbytes' blocks, and its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder)
    tiny_llama(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128).save_pretrained(folder)
    return folder


@pytest.fixture
def small(tmp_path, monkeypatch, model) -> list[str]:
    """The arguments of `lit-did fit` that follow a recipe, in a folder with pairs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # of what LightningCLI calls
    rows = [{"prompt": f"What is {i}?", "chosen": f"It is {i}.", "rejected": f"No {i}"} for i in range(8)]
    Path("pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    values = {name: str(model) if value == "{model}" else value for name, value in SMALL.items()}
    return [f"--{name}={'null' if value is None else value}" for name, value in values.items()]


class FirstWeights(lightning.Callback):
    """The trained weights before the first step."""

    def on_train_start(self, trainer, module):
        self.weights = [p.detach().clone() for p in module.parameters() if p.requires_grad]


def fit(arguments: list[str]) -> tuple[Training, FirstWeights]:
    cli = Training("fit", arguments)
    first = FirstWeights()
    cli.trainer.callbacks.append(first)
    try:
        cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    finally:
        if torch.distributed.is_initialized():  # by ddp.yaml, with one process
            torch.distributed.destroy_process_group()
    return cli, first


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_two_steps(recipe, small):
    if "load_in_4bit" in recipe.read_text() and find_spec("bitsandbytes") is None:
        pytest.skip("needs bitsandbytes")
    cli, first = fit(["-c", str(recipe), *small])
    assert cli.trainer.global_step == 2
    with open("run/metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for name in ("train/loss", "val/loss"):
        values = [float(row[name]) for row in rows if row[name]]
        assert len(values) == 2
        assert all(map(math.isfinite, values))
    weights = [p.detach() for p in cli.model.parameters() if p.requires_grad]
    assert len(weights) == len(first.weights) > 0
    assert not all(map(torch.equal, weights, first.weights))


@pytest.mark.parametrize("recipe", ["dpo_pg", "smollm2_lora_cpu"])  # with a class_path and without
@pytest.mark.parametrize("place", ["model", "data", "trainer", None])
def test_unknown_keys_are_refused(recipe, place, small):
    """The premise of the test above: a key that is renamed in the code fails there, and is not ignored."""
    settings = yaml.safe_load((RECIPES[0].parent / f"{recipe}.yaml").read_text())
    section = settings if place is None else settings[place]
    section.get("init_args", section)["betta"] = 1
    Path("wrong.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(InputError, match="betta"):
        Training("fit", ["-c", "wrong.yaml", *small])


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_no_value_is_a_default(recipe):
    """A value that is the default says nothing, and hides those that do."""
    settings = yaml.safe_load(recipe.read_text())
    model = settings["model"].get("init_args", settings["model"])
    for section, function in (
        (model, LitDPO),
        (settings["data"], lit_did.PreferenceDataModule),
        (settings["trainer"], lightning.Trainer),
    ):
        parameters = inspect.signature(function).parameters
        same = [name for name, value in section.items() if value is not None and value == parameters[name].default]
        assert same == []


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_the_commands_that_it_opens_with(recipe, small):
    opening = recipe.read_text().split("\n\n")[0].splitlines()
    assert all(line.startswith("#") for line in opening)
    commands = [re.split(" {2,}#", line)[0].split()[2:] for line in opening if line.startswith("#   lit-did fit ")]
    assert commands
    kinds = []
    for command in commands:
        assert command[1:3] == ["-c", f"recipes/{recipe.name}"]
        cli = Training("fit", [*command[1:], *small, f"--output=run{len(kinds)}"])
        kinds.append((type(cli.model), cli.model.hparams["loss"], cli.model.hparams["beta"]))
    if recipe.stem == "paper_comparison":
        assert kinds == [(LitDPO, "sigmoid", 0.1), (LitDPOPG, "sigmoid", 0.1), (LitDPO, "simpo", 2.0)]
    if recipe.stem == "dpo_with_sft":
        assert kinds == [(LitDPO, {"sigmoid": 1.0, "sft": 0.2}, 0.1)]


@pytest.mark.long
def test_the_papers_comparison(small, capsys):
    """The loop and the table of docs/recipes.md: 6 of its 48 runs, small."""
    page = (RECIPES[0].parents[1] / "docs" / "recipes.md").read_text(encoding="utf-8")
    (loop,) = re.findall(r"```bash\n(.*?)```", page, flags=re.DOTALL)
    (table,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    commands = run_program("bash", "-c", f'lit-did() {{ echo "$*"; }}\n{loop}').splitlines()
    assert len({re.search(r"--output (\S+)", command)[1] for command in commands}) == len(commands) == 48
    Path("pairs.jsonl").rename("factual.jsonl")
    overrides = [option for option in small if not option.startswith(("--data.train", "--output"))]
    settings = ("factual-dpo-0.1", "factual-dpo_pg-0.1", "factual-simpo-2")
    few = [c.split()[1:] for c in commands for setting in settings if re.search(rf"/{setting}-[01]$", c)]
    assert len(few) == 6
    for command in few:
        fit([*command, *overrides])
    capsys.readouterr()
    exec(table, {})
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split()[0] == "setting"
    assert [row.split()[0] for row in rows] == list(settings)
    assert all(row.count("±") == 4 and "nan" not in row for row in rows)


@pytest.mark.parametrize("option", ["-c {}", "--config={}"])
@pytest.mark.parametrize("name", ["simpo", "simpo.yaml", "recipes/simpo.yaml"])
def test_the_package_holds_them(option, name, tmp_path, monkeypatch):
    """So that they are found after `pip install`, without a clone. A file of the user's comes first."""
    monkeypatch.chdir(tmp_path)
    arguments = [*option.format(name).split(), "--data.train=simpo"]
    assert sorted(path.name for path in PACKAGED.glob("*.yaml")) == [path.name for path in RECIPES]
    assert with_recipes(arguments) == [*option.format(PACKAGED / "simpo.yaml").split(), "--data.train=simpo"]
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).write_text("model: {policy: mine}")
    assert with_recipes(arguments) == arguments


@pytest.mark.parametrize("name", ["elsewhere/simpo.yaml", "simpol", "/simpo.yaml"])
def test_other_names_are_no_recipes(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert with_recipes(["-c", name]) == ["-c", name]
