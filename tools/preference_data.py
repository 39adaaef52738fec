"""The preference data that some tests and benchmarks read: where it is, and how to get it.

    python -m tools.preference_data

downloads two public data sets (2 MB) into the folder that the environment variable LIT_DID_DATA names, by default
`shared/data` beside the clone. The licences differ from the project's, so the project does not include the data.
Without it, the tests that need it are skipped.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple


class DataSet(NamedTuple):
    """A public file."""

    what: str
    """what it holds, and its licence"""
    url: str
    sha256: str
    """of what `convert` returns"""
    convert: Callable[[bytes], bytes] = bytes


def pairs_of_annotations(annotations: bytes) -> bytes:
    """The pairs of AlpacaEval's annotations as JSON Lines: the preferred output is `chosen`, ties are left out."""
    lines = []
    for row in json.loads(annotations):
        if row["preference"] not in (1, 2):
            continue
        chosen, rejected = (1, 2) if row["preference"] == 1 else (2, 1)
        pair = {
            "prompt": row["instruction"].strip(),
            "chosen": row[f"output_{chosen}"],
            "rejected": row[f"output_{rejected}"],
            "source": row["dataset"],
            "chosen_model": row[f"generator_{chosen}"],
            "rejected_model": row[f"generator_{rejected}"],
        }
        lines.append(json.dumps(pair, ensure_ascii=False) + "\n")
    return "".join(lines).encode()


ALPACA_EVAL, HH_RLHF = "alpacaeval_pairs.jsonl", "hh_rlhf_harmless_test.jsonl.gz"
DATA_SETS = {
    ALPACA_EVAL: DataSet(
        "the AlpacaEval instructions with two models' answers, judged by GPT-4 (tatsu-lab/alpaca_eval, CC BY-NC 4.0)",
        "https://github.com/tatsu-lab/alpaca_eval/raw/cd543a149df89434d8a54582c0151c0b945c3d20/"
        "results/alpaca-7b/alpaca_eval_gpt4/annotations.json",
        "cdec59c9b02fcc3c86cd4a3b24795e75c4ad458f47625c6ecdb1f00cb1f357aa",
        pairs_of_annotations,
    ),
    HH_RLHF: DataSet(
        "the harmless-base test split of HH-RLHF (anthropics/hh-rlhf, MIT; it contains offensive text)",
        "https://github.com/anthropics/hh-rlhf/raw/354e5c3cb8960630860dd5774a6ac2a58313bf4d/"
        "harmless-base/test.jsonl.gz",
        "ebfaaed21162a4de120ae85366075b34425e2a6303fac59b99555002f7016f03",
    ),
}


def folder() -> Path:
    """Where the files are looked for, and downloaded to."""
    return Path(os.environ.get("LIT_DID_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")


def find(name: str) -> Path:
    """The path of a file of `DATA_SETS`.

    Raises:
        FileNotFoundError: It is not there. The message says what the data is and how to get it.
    """
    path = folder() / name
    if not path.is_file():
        raise FileNotFoundError(
            f"{name} is missing: {DATA_SETS[name].what}. Download it with `python -m tools.preference_data`, or set "
            "LIT_DID_DATA to the folder that holds it."
        )
    return path


def download(name: str) -> Path:
    """Downloads a file of `DATA_SETS`, if it is not there.

    Raises:
        OSError: The download fails.
        ValueError: The content is not what was expected.
    """
    path, data = folder() / name, DATA_SETS[name]
    if path.is_file():
        return path
    with urllib.request.urlopen(data.url, timeout=60) as response:
        content = data.convert(response.read())
    if hashlib.sha256(content).hexdigest() != data.sha256:
        raise ValueError(f"Expected {data.url} to hold {data.what}, but its SHA-256 checksum differs.")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{name}.partial")
    partial.write_bytes(content)
    partial.replace(path)
    return path


if __name__ == "__main__":
    for name in DATA_SETS:
        try:
            print(f"{download(name)}: {DATA_SETS[name].what}")
        except (OSError, ValueError) as error:
            sys.exit(f"error: {name} could not be made from {DATA_SETS[name].url}: {error}")
