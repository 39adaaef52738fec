"""No test finds what another one left in the environment: see conftest.py."""

from __future__ import annotations

import os

import lightning
import pytest


@pytest.fixture(scope="module")
def _trained() -> None:
    lightning.seed_everything(3, verbose=False)


@pytest.mark.usefixtures("_trained")
@pytest.mark.parametrize("turn", [1, 2])  # the second would see the first one's seed
def test_a_seed_ends_with_its_test(turn):
    assert "PL_GLOBAL_SEED" not in os.environ
    lightning.seed_everything(turn, verbose=False)
    assert os.environ["PL_GLOBAL_SEED"] == str(turn)
