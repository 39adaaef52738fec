"""Every metric that LitDPO logs arrives at TensorBoard, CSV, W&B (offline) and MLflow (local), with its value.

Each logger's files are read back with what its own project reads them with.
"""

from __future__ import annotations

import csv
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import lightning
import pytest
import yaml
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger

from lit_did import DIDMonitor, LitDPO, PreferenceDataModule
from lit_did.callbacks import SampleCompletions
from tests.modules.tiny import trainer

PAIRS = [{"prompt": f"What is {i}?", "chosen": f" {i}" * (i % 3 + 1), "rejected": " no|<b>"} for i in range(6)]
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
Values = dict[str, dict[int, float]]  # by metric and step


class Run(NamedTuple):
    """What a run logged."""

    values: Values
    table: list[dict]
    """the last table of completions"""
    hyperparameters: dict[str, object]


class Record(lightning.Callback):
    """Every value that Lightning gives to its loggers, at its step."""

    def __init__(self) -> None:
        self.values: Values = {}

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.add(trainer, "train/")

    def on_validation_end(self, trainer, module):
        self.add(trainer, "val/")

    def add(self, trainer: lightning.Trainer, stage: str) -> None:
        for name, value in trainer.callback_metrics.items():
            if name.removeprefix("did/").startswith(stage):
                self.values.setdefault(name, {})[trainer.global_step - 1] = float(value)  # Lightning counts from 0


def train(logger, folder: Path, tiny_model: Path) -> Run:
    """Two steps with a validation after each."""
    name = str(tiny_model)
    module = LitDPO(name, lora=LORA, learning_rate=1e-2, loss={"sigmoid": 1.0, "sft": 0.2})
    data = PreferenceDataModule(PAIRS[:4], name, val=PAIRS[4:], batch_size=2, as_chat=True)
    record = Record()
    run = trainer(
        max_epochs=1,
        logger=logger,
        val_check_interval=1,
        num_sanity_val_steps=0,
        default_root_dir=folder,
        callbacks=[DIDMonitor(every_n_steps=1), SampleCompletions(2, max_new_tokens=4), record],
    )
    run.fit(module, datamodule=data)
    (path,) = folder.rglob("completions.jsonl")
    table = [json.loads(line) for line in path.read_text().splitlines()]
    # The premises: what LitDPO and the monitor log, twice each.
    assert run.global_step == 2
    assert {"train/loss", "val/loss", "train/token_did_entropy", "did/train/kl", "did/val/kl"} < set(record.values)
    assert len(record.values) == 4 * 14 + 2
    assert {len(steps) for steps in record.values.values()} == {2}
    hyperparameters = {"beta": 0.1, "policy": name, "lora/r": 4, "loss/sft": 0.2, "warmup_steps": 0}
    return Run(record.values, [row for row in table if row["step"] == 2], hyperparameters)


def assert_arrived(run: Run, values: Values, hyperparameters: dict[str, object]) -> None:
    """What was read back is what the run logged, in float32."""
    assert run.values.keys() - values.keys() == set()
    for name, steps in run.values.items():
        assert values[name] == pytest.approx(steps, rel=1e-6), name
    for name, value in run.hyperparameters.items():
        assert str(hyperparameters[name]) == str(value), name


def test_csv(tmp_path, tiny_model):
    logger = CSVLogger(tmp_path)
    run = train(logger, tmp_path, tiny_model)
    values: Values = {}
    with open(f"{logger.log_dir}/metrics.csv", newline="") as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if name != "step" and value:
                    values.setdefault(name, {})[int(row["step"])] = float(value)
    saved = yaml.safe_load(Path(logger.log_dir, "hparams.yaml").read_text())
    assert_arrived(run, values, flat(saved))
    assert Path(logger.log_dir, "completions.jsonl").exists()


def test_tensorboard(tmp_path, tiny_model):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path)
    run = train(logger, tmp_path, tiny_model)
    events = EventAccumulator(logger.log_dir).Reload()
    values = {name: {e.step: e.value for e in events.Scalars(name)} for name in events.Tags()["scalars"]}
    saved = yaml.safe_load(Path(logger.log_dir, "hparams.yaml").read_text())
    assert_arrived(run, values, flat(saved))
    last = events.Tensors("completions/text_summary")[-1]
    assert last.step == 2
    text = last.tensor_proto.string_val[0].decode()
    assert text.splitlines()[0] == "| step | prompt | policy | reference |"
    assert len(text.splitlines()) == 2 + 2
    assert all("What is" in line and line.count(" | ") == 3 for line in text.splitlines()[2:])


def flat(settings: dict, prefix: str = "") -> dict[str, object]:
    """Nested settings, with names as Lightning's loggers make them."""
    found: dict[str, object] = {}
    for name, value in settings.items():
        found |= flat(value, f"{prefix}{name}/") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def wandb_records(content: bytes) -> Iterator[bytes]:
    """The records of a `.wandb` file: a header of 7 bytes, then LevelDB's log format in blocks of 32 KiB.

    W&B has no Python code that reads it.
    """
    begun, position, block = b"", 7, 32768
    while position + 7 <= len(content):
        if block - position % block < 7:  # no room for a header: the rest of the block is empty
            position += block - position % block
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        begun += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield begun
            begun = b""


@pytest.mark.long  # its process takes some seconds to start and to end
def test_wandb(tmp_path, tiny_model, monkeypatch):
    wandb = pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record as Saved

    for name in ("DIR", "CACHE_DIR", "CONFIG_DIR", "DATA_DIR", "ARTIFACT_DIR"):
        monkeypatch.setenv(f"WANDB_{name}", str(tmp_path))
    options = {"MODE": "offline", "CONSOLE": "off", "SILENT": "true", "DISABLE_GIT": "true", "DISABLE_CODE": "true"}
    for name, value in options.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    logger = WandbLogger(project="test", save_dir=tmp_path, offline=True)
    run = train(logger, tmp_path, tiny_model)
    logger.experiment.finish()
    wandb.teardown()  # waits until its process has written everything
    (path,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    values: Values = {}
    config = {}
    for saved in map(Saved.FromString, wandb_records(path.read_bytes())):
        for item in (*saved.run.config.update, *saved.config.update):
            config["/".join(item.nested_key) or item.key] = json.loads(item.value_json)
        row = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in saved.history.item}
        step = row.pop("trainer/global_step", None)
        for name, value in row.items():
            values.setdefault(name, {})[step] = value
    assert_arrived(run, values, flat(config))
    written = json.loads((path.parent / "files" / values["completions/path"][2]).read_text())
    assert written["columns"] == ["step", "prompt", "policy", "reference"]
    assert [dict(zip(written["columns"], row, strict=True)) for row in written["data"]] == run.table


@pytest.mark.filterwarnings("ignore:For backward compatibility, 'str' dtypes are")  # MLflow's use of pandas
def test_mlflow(tmp_path, tiny_model, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.chdir(tmp_path)
    from mlflow.tracking import MlflowClient

    logger = MLFlowLogger(tracking_uri=f"file:{tmp_path}/mlruns")
    run = train(logger, tmp_path, tiny_model)
    client = MlflowClient(f"file:{tmp_path}/mlruns")
    saved = client.get_run(logger.run_id).data
    values = {n: {m.step: m.value for m in client.get_metric_history(logger.run_id, n)} for n in saved.metrics}
    assert_arrived(run, values, saved.params)
    table = client.load_table(logger.experiment_id, "completions.json", [logger.run_id])
    assert table[table["step"] == 2].to_dict("records") == run.table
