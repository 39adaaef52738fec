"""Chat pairs become the template's text, written out by hand; unsuitable templates are refused with a reason."""

from __future__ import annotations

import copy
import re

import pytest

from lit_did.data.pairs import PreferencePair, UnusableRowError, parse_pair
from lit_did.data.rendering import RenderedPair, Renderer
from lit_did.data.tokenizing import tokenize_pair

PAIR = PreferencePair(
    [{"role": "user", "content": "hi"}],
    [{"role": "assistant", "content": "fine"}],
    [{"role": "assistant", "content": "no"}],
)


def render_pair(pair: PreferencePair, tokenizer, chat_template: str | None = None, **options) -> RenderedPair:
    return Renderer(tokenizer, chat_template, **options)(pair)


def _texts(pair: RenderedPair) -> tuple[str, ...]:
    assert len(pair.chosen.pieces) == len(pair.rejected.pieces) == 1
    return pair.prompt, pair.chosen.pieces[0], pair.rejected.pieces[0]


def test_plain_text_is_not_rendered(chatml):
    pair = render_pair(PreferencePair("a", " b", " c"), chatml)
    assert _texts(pair) == ("a", " b", " c")
    assert not pair.is_chat
    assert not pair.chosen.ended


def test_chatml(chatml):
    pair = render_pair(PAIR, chatml)
    assert _texts(pair) == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
        "fine<|im_end|>",
        "no<|im_end|>",
    )
    assert pair.is_chat
    assert pair.chosen.ended
    assert not pair.header


def test_llama3(llama3):
    assert _texts(render_pair(PAIR, llama3)) == (
        "<|bos|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "fine<|eot_id|>",
        "no<|eot_id|>",
    )


TURN = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}END{% endfor %}"
ADDED = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


@pytest.mark.parametrize(
    ("end", "answer", "completion", "ended"),
    [
        ("<|im_end|>\n", "a", "a<|im_end|>", True),
        ("<|im_end|>", "a", "a<|im_end|>", True),
        (" <|im_end|> \n", "a", "a <|im_end|>", True),
        ("<|im_end|>\n<|im_end|>\n", "a", "a<|im_end|>", True),  # EOS once
        ("<|end|>\n", "a", "a<|end|>", True),  # not EOS
        ("<|end|>\n<|im_end|>", "a", "a<|end|>\n<|im_end|>", True),  # the template's own, as it is
        ("[/turn]\n", "a", "a[/turn]", True),  # no token, but an end
        ("[/turn]\n", "n]", "n][/turn]", True),
        ("", "a", "a", False),
        ("\n\n", "a\n", "a\n\n\n", False),
        ("\n", "a<|end|>", "a\U000f0000<|end|>\U000f0001\n", False),  # the answer's own text ends no turn
    ],
)
def test_a_completion_ends_where_the_template_ends_the_turn(chatml, end, answer, completion, ended):
    tokenizer = copy.deepcopy(chatml)  # EOS is <|im_end|>
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|end|>"]})
    pair = PAIR._replace(chosen=[{"role": "assistant", "content": answer}])
    assert render_pair(pair, tokenizer, TURN.replace("END", end) + ADDED).chosen == ((completion,), ended)


USER, MORE = {"role": "user", "content": "so"}, {"role": "assistant", "content": "yes"}
TOOL = {"role": "tool", "content": "4"}


@pytest.mark.parametrize(
    ("messages", "pieces"),
    [
        ([USER, MORE], ("no<|im_end|>", "\n<|im_start|>user\nso<|im_end|>\n<|im_start|>assistant\n", "yes<|im_end|>")),
        ([TOOL, MORE], ("no<|im_end|>", "\n<|im_start|>tool\n4<|im_end|>\n<|im_start|>assistant\n", "yes<|im_end|>")),
        ([MORE], ("no<|im_end|>", "\n<|im_start|>assistant\n", "yes<|im_end|>")),
        ([USER], ("no<|im_end|>",)),  # nothing to score follows
    ],
)
def test_only_the_assistants_turns_are_scored(chatml, messages, pieces):
    pair = render_pair(PAIR._replace(rejected=[*PAIR.rejected, *messages]), chatml)
    assert pair.rejected == (pieces, True)
    assert pair.chosen == (("fine<|im_end|>",), True)
    assert pair.prompt.endswith("<|im_start|>assistant\n")


def test_completions_that_start_with_another_role(chatml):
    pair = render_pair(PAIR._replace(chosen=[USER, MORE]), chatml)
    assert pair.prompt == "<|im_start|>user\nhi<|im_end|>\n"
    assert pair.chosen.pieces == (
        "", "<|im_start|>user\nso<|im_end|>\n<|im_start|>assistant\n", "yes<|im_end|>"
    )  # fmt: skip
    assert pair.rejected.pieces == ("", "<|im_start|>assistant\n", "no<|im_end|>")


