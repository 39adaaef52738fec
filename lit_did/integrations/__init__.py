"""Other trainers: `lit_did.integrations.trl`, for TRL's DPOTrainer and the Trainer of transformers."""
