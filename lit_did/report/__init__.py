"""Pictures of training runs."""

from lit_did.report.pictures import held_out_picture, training_picture

__all__ = ["held_out_picture", "training_picture"]
