"""What a training run has to show: tables and pictures."""

from lit_did.report.held_out import HeldOut, print_table
from lit_did.report.pictures import held_out_picture, training_picture

__all__ = ["HeldOut", "held_out_picture", "print_table", "training_picture"]
