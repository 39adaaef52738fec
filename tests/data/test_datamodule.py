"""The data module: arguments, stages, splits, batches, what it logs."""

from __future__ import annotations

import gzip
import json
import warnings
from types import SimpleNamespace

import pytest
import torch

from lit_did.data import PreferenceDataModule, UnusableRowError

ROWS = [{"prompt": "a", "chosen": "b" * (n % 3 + 1), "rejected": "c" * (n % 2 + 1)} for n in range(10)]


def _trainer(rank: int) -> SimpleNamespace:
    """What a data module reads of the Trainer of two ranks."""
    kwargs = {"num_replicas": 2, "rank": rank}
    return SimpleNamespace(distributed_sampler_kwargs=kwargs, progress_bar_callback=None)


def _indices(dataset) -> list[int]:
    return [example.index for example in dataset]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_length": 1}, "Expected `max_length` to be an integer of at least 2, but got 1."),
        ({"batch_size": 0}, "Expected `batch_size` to be an integer of at least 1, but got 0."),
        ({"eval_batch_size": 0}, "Expected `eval_batch_size` to be an integer of at least 1, but got 0."),
        ({"num_workers": -1}, "Expected `num_workers` to be an integer of at least 0, but got -1."),
        ({"min_completion_tokens": 1024}, "`min_completion_tokens` to be below `max_length`, 1024, but got 1024."),
        ({"truncation": "right"}, "Expected `truncation` to be one of .* but got 'right'."),
        ({"chat_template_kwargs": {"tokenize": True}}, "Expected `chat_template_kwargs` .* but got `tokenize`"),
        ({"seed": -1}, "Expected `seed` to be an integer of at least 0, but got -1."),
        (
            {"tokens_per_batch": 2047},
            r"Expected `tokens_per_batch` to be an integer of at least 2048 \(2 \* max_length, .*\), but got 2047.",
        ),
        ({"on_bad_rows": "drop"}, "Expected `on_bad_rows` to be one of 'skip', 'raise', but got 'drop'."),
        ({"val_fraction": 1.0}, "Expected `val_fraction` to be in .0, 1., but got 1.0."),
        ({"val_fraction": -0.1}, "Expected `val_fraction` to be in .0, 1., but got -0.1."),
        ({"val_fraction": 0.1, "val": ROWS}, "Expected only one of `val` and `val_fraction`, but got both"),
        ({"val_fraction": 0.1, "train": None}, "Expected `train` for `val_fraction=0.1` to hold rows out of"),
    ],
)
def test_arguments_are_checked(no_specials, arguments, message):
    with pytest.raises(ValueError, match=message):
        PreferenceDataModule(arguments.pop("train", ROWS), no_specials, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokenizer": 5}, "Expected `tokenizer` to be a tokenizer of transformers, its name or path, .* but got int."),
        ({"chat_template": 5}, "Expected `chat_template` to be a Jinja template or None, but got 5."),
        ({"val_fraction": "0.1"}, "Expected `val_fraction` to be an int or a float, but got '0.1'."),
        ({"as_chat": "yes"}, "Expected `as_chat` to be a bool, but got 'yes'."),
        ({"max_length": 2.0}, "Expected `max_length` to be an integer of at least 2, but got 2.0."),
        ({"batch_size": "8"}, "Expected `batch_size` to be an integer of at least 1, but got '8'."),
        ({"batch_size": True}, "Expected `batch_size` to be an integer of at least 1, but got True."),
        ({"truncation": None}, "Expected `truncation` to be one of .*, but got None."),
        ({"columns": "question"}, "Expected `columns` to be a dict such as .* but got 'question'."),
        ({"parse_special_tokens": 1}, "Expected `parse_special_tokens` to be a bool, but got 1."),
        ({"chat_template_kwargs": "a"}, "Expected `chat_template_kwargs` to be a dict or None, but got 'a'."),
        ({"shuffle": None}, "Expected `shuffle` to be a bool, but got None."),
        ({"drop_last": 0}, "Expected `drop_last` to be a bool, but got 0."),
    ],
)
def test_types_of_arguments_are_checked(no_specials, arguments, message):
    with pytest.raises(TypeError, match=message):
        PreferenceDataModule(ROWS, **{"tokenizer": no_specials, **arguments})


