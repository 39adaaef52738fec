"""Fixtures of several folders."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores; read when torch is imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

# What Lightning writes into the environment.
_OF_RUNS = ("PL_GLOBAL_SEED", "PL_SEED_WORKERS", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NODE_RANK")


@pytest.fixture(autouse=True)
def _no_trace_of_a_run() -> Iterator[None]:
    """Puts the environment back, without a run's seed and ranks, and fails a test that leaves a process group.

    Later tests, and the programs that they start, would take that seed, or take themselves for parts of a distributed
    run. Fixtures of a whole session or module leave traces too, so these names are also removed before a test.
    """
    for name in _OF_RUNS:
        os.environ.pop(name, None)
    before = dict(os.environ)
    yield
    now = os.environ.get("PYTEST_CURRENT_TEST")  # pytest's own
    os.environ.clear()
    os.environ.update(before if now is None else {**before, "PYTEST_CURRENT_TEST": now})
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        distributed.destroy_process_group()
        pytest.fail("The test left a process group.")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A folder with a random Llama and a tokenizer of bytes."""
    from tests.modules.tiny import byte_tokenizer, tiny_llama

    folder = tmp_path_factory.mktemp("model")
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder)
    tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=512).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def real_data() -> Callable[[str], Path]:
    """The path of a public data set, by its name in `tools.preference_data`; without the file, the test is skipped."""
    preference_data = pytest.importorskip("tools.preference_data", reason="the tools are for clones")

    def find(name: str) -> Path:
        try:
            return preference_data.find(name)
        except FileNotFoundError as error:
            pytest.skip(str(error))

    return find
