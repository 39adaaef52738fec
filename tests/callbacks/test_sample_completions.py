"""SampleCompletions: the right rows at the right steps, prompts as in the training data, no trace in training."""

from __future__ import annotations

import json

import jsonargparse
import lightning
import peft
import pytest
import torch

from lit_did import LitDPO, LitDPOPG, PreferenceDataModule
from lit_did.callbacks import SampleCompletions
from lit_did.sampling.completing import complete
from tests.modules.steps import Record
from tests.modules.tiny import byte_tokenizer, tiny_llama, trainer

PAIRS = [
    {"prompt": f"What is {i}?", "chosen": f" {i}" * (i % 3 + 1), "rejected": " no" * (i % 2 + 1)} for i in range(8)
]
LORA = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}
TOKENIZER = byte_tokenizer()


def model(seed: int = 0, **options):
    return tiny_llama(seed, vocab_size=len(TOKENIZER), max_position_embeddings=512, **options)


def data(**options) -> PreferenceDataModule:
    return PreferenceDataModule(PAIRS[:6], TOKENIZER, **{"val": PAIRS[6:], "batch_size": 2, "as_chat": True, **options})


def run(folder, callback, module=None, *, source=None, callbacks=(), **options):
    fit = trainer(
        **{"max_epochs": 1, **options},
        default_root_dir=folder,
        callbacks=[*callbacks, callback],
        num_sanity_val_steps=1,
    )
    fit.fit(module or LitDPO(model(), learning_rate=1e-2), datamodule=source or data())
    return fit


def rows(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "completions.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("every_n_steps", "options", "steps"),
    [
        (2, {"max_epochs": 2, "limit_train_batches": 3}, [0, 2, 4, 6]),
        (4, {"max_steps": 5, "max_epochs": 2}, [0, 4, 5]),
        (1, {"accumulate_grad_batches": 2}, [0, 1, 2]),
        (None, {"val_check_interval": 2}, [0, 2, 3]),
    ],
)
def test_steps(tmp_path, every_n_steps, options, steps):
    run(tmp_path, SampleCompletions(["hi", "you"], every_n_steps=every_n_steps, max_new_tokens=4), **options)
    written = rows(tmp_path)
    assert [row["step"] for row in written] == [step for step in steps for _ in range(2)]
    assert [row["prompt"] for row in written] == ["hi", "you"] * len(steps)


@pytest.mark.parametrize("content", ["mine", '{"prompt": "hi", "text": "you"}\n', '{"step": 1}\n'])
def test_a_file_of_something_else_is_left_alone(tmp_path, content):
    (tmp_path / "completions.jsonl").write_text(content)
    with pytest.raises(FileExistsError, match="to be from SampleCompletions"):
        run(tmp_path, SampleCompletions(["hi"], max_new_tokens=2), max_steps=1)
    assert (tmp_path / "completions.jsonl").read_text() == content


