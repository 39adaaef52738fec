"""From a batch of tensors to what a language model is given: reading, checks, layout. Imports no model."""

IGNORE_INDEX = -100
"""The label of a position that predicts no completion token."""
