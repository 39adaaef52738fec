"""Drawing completions: from token DIDs and towards DPO's target with transformers' `generate`, from the DID by SMC."""

from lit_did.sampling.processors import DIDLogitsProcessor, TargetLogitsProcessor
from lit_did.sampling.prompts import DIDEntropyOfPrompts, MeanOverPrompts, did_entropy_of_prompts, prompt_seed
from lit_did.sampling.sequential import DIDSamples, sample_did

__all__ = [
    "DIDEntropyOfPrompts",
    "DIDLogitsProcessor",
    "DIDSamples",
    "MeanOverPrompts",
    "TargetLogitsProcessor",
    "did_entropy_of_prompts",
    "prompt_seed",
    "sample_did",
]
