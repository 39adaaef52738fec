"""`python -m benchmarks`: times the operators and prints how they compare."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks import token_statistics
from benchmarks.harness import show, write_csv


def main() -> None:
    """Parses the command line and runs."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--rows", type=int, default=512, help="tokens")
    add("--vocabulary", type=int, nargs="+", default=[49152], help="vocabulary sizes")
    add("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16", "float16", "float64"])
    add("--contestants", nargs="+", default=["fused", "eager"], choices=["fused", "eager", "reference", "compile"])
    add("--repeats", type=int, default=7, help="timed calls of each")
    add("--csv", type=Path, default=Path("bench_output/token_statistics.csv"), help="where all figures go")
    options = parser.parse_args()
    if token_statistics.BASELINE not in options.contestants:
        parser.error("--contestants must hold fused: the others are compared with it")
    dtypes = [getattr(torch, name) for name in options.dtype]
    results = list(token_statistics.run(options.rows, options.vocabulary, dtypes, options.contestants, options.repeats))
    show(results, token_statistics.BASELINE)
    write_csv(results, options.csv)
    print(f"Written: {options.csv}")


if __name__ == "__main__":
    main()
