"""Chat pairs become the template's text, written out by hand; templates that cannot serve are refused with a reason."""

from __future__ import annotations

import re

import pytest

from lit_did.data.pairs import PreferencePair
from lit_did.data.rendering import render_pair

PAIR = PreferencePair(
    [{"role": "user", "content": "hi"}],
    [{"role": "assistant", "content": "fine"}],
    [{"role": "assistant", "content": "no"}],
)


def test_plain_text_is_not_rendered(chatml):
    assert render_pair(PreferencePair("a", " b", " c"), chatml) == ("a", " b", " c", False)


def test_chatml(chatml):
    assert render_pair(PAIR, chatml) == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
        "fine<|im_end|>\n",
        "no<|im_end|>\n",
        True,
    )


def test_llama3(llama3):
    assert render_pair(PAIR, llama3) == (
        "<|bos|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "fine<|eot_id|>",
        "no<|eot_id|>",
        True,
    )


def test_completions_of_several_messages(chatml):
    more = [*PAIR.rejected, {"role": "user", "content": "so"}, {"role": "assistant", "content": "yes"}]
    assert render_pair(PAIR._replace(rejected=more), chatml).rejected == (
        "no<|im_end|>\n<|im_start|>user\nso<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
    )


def test_template_argument_goes_before_the_tokenizers(chatml, no_bos):
    template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    for tokenizer in (chatml, no_bos):
        # No generation prompt in this template: the header belongs to the completion.
        assert render_pair(PAIR, tokenizer, template) == ("[user]hi", "[assistant]fine", "[assistant]no", True)


def test_generation_prompt_that_a_completion_does_not_start_with(no_bos):
    # As DeepSeek-R1: generation opens a thought that finished turns do not show.
    template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant><think>{% endif %}"
    )
    assert render_pair(PAIR, no_bos, template) == ("<user>hi", "<assistant>fine", "<assistant>no", True)


def test_template_that_rewrites_history_is_refused(no_bos):
    template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match=r"that leaves the prompt as it is .* but the prompt '1hi' became '2hi'"):
        render_pair(PAIR, no_bos, template)


def test_missing_template_names_the_remedy(no_bos):
    with pytest.raises(ValueError, match=r"Expected a tokenizer with a chat template .* Pass one to `chat_template`"):
        render_pair(PAIR, no_bos)


def test_messages_that_the_template_refuses(no_bos):
    template = "{% if messages[0]['role'] == 'user' %}{{ raise_exception('system first') }}{% endif %}"
    with pytest.raises(ValueError, match=re.escape("it raised for the roles user, assistant: system first")):
        render_pair(PAIR, no_bos, template)


def test_empty_prompt_needs_a_token_to_start_from(no_bos, no_specials):
    assert render_pair(PreferencePair("", "b", "c"), no_bos).prompt == ""
    with pytest.raises(ValueError, match="Expected a prompt, or a tokenizer with a BOS or EOS token"):
        render_pair(PreferencePair("", "b", "c"), no_specials)
