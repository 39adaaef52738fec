"""Benchmarks: one file for each question, one harness for all. Begin with `python -m benchmarks --help`."""