class Save(lightning.Callback):
    """A checkpoint after two steps."""

    def __init__(self, path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == 2:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("every_n_steps", [1, None])
def test_a_run_that_is_resumed_ends_with_the_same_rows(tmp_path, every_n_steps):
    """Although it had gone on behind the checkpoint, up to a row that was cut off."""

    def fit(folder, *callbacks, max_steps: int, ckpt_path=None) -> None:
        completions = SampleCompletions(1, every_n_steps=every_n_steps, max_new_tokens=4)
        fit = trainer(
            max_steps=max_steps,
            default_root_dir=folder,
            callbacks=[completions, *callbacks],
            val_check_interval=1,
            num_sanity_val_steps=0,
        )
        fit.fit(LitDPO(model(), learning_rate=3e-2), datamodule=data(), ckpt_path=ckpt_path)

    fit(tmp_path / "whole", Save(tmp_path / "two"), max_steps=5)
    fit(tmp_path / "resumed", max_steps=4)
    with (tmp_path / "resumed" / "completions.jsonl").open("a") as file:
        file.write('{"step": 5, "prom')
    fit(tmp_path / "resumed", max_steps=5, ckpt_path=tmp_path / "two")
    assert rows(tmp_path / "resumed") == rows(tmp_path / "whole")
    fit(tmp_path / "resumed", max_steps=1)  # a new run in the same folder
    assert [row["step"] for row in rows(tmp_path / "resumed")] == [0, 1]


@pytest.mark.parametrize("lora", [None, LORA])
def test_policy_and_reference(tmp_path, lora):
    """Against the models themselves, before training and after it."""
    module = LitDPO(model(), None if lora else model(1), lora=lora, learning_rate=3e-2)
    callback = SampleCompletions(["hi", "a longer one"], max_new_tokens=6)
    ids = [
        TOKENIZER(f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n").input_ids
        for prompt in callback.prompts
    ]

    def texts(of) -> list[str]:
        completions = complete(of, ids, max_new_tokens=6)
        return [TOKENIZER.decode(completion, skip_special_tokens=True) for completion in completions]

    reference = texts(model() if lora else model(1))
    before = texts(module.policy)
    run(tmp_path, callback, module, max_epochs=3)
    after = texts(module.policy)
    written = rows(tmp_path)
    assert [row["policy"] for row in written[:2]] == before
    assert [row["policy"] for row in written[-2:]] == after
    assert [row["reference"] for row in written] == reference * (len(written) // 2)
    assert before != after  # the premise
    assert before != reference


def test_an_adapter_as_the_reference(tmp_path):
    """The adapter as it was before training answers, not the model without it."""
    policy = peft.get_peft_model(model(), peft.LoraConfig(**LORA))
    run(tmp_path, SampleCompletions(2), LitDPO(policy, "adapter", learning_rate=3e-2), max_epochs=3)
    first, last = rows(tmp_path)[:2], rows(tmp_path)[-2:]
    assert [row["reference"] for row in last] == [row["policy"] for row in first]
    assert [row["policy"] for row in last] != [row["policy"] for row in first]  # the premise
    run(tmp_path / "base", SampleCompletions(2), LitDPO(model(), learning_rate=3e-2))
    assert [row["reference"] for row in rows(tmp_path / "base")[:2]] != [row["reference"] for row in first]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (LitDPO, {}),
        (LitDPO, {"lora": LORA, "gradient_checkpointing": True}),
        (LitDPO, {"lora": {**LORA, "lora_dropout": 0.3}, "disable_dropout": False, "recompute_elementwise": True}),
        (LitDPOPG, {"lora": LORA}),
    ],
)
@pytest.mark.filterwarnings("ignore:The policy has dropout")
def test_training_is_the_same_to_the_bit(tmp_path, kind, options):
    results = []
    for callbacks in ([], [SampleCompletions(every_n_steps=1, max_new_tokens=4)]):
        record = Record()
        fit = trainer(max_epochs=2, default_root_dir=tmp_path, callbacks=[record, *callbacks], num_sanity_val_steps=0)
        module = kind(model(attention_dropout=0.3), learning_rate=1e-2, **options)
        fit.fit(module, datamodule=data())
        results.append((record, [part.training for part in module.policy.modules()]))
    (without, modes), (with_it, modes_with_it) = results
    assert len(rows(tmp_path)) == 7 * 2
    assert without.logged == with_it.logged
    assert modes == modes_with_it
    for mine, theirs in zip([*without.gradients, without.weights], [*with_it.gradients, with_it.weights], strict=True):
        assert all(map(torch.equal, mine, theirs))


@pytest.mark.parametrize("as_chat", [True, False])
def test_prompts_are_rendered_as_the_training_data(tmp_path, as_chat):
    """The same token ids as the data set's, for a text, and for the prompts of the pairs themselves."""
    source = data(as_chat=as_chat)
    by_text, by_number = (
        SampleCompletions(["What is 6?", "What is 7?"], max_new_tokens=2),
        SampleCompletions(2, max_new_tokens=2),
    )
    run(tmp_path / "a", by_text, source=source)
    run(tmp_path / "b", by_number, source=source)
    expected = [source.val_dataset[i].prompt_ids.tolist() for i in range(2)]
    assert by_text._token_ids == by_number._token_ids == expected
    assert (TOKENIZER.bos_token_id in expected[0]) == as_chat  # the premise
    first, second = rows(tmp_path / "a"), rows(tmp_path / "b")
    assert [row["policy"] for row in first] == [row["policy"] for row in second]
    assert "What is 6?" in second[0]["prompt"]


def test_pairs_that_are_chats_make_texts_chats(tmp_path):
    """Without `as_chat`; messages are a prompt too."""
    say = lambda role, text: [{"role": role, "content": text}]  # noqa: E731
    chats = [{n: say("user" if n == "prompt" else "assistant", t) for n, t in pair.items()} for pair in PAIRS]
    source = PreferenceDataModule(chats, TOKENIZER, batch_size=4)
    callback = SampleCompletions([{"prompt": "What is 6?"}, {"prompt": say("user", "What is 6?")}], max_new_tokens=2)
    run(tmp_path, callback, source=source)
    first, second = callback._token_ids
    assert first == second
    assert TOKENIZER.bos_token_id in first
    plain = SampleCompletions(["What is 6?"], max_new_tokens=2, as_chat=False)
    run(tmp_path, plain, source=source)
    assert TOKENIZER.bos_token_id not in plain._token_ids[0]


@pytest.mark.parametrize(
    ("name", "text"),
    [("a.txt", "hi\n\nyou\n"), ("a.jsonl", '{"prompt": "hi"}\n{"prompt": "you", "chosen": "a", "rejected": "b"}\n')],
)
def test_prompts_in_a_file(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    run(tmp_path, SampleCompletions(str(tmp_path / name), max_new_tokens=2))
    assert [row["prompt"] for row in rows(tmp_path)] == ["hi", "you"] * 2


def test_without_a_reference_there_is_no_column(tmp_path):
    run(tmp_path, SampleCompletions(1, max_new_tokens=2), LitDPO(model(), loss="simpo", learning_rate=1e-2))
    assert {frozenset(row) for row in rows(tmp_path)} == {frozenset(["step", "prompt", "policy"])}


def test_a_cached_reference_answers_before_it_is_freed(tmp_path):
    module = LitDPO(model(), model(1), cache_reference=tmp_path / "cache", learning_rate=1e-2)
    run(tmp_path, SampleCompletions(1, max_new_tokens=2), module)
    assert {"reference"} < set(rows(tmp_path)[-1])


@pytest.mark.parametrize(
    "prompts", [3, ["hi", "you"], "prompts.txt", [{"prompt": [{"role": "user", "content": "hi"}]}]]
)
def test_prompts_in_a_recipe(prompts):
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--callback", type=SampleCompletions)
    given = {"class_path": "lit_did.callbacks.SampleCompletions", "init_args": {"prompts": prompts}}
    assert parser.parse_object({"callback": given}).callback.init_args.prompts == prompts


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"prompts": 0}, "Expected `prompts` to be an integer of at least 1"),
        ({"prompts": 1.5}, "Expected `prompts` to be a number, a file or a list"),
        ({"every_n_steps": 0}, "Expected `every_n_steps` to be an integer of at least 1"),
        ({"max_new_tokens": 0}, "Expected `max_new_tokens` to be an integer of at least 1"),
    ],
)
def test_wrong_arguments(arguments, error):
    with pytest.raises((TypeError, ValueError), match=error):
        SampleCompletions(**arguments)


@pytest.mark.parametrize(
    ("prompts", "source", "error"),
    [
        (2, {"val": None}, "Expected a `PreferenceDataModule` that validates with `prompts=2`"),
        ("prompts.txt", {}, "prompts.txt: Expected prompts, but got none"),
        ("prompts.jsonl", {}, "prompts.jsonl, line 1: Expected"),
        ("missing.txt", {}, "missing.txt"),
    ],
)
def test_prompts_that_cannot_be_used(tmp_path, prompts, source, error, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("\n")
    (tmp_path / "prompts.jsonl").write_text('{"chosen": "a"}\n')
    with pytest.raises((ValueError, FileNotFoundError), match=error):
        run(tmp_path, SampleCompletions(prompts), source=data(**source))


def test_without_a_tokenizer(tmp_path):
    source = data()
    source.setup("fit")
    fit = trainer(max_epochs=1, default_root_dir=tmp_path, callbacks=[SampleCompletions(["hi"])])
    with pytest.raises(ValueError, match="Expected `tokenizer` to be given"):
        fit.fit(LitDPO(model(), learning_rate=1e-2), source.train_dataloader())