def test_what_is_not_there_yet(no_specials):
    with pytest.raises(RuntimeError, match=r"Expected `setup\('fit'\)` before `train_dataloader`"):
        PreferenceDataModule(ROWS, no_specials).train_dataloader()
    with pytest.raises(RuntimeError, match=r"Expected `setup\('predict'\)` before `predict_dataloader`"):
        PreferenceDataModule(ROWS, no_specials).predict_dataloader()
    with pytest.raises(RuntimeError, match=r"Expected `setup\('test'\)` before `test_dataloader`"):
        PreferenceDataModule(ROWS, no_specials).test_dataloader()
    with pytest.raises(FileNotFoundError, match=r"`tokenizer` to be a folder .* but nowhere is not a folder"):
        PreferenceDataModule(ROWS, "./nowhere").setup("fit")


def test_val_fraction_holds_out_the_last_rows(no_specials):
    for fraction, held_out in ((0.3, [7, 8, 9]), (0.01, [9]), (0.26, [7, 8, 9]), (0.9, [1, 2, 3, 4, 5, 6, 7, 8, 9])):
        data = PreferenceDataModule(ROWS, no_specials, val_fraction=fraction)
        data.setup("fit")
        assert _indices(data.val_dataset) == held_out
        assert _indices(data.train_dataset) == [n for n in range(10) if n not in held_out]
    with pytest.raises(ValueError, match=r"rows left after holding out val_fraction=0\.99, but got 10 in all"):
        PreferenceDataModule(ROWS, no_specials, val_fraction=0.99).setup("fit")


@pytest.mark.parametrize(
    ("stage", "arguments", "made"),
    [
        ("fit", {}, "train"),
        ("fit", {"val": ROWS[:2]}, "train val"),
        ("validate", {"val": ROWS[:2]}, "val"),
        ("validate", {"val_fraction": 0.2}, "val"),
        ("test", {"test": ROWS[:4], "val": ROWS[:2]}, "test"),
        ("predict", {"val_fraction": 0.2}, "val predict"),
        ("predict", {"predict": ROWS[:3], "val": ROWS[:2]}, "predict"),
        (None, {}, "train"),
        (None, {"predict": ROWS[:3], "val": ROWS[:2], "test": ROWS[:4]}, "train val test predict"),
        (None, {"train": None, "predict": ROWS[:3]}, "predict"),
    ],
)
def test_setup_makes_what_a_stage_needs_and_once(no_specials, stage, arguments, made):
    data = PreferenceDataModule(arguments.pop("train", ROWS), no_specials, **arguments)
    data.setup(stage)
    datasets = {name: getattr(data, f"{name}_dataset") for name in ("train", "val", "test", "predict")}
    assert [name for name, dataset in datasets.items() if dataset is not None] == made.split()
    if "test" in made:
        assert [len(batch["index"]) for batch in data.test_dataloader()] == [4]
    if "predict" in made:
        assert len(data.predict_dataset) == (3 if "predict" in arguments else 2)
    data.setup(stage)
    assert all(getattr(data, f"{name}_dataset") is dataset for name, dataset in datasets.items())


def test_later_stages_reuse_earlier_datasets(no_specials):
    data = PreferenceDataModule(ROWS, no_specials, val_fraction=0.2)
    data.setup("fit")
    val = data.val_dataset
    data.setup("validate")
    data.setup("predict")
    assert data.val_dataset is val
    assert data.predict_dataset is val


@pytest.mark.parametrize(
    ("stage", "train", "message"),
    [
        ("fit", None, "Expected `train` for fitting, but got None."),
        ("test", ROWS, "Expected `test` for testing, but got None."),
        ("validate", ROWS, "Expected `val` or `val_fraction` for validating, but got neither."),
        ("predict", ROWS, "Expected `predict`, `val` or `val_fraction` for predicting, but got none of them."),
    ],
)
def test_missing_sources_are_named(no_specials, stage, train, message):
    with pytest.raises(ValueError, match=message):
        PreferenceDataModule(train, no_specials).setup(stage)


def test_batches(no_specials):
    data = PreferenceDataModule(ROWS, no_specials, val=ROWS[:5], batch_size=4, eval_batch_size=2, seed=1)
    data.setup()
    batches = list(data.train_dataloader())
    assert [len(batch["index"]) for batch in batches] == [4, 4, 2]
    assert sorted(torch.cat([batch["index"] for batch in batches]).tolist()) == list(range(10))
    for loader in (data.val_dataloader(), data.predict_dataloader()):
        assert [batch["index"].tolist() for batch in loader] == [[0, 1], [2, 3], [4]]
    batch = next(iter(data.val_dataloader()))
    # Row 0: a b / a c; row 1: a bb / a cc. No padding id, so 0.
    assert batch["input_ids"].tolist() == [[0, 1, 0], [0, 1, 1], [0, 2, 0], [0, 2, 2]]
    assert batch["labels"].tolist() == [[1, -100, -100], [1, 1, -100], [2, -100, -100], [2, 2, -100]]


