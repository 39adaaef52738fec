"""Tiny runs that leave checkpoints."""

from __future__ import annotations

from pathlib import Path

import lightning
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_did import LitDPO, PreferenceDataModule
from tests.modules.tiny import trainer

LORA = {"r": 2, "target_modules": ["q_proj", "v_proj"]}
ROWS = [
    {"prompt": f"What is {n}?", "chosen": f"It is {n}, a number.", "rejected": "No idea. " * (n % 3 + 1)}
    for n in range(12)
]
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def run(
    folder: Path,
    policy,
    *,
    data: PreferenceDataModule | None = None,
    callbacks: tuple = (),
    epochs: int = 1,
    module_class: type[LitDPO] = LitDPO,
    precision: str = "32-true",
    **options,
) -> tuple[LitDPO, lightning.Trainer, Path]:
    """A module after training, its Trainer, and its last checkpoint."""
    lightning.seed_everything(0, verbose=False)
    module = module_class(policy, **{"learning_rate": None if "optimizer" in options else 1e-2, **options})
    if data is None:
        data = PreferenceDataModule(ROWS, policy, val_fraction=0.25, batch_size=3, max_length=64, as_chat=True)
    saved = ModelCheckpoint(folder, filename="epoch", monitor=None)
    fit = trainer(
        max_epochs=epochs,
        callbacks=[*callbacks, saved],
        enable_checkpointing=True,
        num_sanity_val_steps=0,
        accumulate_grad_batches=2,
        precision=precision,
    )
    fit.fit(module, data)
    return module, fit, Path(saved.best_model_path)
