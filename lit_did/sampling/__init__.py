"""Drawing completions: from token DIDs and towards DPO's target with transformers' `generate`, from the DID by SMC."""

from lit_did.sampling.processors import DIDLogitsProcessor, TargetLogitsProcessor
from lit_did.sampling.sequential import DIDSamples, sample_did

__all__ = ["DIDLogitsProcessor", "DIDSamples", "TargetLogitsProcessor", "sample_did"]
