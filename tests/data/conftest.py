"""Tiny tokenizers built in memory, one for each habit that the data code must cope with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SENTENCES = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.",
    "What is two plus two? Two plus two is four, of course; not five and not three.",
    "\n\nHuman: Can you tell me how the game is played?\n\nAssistant: Yes, I can tell you how.",
    "user assistant system You are a helpful assistant.\n",
]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


def _byte_level(*specials: str, bos_added: str | None = None, **kwargs) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on SENTENCES; `bos_added` is put before every text by the tokenizer itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(specials), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    if bos_added:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos_added} $A", special_tokens=[(bos_added, tokenizer.token_to_id(bos_added))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **kwargs)


@pytest.fixture(scope="session")
def no_bos() -> PreTrainedTokenizerFast:
    """As GPT-2: no BOS, pad is EOS, no template."""
    return _byte_level("</s>", eos_token="</s>", pad_token="</s>")


@pytest.fixture(scope="session")
def adds_bos() -> PreTrainedTokenizerFast:
    """As Llama 2 base: puts <s> before every text, pad is EOS, no template."""
    return _byte_level("<s>", "</s>", bos_added="<s>", bos_token="<s>", eos_token="</s>", pad_token="</s>")


@pytest.fixture(scope="session")
def chatml() -> PreTrainedTokenizerFast:
    """As SmolLM2: ChatML, BOS is <|im_start|> but not added, pad and EOS are <|im_end|>, followed by a newline."""
    tokenizer = _byte_level("<|im_start|>", "<|im_end|>", bos_token="<|im_start|>", eos_token="<|im_end|>")
    tokenizer.pad_token = "<|im_end|>"
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture(scope="session")
def llama3() -> PreTrainedTokenizerFast:
    """As Llama 3 Instruct: BOS both in the template and added by the tokenizer, EOS is <|eot_id|>."""
    specials = ("<|bos|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|pad|>")
    tokenizer = _byte_level(*specials, bos_added="<|bos|>", bos_token="<|bos|>", eos_token="<|eot_id|>")
    tokenizer.pad_token = "<|pad|>"
    tokenizer.chat_template = LLAMA3
    return tokenizer


@pytest.fixture(scope="session")
def prefix_space() -> PreTrainedTokenizerFast:
    """As SentencePiece: a text encoded alone begins with a space; one token a character, so ids are easy to expect."""
    characters = ["<s>", "</s>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz.?"]
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(characters)}, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="session")
def merging() -> PreTrainedTokenizerFast:
    """Characters f=0 o=1 b=2 a=3 r=4, one merge ob=5, EOS=6; no pre-tokenizer, so that merges cross any boundary."""
    vocab = {"f": 0, "o": 1, "b": 2, "a": 3, "r": 4, "ob": 5, "</s>": 6}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("o", "b")]))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


@pytest.fixture(scope="session")
def no_specials() -> PreTrainedTokenizerFast:
    """Neither BOS nor EOS nor padding; one token a character, spaces left out: a=0 b=1 c=2."""
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2}, unk_token="a"))
    characters = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), characters])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture
def write_jsonl(tmp_path):
    """Writes rows (dicts, or raw lines as str or bytes) to a JSON Lines file and returns its path."""

    def write(*rows, name: str = "pairs.jsonl") -> Path:
        lines = [row if isinstance(row, bytes) else _line(row).encode() for row in rows]
        (tmp_path / name).write_bytes(b"\n".join(lines))
        return tmp_path / name

    return write


def _line(row) -> str:
    return row if isinstance(row, str) else json.dumps(row)