def test_turns_where_the_last_is_rendered_otherwise(no_bos):
    several = PAIR._replace(rejected=[*PAIR.rejected, USER, MORE])
    # As Phi-3: EOS closes the conversation. As Qwen3: only the last answer has a thought.
    closes = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
        "{{ '[assistant]' if add_generation_prompt else '</s>' }}"
    )
    thinks = (
        "{% for m in messages %}[{{ m.role }}]{{ '<t></t>' if loop.last and m.role == 'assistant' }}"
        "{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    between = "[user]so</s>[assistant]"
    assert render_pair(several, no_bos, closes).rejected.pieces == ("no</s>", between, "yes</s>")
    assert render_pair(several, no_bos, thinks).rejected.pieces == ("no</s>", between, "<t></t>yes</s>")
    counts = "{% for m in messages %}[{{ m.role }}]{{ loop.revindex if loop.index > 1 }}{{ m.content }}</s>{% endfor %}"
    with pytest.raises(UnusableRowError, match="keeps the text of earlier messages when others follow"):
        render_pair(several, no_bos, counts)


def test_calls_of_tools_end_where_the_template_ends_turns(no_bos):
    # As Qwen3: the last answer starts with an empty thought, the turns before have none.
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ '<t></t>' if loop.last and m.role == 'assistant' }}"
        "{{ m.tool_calls[0].name if m.tool_calls }}{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    for name, pieces in (("add", ("add</s>", "[tool]4</s>[assistant]", "<t></t>yes</s>")), ("</s>", None)):
        call = {"role": "assistant", "content": "", "tool_calls": [{"name": name}]}
        pair = PAIR._replace(chosen=[call, TOOL, MORE])
        if pieces:
            assert render_pair(pair, no_bos, template).chosen.pieces == pieces
        else:  # the row's own "</s>" ends no turn
            with pytest.raises(UnusableRowError, match="keeps the text of earlier messages"):
                render_pair(pair, no_bos, template)


def test_templates_that_take_content_as_parts(no_bos):
    template = (
        "{% for m in messages %}[{{ m.role }}]{% for part in m.content %}{{ part.text }}{% endfor %}</s>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    pair = render_pair(PAIR, no_bos, template)
    assert _texts(pair) == ("[user]hi</s>[assistant]", "fine</s>", "no</s>")
    parts = [{"role": "assistant", "content": [{"type": "text", "text": "fine"}]}]
    assert render_pair(PAIR._replace(chosen=parts), no_bos, template) == pair


def test_template_argument_goes_before_the_tokenizers(chatml, no_bos):
    template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    for tokenizer in (chatml, no_bos):
        # No generation prompt in this template: the header belongs to the completion.
        pair = render_pair(PAIR, tokenizer, template)
        assert _texts(pair) == ("[user]hi", "[assistant]fine", "[assistant]no")
        assert pair.header == "[assistant]"


def test_generation_prompt_that_a_completion_does_not_start_with(no_bos):
    # As DeepSeek-R1: generation opens a thought that finished turns do not show.
    template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'].split('</t>')[-1] }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant><think>{% endif %}"
    )
    pair = render_pair(PAIR, no_bos, template)
    assert _texts(pair) == ("<user>hi", "<assistant>fine", "<assistant>no")
    assert pair.header == "<assistant>"
    thought = [{"role": "assistant", "content": "<t>hm</t>fine"}]
    assert render_pair(PAIR._replace(chosen=thought), no_bos, template).header == "<assistant>"


THINK = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}<t></t>{% endif %}{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if not thinks %}<t></t>{% endif %}{% endif %}"
)


@pytest.mark.parametrize("answers", [("fine", "no"), ("t", "t"), (" fine", "fine day"), ("same", "same")])
def test_empty_thoughts_are_noticed_and_template_kwargs_mend_them(no_bos, answers):
    chosen, rejected = ([{"role": "assistant", "content": text}] for text in answers)
    pair = PAIR._replace(chosen=chosen, rejected=rejected)
    thinking = render_pair(pair, no_bos, THINK, chat_template_kwargs={"thinks": True})
    assert thinking.header == "<t></t>"
    assert thinking.prompt == "<user>hi<assistant>"
    row = pair._replace(chat_template_kwargs={"thinks": False})  # the row's own go before
    mended = render_pair(row, no_bos, THINK, chat_template_kwargs={"thinks": True})
    assert (mended.prompt, mended.chosen.pieces[0]) == ("<user>hi<assistant><t></t>", answers[0])
    assert mended.header == ""


