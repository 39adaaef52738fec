"""TRL's DPOTrainer with one more line, which logs the DID wherever its `report_to` sends metrics.

python examples/trl_dpo.py [--model NAME_OR_PATH] [--data pairs.jsonl] [--max-steps 20]
"""

from __future__ import annotations

import argparse

from datasets import Dataset
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer

from lit_did.data import read_pairs
from lit_did.demo import PAIRS, smollm2
from lit_did.integrations.trl import DIDCallback


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a causal language model: name or path (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--data", default=PAIRS, help="preference pairs with `prompt`, `chosen` and `rejected`")
    parser.add_argument("--max-steps", type=int, default=20)
    options = parser.parse_args()

    pairs = [row.pair._asdict() for row in read_pairs(options.data)]
    columns = [{side: pair[side] for side in ("prompt", "chosen", "rejected")} for pair in pairs]
    data = Dataset.from_list(columns).train_test_split(0.1, shuffle=False)
    trainer = DPOTrainer(
        model=options.model or str(smollm2()),
        args=DPOConfig(
            output_dir="did_logs",
            max_steps=options.max_steps,
            per_device_train_batch_size=2,
            per_device_eval_batch_size=2,
            learning_rate=2e-4,
            max_length=128,
            logging_steps=5,
            eval_strategy="steps",
            eval_steps=options.max_steps,
            save_strategy="no",
            report_to="none",  # Or "wandb", "tensorboard" and others. The DID goes there too.
            bf16=False,
            gradient_checkpointing=False,
            model_init_kwargs={"dtype": "float32"},
        ),
        train_dataset=data["train"],
        eval_dataset=data["test"],
        peft_config=LoraConfig(r=16, target_modules=["q_proj", "v_proj"]),
    )
    trainer.add_callback(DIDCallback(trainer))
    trainer.train()
    for entry in trainer.state.log_history:
        did = {name: round(value, 4) for name, value in entry.items() if "did/" in name}
        if did:
            print(entry["step"], did)


if __name__ == "__main__":
    main()
