"""The demo: `lit-did demo` trains a real language model with DPO and shows its DID before and after."""

from pathlib import Path

from lit_did.models.smollm2 import smollm2

PAIRS = Path(__file__).with_name("pairs.jsonl")
"""160 preference pairs, tagged "open-ended" or "factual"."""

__all__ = ["PAIRS", "smollm2"]
