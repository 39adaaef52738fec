"""Benchmarks: one file a question, all with one harness. `python -m benchmarks --help`."""
