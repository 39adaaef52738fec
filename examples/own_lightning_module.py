"""DPO in a LightningModule of your own, which logs the DID: by its metrics, or by a callback alone.

python examples/own_lightning_module.py [--model NAME_OR_PATH] [--data pairs.jsonl] [--max-steps 20]
"""

from __future__ import annotations

import argparse

import lightning
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM

from lit_did import DIDMetrics, DIDMonitor, PolicyAndReference, PreferenceDataModule
from lit_did.demo import PAIRS, smollm2


class MyDPO(lightning.LightningModule):
    def __init__(self, model: str, beta: float = 0.1) -> None:
        super().__init__()
        self.beta = beta
        policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self.models = PolicyAndReference(policy)  # the reference is a frozen copy of the policy
        self.did = DIDMetrics(beta=beta, prefix="my/")

    def training_step(self, batch: dict, batch_idx: int) -> torch.Tensor:
        statistics = self.models(batch)  # SequenceStatistics [2 pairs], the chosen completions first
        self.did.update(statistics)
        chosen, rejected = statistics.log_ratio.chunk(2)
        return -logsigmoid(self.beta * (chosen - rejected)).mean()

    def on_train_epoch_end(self) -> None:
        self.log_dict(self.did.compute())
        self.did.reset()

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        pass  # the callback measures the batches

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.models.policy.parameters(), lr=1e-5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a causal language model: name or path (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--data", default=PAIRS, help="preference pairs, as PreferenceDataModule reads them")
    parser.add_argument("--max-steps", type=int, default=20)
    options = parser.parse_args()
    model = options.model or str(smollm2())
    trainer = lightning.Trainer(
        max_steps=options.max_steps,
        val_check_interval=options.max_steps,
        check_val_every_n_epoch=None,
        callbacks=[DIDMonitor(every_n_steps=5)],  # or nothing in the module, and this one line
        logger=CSVLogger("did_logs", name="", version=""),
        enable_checkpointing=False,
    )
    data = PreferenceDataModule(options.data, model, val_fraction=0.1, batch_size=2, max_length=128, as_chat=True)
    trainer.fit(MyDPO(model), data)
    for name, value in trainer.callback_metrics.items():
        print(f"{name:30} {value:10.4f}")


if __name__ == "__main__":
    main()
