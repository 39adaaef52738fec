"""Lightning callbacks."""

from lit_did.callbacks.did_monitor import DIDMonitor
from lit_did.callbacks.sample_completions import SampleCompletions

__all__ = ["DIDMonitor", "SampleCompletions"]
