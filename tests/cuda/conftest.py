"""Emulators of the CUDA kernels, each built once a session. Their objects are kept from one session to the next."""

from __future__ import annotations

import fcntl
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests import helpers
from tests.cuda.emulator import CSRC, Emulator, why_not

reason_against = cache(why_not)


@pytest.fixture(autouse=True)
def _accuracy(monkeypatch):
    monkeypatch.setattr(helpers, "UNITS", helpers.CUDA_UNITS)


@pytest.fixture(scope="session")
def build(request, tmp_path_factory) -> Callable[..., Emulator]:
    """build(variant, csrc) -> Emulator; skips where there is no such compiler."""
    store = getattr(request.config, "cache", None)
    folder = store.mkdir("cuda-emulation") if store else tmp_path_factory.mktemp("cuda-emulation")

    @cache
    def built(variant: str, csrc: Path = CSRC) -> Emulator:
        if reason := reason_against(variant):
            pytest.skip(reason)
        with (folder / f"{variant}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # what one process of the test run has compiled, another need not
            return Emulator(variant, folder, csrc)

    return built


@pytest.fixture(scope="session")
def emulator(build) -> Emulator:
    return build("plain")
