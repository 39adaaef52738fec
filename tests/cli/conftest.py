"""Fixtures of the commands' tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.modules.tiny import byte_tokenizer, tiny_llama


@pytest.fixture(scope="session")
def models(tmp_path_factory, tiny_model) -> list[Path]:
    """Folders of two models with one vocabulary, and of a third with another."""
    folders = [tiny_model]
    for seed, size in ((1, len(byte_tokenizer())), (2, 70)):
        folder = tmp_path_factory.mktemp("model")
        byte_tokenizer().save_pretrained(folder)
        tiny_llama(seed, vocab_size=size, max_position_embeddings=512).save_pretrained(folder)
        folders.append(folder)
    return folders
