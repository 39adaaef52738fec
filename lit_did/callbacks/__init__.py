"""Lightning callbacks."""

from lit_did.callbacks.did_monitor import DIDMonitor
from lit_did.callbacks.export_policy import ExportPolicy
from lit_did.callbacks.sample_completions import SampleCompletions
from lit_did.callbacks.score_writer import ScoreWriter

__all__ = ["DIDMonitor", "ExportPolicy", "SampleCompletions", "ScoreWriter"]