def test_thoughts_that_the_row_holds_are_no_header(no_bos):
    template = "{% for m in messages %}<{{ m.role }}>{{ m.reasoning_content }}{{ m.content }}{% endfor %}" + (
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    answers = ([{"role": "assistant", "content": text, "reasoning_content": "hm"}] for text in ("fine", "no"))
    pair = render_pair(PreferencePair(PAIR.prompt, *answers), no_bos, template)
    assert pair.chosen.pieces == ("hmfine",)
    assert pair.header == ""
    opened = template.replace("<assistant>{% endif", "<assistant><t>{% endif")  # no completion starts with this
    answers = ([{"role": "assistant", "content": text, "reasoning_content": "hm"}] for text in ("fine", "no"))
    assert render_pair(PreferencePair(PAIR.prompt, *answers), no_bos, opened).header == "<assistant>"


def test_plain_dialogues_that_differ_before_their_last_turn(no_bos):
    first = "\n\nHuman: hi\n\nAssistant:"
    row = {"chosen": f"{first} yes\n\nHuman: so\n\nAssistant: fine", "rejected": f"{first} no\n\nHuman: then?"}
    pair = render_pair(parse_pair(row), no_bos)
    assert pair.prompt == first
    assert pair.chosen == ((" yes", "\n\nHuman: so\n\nAssistant:", " fine"), False)
    tokens = tokenize_pair(row, no_bos, 512)
    assert no_bos.decode(tokens.chosen_ids) == " yes fine</s>"
    assert no_bos.decode(tokens.chosen_context.ids) == "\n\nHuman: so\n\nAssistant:"
    assert (no_bos.decode(tokens.rejected_ids), tokens.rejected_context) == (" no</s>", None)
    # Beside a prompt, what an answer spells is the answer's.
    explicit = {"prompt": first, "chosen": " yes\n\nHuman: so\n\nAssistant: fine", "rejected": " no"}
    assert render_pair(parse_pair(explicit), no_bos).chosen.pieces == (explicit["chosen"],)


def test_tools_reach_the_template(chatml):
    template = "{% if tools %}[{{ tools[0].name }}]{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}"
    assert render_pair(PAIR._replace(tools=[{"name": "add"}]), chatml, template).prompt == "[add]hi"


@pytest.mark.parametrize("name", ["tokenize", "add_generation_prompt", "continue_final_message"])
def test_template_kwargs_that_are_not_the_templates(chatml, name):
    with pytest.raises(ValueError, match=f"Expected `chat_template_kwargs` to be variables .* but got `{name}`"):
        render_pair(PAIR, chatml, chat_template_kwargs={name: True})
    with pytest.raises(ValueError, match=f"but got `{name}`"):
        render_pair(PAIR._replace(chat_template_kwargs={name: True}), chatml)
    with pytest.raises(TypeError, match="Expected `chat_template_kwargs` to be a dict or None, but got"):
        render_pair(PAIR, chatml, chat_template_kwargs=[name])


def test_template_that_rewrites_history_is_refused(no_bos):
    template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match=r"that keeps the text of the prompt .* but the prompt '1hi' became '2hi'"):
        render_pair(PAIR, no_bos, template)


def test_missing_template_names_the_remedy(no_bos):
    with pytest.raises(ValueError, match=r"Expected a tokenizer with a chat template .* Pass one to `chat_template`"):
        render_pair(PAIR, no_bos)


def test_messages_that_the_template_refuses(no_bos):
    template = "{% if messages[0]['role'] == 'user' %}{{ raise_exception('system first') }}{% endif %}"
    with pytest.raises(UnusableRowError, match=re.escape("it raised for the roles user, assistant: system first")):
        render_pair(PAIR, no_bos, template)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ messages[0].content + 1 }}", "TypeError: can only concatenate str"),
        ("{{ messages[0].name.first }}", "UndefinedError: "),
        ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
        ("{{ messages.append(1) }}", "SecurityError: "),
    ],
)
def test_errors_inside_a_template_are_the_rows(no_bos, template, reason):
    with pytest.raises(UnusableRowError, match=f"it raised for the roles user, assistant: {reason}"):
        render_pair(PAIR, no_bos, template)


def test_a_template_that_is_no_template(no_bos):
    with pytest.raises(
        ValueError, match="Expected the chat template to be valid Jinja, but got an error in its line 2"
    ):
        render_pair(PAIR, no_bos, "\n{% for %}")


def test_empty_prompt_needs_a_token_to_start_from(no_bos, no_specials):
    assert render_pair(PreferencePair("", "b", "c"), no_bos).prompt == ""
    with pytest.raises(ValueError, match="Expected a prompt, or a tokenizer with a BOS or EOS token"):
        render_pair(PreferencePair("", "b", "c"), no_specials)
