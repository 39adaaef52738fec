"""Trains, resumes, validates and predicts on two processes, and writes what each saw: run by test_resuming.py.

The processes share the tokens of the pairs in a folder.

python -m tests.data.ddp_script FOLDER
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lit_did.data import PreferenceDataModule
from tests.processes import run_ranks

ROWS = [{"prompt": "a", "chosen": " b" * (n % 5 + 1), "rejected": " c"} for n in range(11)]
BY_TOKENS = {"tokens_per_batch": 16, "max_length": 6}


class Recorder(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen: dict[str, list] = {"train": [], "val": [], "predict": []}

    def training_step(self, batch, batch_idx):
        self.seen["train"].append(batch["index"].tolist())
        return self.layer(torch.ones(1, 1)).sum()

    def validation_step(self, batch, batch_idx):
        self.seen["val"] += zip(batch["index"].tolist(), batch["weight"].tolist(), strict=True)

    def predict_step(self, batch, batch_idx):
        self.seen["predict"] += zip(batch["index"].tolist(), batch["weight"].tolist(), strict=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def run(
    out: Path, folder: str, checkpoint: str | None = None, by: dict | None = None, **kwargs
) -> tuple[Recorder, Trainer]:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    # No workers: forking while Lightning's and gloo's threads run deadlocks now and then in CPython 3.11's os.fork.
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    data = PreferenceDataModule(
        out / "train.jsonl", tokenizer, val=out / "val.jsonl", cache_tokens=out / "tokens", **(by or {"batch_size": 2})
    )
    module = Recorder()
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_epochs=2,
        logger=False,
        enable_progress_bar=False,
        num_sanity_val_steps=0,
        callbacks=[ModelCheckpoint(out / folder, filename="{step}", save_top_k=-1, every_n_train_steps=1)],
        **kwargs,
    )
    trainer.fit(module, data, ckpt_path=checkpoint and out / folder / checkpoint)
    module.seen["val"] = module.seen["val"][:3]  # of the first epoch
    if checkpoint is None and by is None:
        trainer.predict(module, data)
    return module, trainer


def main(out: Path) -> None:
    whole, trainer = run(out, "by rows")
    resumed, _ = run(out, "by rows", "step=4.ckpt")
    whole_by_tokens, _ = run(out, "by tokens", by=BY_TOKENS)
    resumed_by_tokens, _ = run(out, "by tokens", "step=4.ckpt", by=BY_TOKENS)
    overfitted, _ = run(out, "overfit", by=BY_TOKENS, overfit_batches=2)
    seen = {
        "whole": whole.seen["train"],
        "resumed": resumed.seen["train"],
        "validated": whole.seen["val"],
        "predicted": whole.seen["predict"],
        "whole by tokens": whole_by_tokens.seen["train"],
        "resumed by tokens": resumed_by_tokens.seen["train"],
        "overfitted by tokens": overfitted.seen["train"],
    }
    torch.save(seen, out / f"rank{trainer.global_rank}.pt")


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    for name, rows in (("train", ROWS), ("val", ROWS[:5])):
        Path(sys.argv[1], f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run_ranks(2, main, Path(sys.argv[1]))
