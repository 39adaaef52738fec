"""docs/from_trl.md has every argument, loss, metric and callback of TRL's DPO, and names only what lit-did has."""

from __future__ import annotations

import inspect
import re
import textwrap
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import lightning
import pytest
import torch

import lit_did
from lit_did.functional import LOSSES
from lit_did.modules import LitDPO

trl = pytest.importorskip("trl")

PAGE = Path(__file__).parents[2] / "docs" / "from_trl.md"
TEXT = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""

pytestmark = pytest.mark.skipif(not TEXT, reason="not a clone: there are no pages")


def rows(text: str) -> list[tuple[str, str]]:
    """TRL's cell and ours of each row of the tables in `text`."""
    return [row for row in re.findall(r"^\| (.*?) \| (.*) \|$", text, flags=re.MULTILINE) if row[0] != "TRL"]


def table(heading: str) -> list[tuple[str, str]]:
    """The rows below a heading, up to the next one."""
    (found,) = [part for part in TEXT.split("\n## ") if part.splitlines()[0].strip("`") == heading]
    return rows(found)


def named(heading: str) -> list[str]:
    """The names in TRL's cells."""
    return re.findall(r"`([^`]+)`", " ".join(theirs for theirs, _ in table(heading)))


def test_every_field_of_the_configuration():
    own = {**trl.DPOConfig.__annotations__, **trl.trainer.base_config._BaseConfig.__annotations__}
    names = own.keys() & {field.name for field in fields(trl.DPOConfig)}
    assert len(names) > 30  # the premise
    assert names - set(named("DPOConfig")) == set()
    everything = {field.name for field in fields(trl.DPOConfig)}
    assert set(named("DPOConfig")) - everything == set()


def test_every_argument_of_the_trainer():
    assert named("DPOTrainer") == list(inspect.signature(trl.DPOTrainer.__init__).parameters)[1:]


def test_every_loss():
    help_text = trl.DPOConfig.__dataclass_fields__["loss_type"].metadata["help"]
    names = set(re.findall(r"`'(\w+)'`", help_text))
    assert len(names) >= 15  # the premise
    assert names - {name.strip('"') for name in named("Losses")} == set()
    same, _ = table("Losses")[0]
    assert {name.strip('"') for name in re.findall(r"`([^`]+)`", same)} == names & set(LOSSES)


def test_every_metric():
    source = inspect.getsource(trl.DPOTrainer)
    names = set(re.findall(r'_metrics\[mode\]\["([^"]+)"\]', source))
    assert len(names) >= 10  # the premise
    assert names - set(named("Metrics")) == set()


def test_every_callback():
    from transformers import TrainerCallback
    from trl.trainer import callbacks

    names = {
        name
        for name, value in vars(callbacks).items()
        if inspect.isclass(value) and issubclass(value, TrainerCallback) and value.__module__ == callbacks.__name__
    }
    assert len(names) >= 5  # the premise
    assert names - set(named("Callbacks")) == set()


def test_our_names_exist():
    classes = {"model": LitDPO, "data": lit_did.PreferenceDataModule, "trainer": lightning.Trainer}
    found = re.findall(r"`(model|data|trainer)\.(\w+)", " ".join(ours for _, ours in rows(TEXT)))
    assert len(found) > 40  # the premise
    for section, name in found:
        assert name in inspect.signature(classes[section]).parameters, f"{section}.{name}"
    from lit_did import callbacks

    for name in re.findall(r"`lit_did\.callbacks\.(\w+)`", TEXT):
        assert hasattr(callbacks, name)
    only_ours = re.findall(r"`(\w+)`", TEXT.split("Only in lit-did:")[1].split("(")[0])
    ours = re.findall(r"`(\w+)`", " ".join(ours for _, ours in table("Metrics")))
    logged = {*lit_did.DIDMetrics(), "loss", "chosen_logprob", "rejected_logprob"}
    assert {*only_ours, *ours} - {"LearningRateMonitor"} == logged


def test_its_loss_is_trls():
    """The function on the page, and TRL's lines of that name."""
    (code,) = re.findall(r"def apo_zero.*?\n\n\n", TEXT, flags=re.DOTALL)
    (lines,) = re.findall(
        r'loss_type == "apo_zero":\n(.*?)\n\n', inspect.getsource(trl.DPOTrainer._compute_loss), flags=re.DOTALL
    )
    chosen, rejected = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    space: dict = {"torch": torch, "chosen_logratios": chosen, "rejected_logratios": rejected}
    exec(code, space)
    exec(textwrap.dedent(lines).replace("self.beta", "0.1"), space)
    ours = space["apo_zero"](SimpleNamespace(log_ratio=chosen), SimpleNamespace(log_ratio=rejected))
    torch.testing.assert_close(ours, space["per_sequence_loss"])