def test_default_batch_sizes(no_specials):
    sizes = [({}, 8, 8), ({"batch_size": 3}, 3, 3), ({"eval_batch_size": 3}, 8, 3)]
    budget = {"tokens_per_batch": 4096}
    sizes += [({**budget}, None, 8), ({**budget, "batch_size": 3}, 3, 3)]
    for arguments, train, evaluation in sizes:
        data = PreferenceDataModule(ROWS, no_specials, **arguments)
        assert (data.batch_size, data.eval_batch_size) == (train, evaluation)


def test_packed_batches(no_specials):
    arguments = {"val": ROWS[:5], "batch_size": 4, "eval_batch_size": 2, "seed": 1}
    packed, padded = (
        PreferenceDataModule(ROWS, no_specials, max_length=50, tokens_per_batch=tokens, **arguments)
        for tokens in (10_000, None)
    )
    packed.setup()
    padded.setup()
    for name in ("val_dataloader", "predict_dataloader"):  # training goes by tokens: see below
        for batch, twin in zip(getattr(packed, name)(), getattr(padded, name)(), strict=True):
            assert batch["input_ids"][0].tolist() == twin["input_ids"][twin["attention_mask"] == 1].tolist()
            assert batch["index"].tolist() == twin["index"].tolist()
    # Row 0: a b / a c; row 1: a bb / a cc.
    batch = next(iter(packed.val_dataloader()))
    assert batch["input_ids"].tolist() == [[0, 1, 0, 1, 1, 0, 2, 0, 2, 2]]
    assert batch["cu_seqlens"].tolist() == [0, 2, 5, 7, 10]


@pytest.mark.parametrize("batch_size", [None, 2])
def test_batches_by_tokens(no_specials, batch_size):
    data = PreferenceDataModule(
        ROWS, no_specials, max_length=8, tokens_per_batch=18, batch_size=batch_size, val=ROWS, seed=1
    )
    data.setup()
    loader = data.train_dataloader()
    batches = list(loader)
    assert len(loader) == len(batches) == (5 if batch_size else 4)  # 55 tokens; 10 pairs
    for batch in batches:
        assert batch["input_ids"].shape[1] == batch["cu_seqlens"][-1] <= 18
        assert len(batch["index"]) <= (batch_size or 10)
    assert sorted(torch.cat([batch["index"] for batch in batches]).tolist()) == list(range(10))
    # Evaluation goes by pairs, in order.
    size = batch_size or 8
    assert [batch["index"].tolist() for batch in data.val_dataloader()] == [
        list(range(start, min(start + size, 10))) for start in range(0, 10, size)
    ]


@pytest.mark.parametrize("kind", ["no_bos", "llama3"])
@pytest.mark.filterwarnings("ignore:.*The pairs are plain text")
def test_padding_id(request, kind):
    tokenizer = request.getfixturevalue(kind)
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c" * 30}]
    data = PreferenceDataModule(rows, tokenizer)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert set(batch["input_ids"][batch["attention_mask"] == 0].tolist()) == {tokenizer.pad_token_id}


def test_drop_last_and_shuffle(no_specials):
    data = PreferenceDataModule(ROWS, no_specials, batch_size=4, drop_last=True, shuffle=False)
    data.setup("fit")
    assert [batch["index"].tolist() for batch in data.train_dataloader()] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    data = PreferenceDataModule(ROWS, no_specials, batch_size=11, drop_last=True)
    data.setup("fit")
    with pytest.raises(ValueError, match=r"Expected at least batch_size \* ranks = 11 training pairs .* but got 10"):
        data.train_dataloader()
    data = PreferenceDataModule(ROWS[:1], no_specials, max_length=8, drop_last=True, tokens_per_batch=16)
    data.trainer = _trainer(rank=0)
    data.setup("fit")
    with pytest.raises(ValueError, match=r"Expected at least ranks = 2 training pairs .* but got 1"):
        data.train_dataloader()


