"""Callbacks for other trainers: `lit_did.integrations.trl` for TRL and the Trainer of transformers."""
