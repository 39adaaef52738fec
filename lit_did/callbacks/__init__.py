"""Lightning callbacks."""

from lit_did.callbacks.did_monitor import DIDMonitor

__all__ = ["DIDMonitor"]