def test_seed_sets_the_training_order(no_specials):
    orders = []
    for seed in (0, 1, 1):
        data = PreferenceDataModule(ROWS, no_specials, batch_size=10, seed=seed)
        data.setup("fit")
        orders.append(next(iter(data.train_dataloader()))["index"].tolist())
    assert orders[0] != orders[1] == orders[2]


def test_workers_are_for_every_loader(no_specials):
    data = PreferenceDataModule(ROWS, no_specials, val=ROWS, num_workers=2)
    data.setup()
    loaders = (data.train_dataloader(), data.val_dataloader(), data.predict_dataloader())
    assert [loader.num_workers for loader in loaders] == [2, 2, 2]


def test_two_ranks(no_specials):
    means, seen = [], []
    for rank in range(2):
        data = PreferenceDataModule(ROWS, no_specials, val=ROWS[:5], batch_size=2)
        data.trainer = _trainer(rank)
        data.setup()
        assert len(data.train_dataloader()) == 3
        batches = list(data.val_dataloader())
        assert [len(batch["index"]) for batch in batches] == [2, 1]
        weight = torch.cat([batch["weight"] for batch in batches])
        index = torch.cat([batch["index"] for batch in batches])
        means.append(((weight * index).sum(), weight.sum()))
        seen += index[weight > 0].tolist()
    assert sorted(seen) == [0, 1, 2, 3, 4]
    assert sum(total for total, _ in means) / sum(weight for _, weight in means) == 2.0  # exactly the mean of 0..4


