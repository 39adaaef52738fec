"""DPO in a plain PyTorch loop, with the DID metrics of held-out pairs before and after.

python examples/plain_loop.py [--model NAME_OR_PATH] [--data pairs.jsonl] [--max-steps 20]
"""

from __future__ import annotations

import argparse
import copy

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_did import DIDMetrics, sequence_statistics
from lit_did.data import PreferenceDataset, collate_pairs, read_pairs
from lit_did.demo import PAIRS, smollm2
from lit_did.functional import preference_loss


def logits(model: torch.nn.Module, batch: dict) -> torch.Tensor:
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def evaluate(policy: torch.nn.Module, reference: torch.nn.Module, batches: DataLoader) -> dict[str, float]:
    metrics = DIDMetrics(beta=0.1)
    policy.eval()
    with torch.no_grad():
        for batch in batches:
            metrics.update(logits(policy, batch), logits(reference, batch), batch["labels"])
    policy.train()
    return {name: value.item() for name, value in metrics.compute().items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a causal language model: name or path (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--data", default=PAIRS, help="preference pairs, as PreferenceDataModule reads them")
    parser.add_argument("--max-steps", type=int, default=20)
    options = parser.parse_args()

    torch.manual_seed(0)
    model = options.model or str(smollm2())
    tokenizer = AutoTokenizer.from_pretrained(model)
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    reference = copy.deepcopy(policy).eval().requires_grad_(False)
    dataset = PreferenceDataset(read_pairs(options.data), tokenizer, max_length=128, as_chat=True)
    held_out = max(1, len(dataset) // 10)

    def batches(indices: range, shuffle: bool) -> DataLoader:
        part = torch.utils.data.Subset(dataset, indices)
        return DataLoader(part, 2, shuffle, collate_fn=lambda rows: collate_pairs(rows, tokenizer.eos_token_id or 0))

    train, test = batches(range(len(dataset) - held_out), True), batches(range(len(dataset))[-held_out:], False)
    before = evaluate(policy, reference, test)
    optimizer = torch.optim.AdamW(policy.train().parameters(), lr=1e-5)
    for step, batch in zip(range(options.max_steps), train):  # noqa: B905
        with torch.no_grad():
            reference_logits = logits(reference, batch)
        statistics = sequence_statistics(logits(policy, batch), reference_logits, batch["labels"])
        loss = preference_loss(*statistics.log_ratio.chunk(2), beta=0.1).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {loss:.4f}, token DID entropy {statistics.token_did_entropy.mean():.4f} nats")
    after = evaluate(policy, reference, test)
    for name, value in after.items():
        print(f"{name:20} {before[name]:10.4f} -> {value:10.4f}")


if __name__ == "__main__":
    main()
