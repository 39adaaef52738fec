"""Fixtures of the LightningModules' tests."""

from __future__ import annotations

import pytest

from tests.modules.tiny import make_pairs


@pytest.fixture
def pairs():
    """Six pairs of uneven lengths."""
    return make_pairs(6)