def test_counts_are_logged_once(no_specials):
    rows = [*ROWS, {"prompt": "a", "chosen": " ", "rejected": "b"}, {"prompt": "a", "chosen": "b", "rejected": " b"}]
    data = PreferenceDataModule(rows, no_specials, max_length=3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data.setup("fit")
        data.setup("fit")
    assert [str(warning.message) for warning in caught] == [
        "train: 1 of 12 rows cannot be trained on and is skipped. 1 with the reason: Expected `chosen` to be "
        "non-empty, but got whitespace. (train, row 10) "
        'Fix the rows, or pass `on_bad_rows="raise"` to stop at the first.',
        "train: 3 of 11 pairs are longer than max_length=3: 0 lost the start of their prompt, 3 the end of a "
        "completion. Raise `max_length`, or choose what is cut with `truncation` and `min_completion_tokens`.",
        "train: 1 of 11 pairs have the same tokens in chosen and rejected, so they carry no preference and DPO learns "
        "nothing from them. Remove them. If only `max_length` made them equal, raise it.",
    ]


def test_unusable_rows_may_raise(no_specials):
    rows = [*ROWS, {"prompt": "a", "chosen": " ", "rejected": "b"}]
    with pytest.raises(UnusableRowError, match="train, row 10: Expected `chosen` to be non-empty, but got whitespace"):
        PreferenceDataModule(rows, no_specials, on_bad_rows="raise").setup("fit")


def test_skipped_rows_belong_to_the_split_they_are_in(no_specials):
    empty = {"prompt": "a", "chosen": "b", "rejected": ""}
    data = PreferenceDataModule([empty, *ROWS[:3], empty, *ROWS[3:], empty], no_specials, val_fraction=0.3)
    with pytest.warns(UserWarning, match="rows cannot be trained on"):
        data.setup("fit")
    assert [row.index for row in data.train_dataset.skipped] == [0, 4]
    assert [row.index for row in data.val_dataset.skipped] == [12]
    assert (data.train_dataset.num_rows, data.val_dataset.num_rows) == (9, 4)


def _warned(data) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data.setup("fit")
    return [str(warning.message) for warning in caught]


def test_plain_text_for_a_chat_model_is_a_warning_once(chatml, no_bos):
    for tokenizer, arguments, count in (
        (chatml, {}, 1),
        (chatml, {"val": ROWS[:2]}, 1),
        (chatml, {"as_chat": True}, 0),
        (chatml, {"parse_special_tokens": True}, 0),  # the text holds the turns
        (no_bos, {}, 0),
    ):
        warned = [
            text for text in _warned(PreferenceDataModule(ROWS, tokenizer, **arguments)) if "`as_chat=True`" in text
        ]
        assert len(warned) == count, arguments
        assert all("plain text, but the tokenizer has a chat template" in text for text in warned)


def test_headers_among_completion_tokens_are_a_warning_once(chatml):
    template = chatml.chat_template.split("{% if add_generation_prompt")[0]  # takes no generation prompt
    data = PreferenceDataModule(ROWS, chatml, val=ROWS[:2], as_chat=True, chat_template=template)
    (warned,) = _warned(data)
    assert r"train: The chat template starts the answers of 10 pairs with '<|im_start|>assistant\n'" in warned
    assert str(chatml.tokenize("<|im_start|>assistant\n")) in warned
    assert "`chat_template_kwargs`" in warned
    assert not _warned(PreferenceDataModule(ROWS, chatml, as_chat=True))


def test_template_kwargs_reach_the_template(chatml):
    template = chatml.chat_template + "{% if add_generation_prompt %}{{ note }}{% endif %}"
    template = template.replace("{{ m['content'] }}", "{{ note if m.role == 'assistant' }}{{ m['content'] }}")
    data = PreferenceDataModule(ROWS, chatml, as_chat=True, chat_template=template, chat_template_kwargs={"note": "ab"})
    assert not _warned(data)
    example = data.train_dataset[0]
    assert chatml.decode(example.prompt_ids).endswith("<|im_start|>assistant\nab")
    assert chatml.decode(example.chosen_ids) == "b<|im_end|>"


def test_repr_is_one_line(no_bos):
    data = PreferenceDataModule(ROWS, no_bos, val="val.jsonl", predict=["a.jsonl", "b.jsonl"], max_length=8)
    rest = "tokenizer='TokenizersBackend', max_length=8, batch_size=8, as_chat=False)"
    text = f"PreferenceDataModule(train=10 rows, val='val.jsonl', predict=2 files, {rest}"
    assert repr(data) == str(data) == text
    data = PreferenceDataModule(iter(ROWS), "gpt2", val_fraction=0.2)
    assert repr(data).startswith("PreferenceDataModule(train=list_iterator, tokenizer='gpt2', max_length=1024")
    data = PreferenceDataModule(ROWS, no_bos, val_fraction=0.2)
    data.setup("fit")
    assert repr(data).startswith("PreferenceDataModule(train=10 rows: 8 pairs, val=2 pairs, ")


@pytest.mark.filterwarnings("ignore:.*The chat template starts the answers")
def test_tokenizer_by_path_template_and_chat(no_bos, chatml, tmp_path):
    no_bos.save_pretrained(tmp_path)
    template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    for path in (str(tmp_path), tmp_path):
        data = PreferenceDataModule(ROWS[:1], path, chat_template=template, as_chat=True)
        data.setup("fit")
        example = data.train_dataset[0]
        assert data.tokenizer.decode(example.prompt_ids) == "[user]a"
        assert data.tokenizer.decode(example.chosen_ids) == "[assistant]b</s>"
    with pytest.raises(ValueError, match="train, row 0: Expected a tokenizer with a chat template"):
        PreferenceDataModule(ROWS, no_bos, as_chat=True).setup("fit")


@pytest.mark.parametrize("name", ["alpacaeval_pairs.jsonl", "hh_rlhf_harmless_test.jsonl.gz"])
@pytest.mark.filterwarnings("ignore:.*4 of 2312 rows cannot be trained on")
def test_real_files(real_data, no_bos, name):
    path = real_data(name)
    open_file = gzip.open if name.endswith(".gz") else open
    with open_file(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    data = PreferenceDataModule(path, no_bos, max_length=100_000, batch_size=4)
    data.setup("fit")
    empty = [number for number, row in enumerate(rows) if row["chosen"].endswith("\n\nAssistant: ")]
    assert len(empty) == (4 if "hh" in name else 0)
    assert [row.index for row in data.train_dataset.skipped] == empty
    assert len(data.train_dataset) == len(rows) - len(empty)
    assert data.train_dataset.num_truncated == 0
    for batch in list(data.train_dataloader())[:10]:
        count = len(batch["index"])
        for place, ids in enumerate(batch["input_ids"]):
            row = rows[batch["index"][place % count]]
            text = no_bos.decode(ids[batch["attention_mask"][place] == 1])
            side = row["chosen"] if place < count else row["rejected"]
            assert text == row.get("prompt", "") + side + "</s>"
            label_ids = batch["labels"][place]
            completion = no_bos.decode(label_ids[label_ids != -100])
            assert text.endswith(completion)
            if "prompt" in row:
                assert completion == side + "</s>"
            else:
                assert text[: -len(completion)].endswith("\n\nAssistant:")
