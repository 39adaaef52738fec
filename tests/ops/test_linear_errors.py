"""Bad arguments of the linear statistics: the documented exception, naming the argument, what was expected and came."""

from __future__ import annotations

import pytest
import torch

from lit_did import linear_sequence_statistics, linear_token_statistics

HIDDEN, WEIGHT = torch.zeros(2, 3, 4), torch.zeros(5, 4)
GOOD = {
    "policy_hidden": HIDDEN,
    "policy_weight": WEIGHT,
    "reference_hidden": torch.zeros(2, 3, 6),
    "reference_weight": torch.zeros(5, 6),
    "labels": torch.zeros(2, 3, dtype=torch.long),
}

# What is changed in a good call, the exception, its message.
BAD = {
    "hidden not a tensor": ({"policy_hidden": [0.0]}, TypeError, "`policy_hidden` to be a tensor, but got list"),
    "weight not a tensor": ({"reference_weight": None}, TypeError, "`reference_weight` to be a tensor, but got NoneT"),
    "bias not a tensor": ({"policy_bias": 1.0}, TypeError, "`policy_bias` to be a tensor, but got float"),
    "labels not a tensor": ({"labels": None}, TypeError, "`labels` to be a tensor, but got NoneType"),
    "float labels": ({"labels": torch.zeros(2, 3)}, TypeError, "`labels` to be integers, but got torch.float32"),
    "integer hidden": (
        {"policy_hidden": HIDDEN.long(), "policy_weight": WEIGHT.long()},
        TypeError,
        r"`policy_hidden` to be float32, bfloat16, float16 or float64, but got torch.int64",
    ),
    "a weight of another dtype": (
        {"policy_weight": WEIGHT.bfloat16()},
        TypeError,
        r"`policy_weight` to have the dtype of `policy_hidden`, torch.float32, but got torch.bfloat16",
    ),
    "a bias of another dtype": (
        {"reference_bias": torch.zeros(5).double()},
        TypeError,
        r"`reference_bias` to have the dtype of `reference_hidden`, torch.float32, but got torch.float64",
    ),
    "on another device": (
        {"reference_hidden": torch.zeros(2, 3, 6, device="meta")},
        ValueError,
        r"`reference_hidden` on the device of `labels`, cpu, but got meta",
    ),
    "hidden of another shape": (
        {"reference_hidden": torch.zeros(3, 2, 6)},
        ValueError,
        r"`reference_hidden` to have shape \[\.\.\., H\] with the shape of `labels`, \(2, 3\), before H, but got \(3",
    ),
    "scalar hidden": ({"policy_hidden": torch.tensor(0.0)}, ValueError, r"`policy_hidden` to have .* but got \(\)"),
    "another hidden size": (
        {"policy_weight": torch.zeros(5, 6)},
        ValueError,
        r"`policy_weight` to have shape \[V, 4\] with V >= 1, for the last dimension of `policy_hidden`, but got \(5",
    ),
    "no vocabulary": (
        {"policy_weight": WEIGHT[:0]},
        ValueError,
        r"`policy_weight` to have shape \[V, 4\] with V >= 1, .* but got \(0, 4\)",
    ),
    "a weight of one dimension": ({"policy_weight": WEIGHT[0]}, ValueError, r"`policy_weight` .* but got \(4,\)"),
    "another bias": ({"policy_bias": torch.zeros(6)}, ValueError, r"`policy_bias` to have shape \[5\], but got \(6,\)"),
    "another vocabulary": (
        {"reference_weight": torch.zeros(7, 6)},
        ValueError,
        r"`reference_weight` to have the vocabulary of `policy_weight`, 5 entries, but got 7\.",
    ),
    "a label beyond": (
        {"labels": torch.full((2, 3), 5)},
        ValueError,
        r"`labels` to be in \[0, 5\) .* but got 5 at row 0",
    ),
    "a negative label": ({"labels": torch.full((2, 3), -1)}, ValueError, r"`labels` to be in \[0, 5\) .* but got -1"),
    "softcap of 0": ({"softcap": 0.0}, ValueError, r"`softcap` to be positive and finite, but got 0\.0"),
    "softcap as text": (
        {"softcap": "30"},
        TypeError,
        r"`softcap` to be a number or a \(policy, reference\) tuple, .*'30'",
    ),
    "softcap of three": (
        {"softcap": (1.0, 2.0, 3.0)},
        TypeError,
        r"`softcap` to be .* tuple, but got \(1\.0, 2\.0, 3\.0\)",
    ),
    "scale None": (
        {"scale": (1.0, None)},
        TypeError,
        r"`scale` to be a number or a \(policy, reference\) tuple, .*None",
    ),
    "infinite scale": ({"scale": float("inf")}, ValueError, r"`scale` to be positive and finite, but got inf"),
    "scale True": ({"scale": True}, TypeError, r"`scale` to be a number .* but got True"),
    "temperature": ({"temperature": 0.0}, ValueError, r"`temperature` to be in \[1e-30, 1e30\], but got 0\.0"),
    "ignore_index": ({"ignore_index": 1.0}, TypeError, r"`ignore_index` to be an integer, but got 1\.0"),
    "chunk of 0": ({"chunk_tokens": 0}, ValueError, r"`chunk_tokens` to be positive, but got 0"),
    "chunk as text": ({"chunk_tokens": "all"}, TypeError, r"`chunk_tokens` to be an integer or 'auto', but got 'all'"),
    "bytes": ({"max_extra_bytes": 0}, ValueError, r"`max_extra_bytes` to be positive, but got 0"),
    "bytes as a float": (
        {"max_extra_bytes": 1e9},
        TypeError,
        r"`max_extra_bytes` to be an integer or None, but got 1000000000\.0",
    ),
    "backend": (
        {"backend": "fast"},
        ValueError,
        r"`backend` to be one of 'auto', 'fused', 'reference', but got 'fast'",
    ),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("function", [linear_token_statistics, linear_sequence_statistics])
@pytest.mark.parametrize("backend", ["fused", "reference"])
def test_bad_arguments(backend, function, name):
    changed, error, message = BAD[name]
    function(**GOOD, backend=backend)
    with pytest.raises(error, match="Expected " + message):
        function(**GOOD | {"backend": backend} | changed)


def test_too_little_memory():
    """Of one token, the narrowest block of both sides; one byte more is enough."""
    arguments = dict(zip(GOOD, (torch.zeros(9, 4), torch.zeros(700, 4)) * 2, strict=False))
    arguments["labels"] = torch.zeros(9, dtype=torch.long)
    enough = 512 * 2 * 4
    linear_token_statistics(**arguments, max_extra_bytes=enough)
    message = r"Expected `max_extra_bytes` to be at least 4096, for one token and 512 entries .* but got 4095\."
    with pytest.raises(ValueError, match=message):
        linear_token_statistics(**arguments, max_extra_bytes=enough - 1)


@pytest.mark.parametrize(
    ("cu_seqlens", "error", "message"),
    [
        (torch.tensor([0, 2]), ValueError, r"`cu_seqlens` to rise from 0 to the number of tokens, 3, but got \[0, 2\]"),
        (torch.tensor([0.0, 3.0]), TypeError, r"`cu_seqlens` to be an int32 or int64 tensor, but got torch.float32"),
        ([0, 3], TypeError, r"`cu_seqlens` to be an int32 or int64 tensor, but got list"),
    ],
    ids=["short", "float", "list"],
)
def test_bad_offsets(cu_seqlens, error, message):
    packed = {name: value[0] if value.dim() == 3 else value for name, value in GOOD.items()}
    packed["labels"] = GOOD["labels"][0]
    linear_sequence_statistics(**packed, cu_seqlens=torch.tensor([0, 3]))
    with pytest.raises(error, match="Expected " + message):
        linear_sequence_statistics(**packed, cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("given", [[1.0] * 5, 1.0], ids=["unhashable", "hashable"])
def test_the_argument_is_named_under_autocast_too(given):
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(TypeError, match=f"`policy_bias` to be a tensor, but got {type(given).__name__}"),
    ):
        linear_token_statistics(**GOOD, policy_bias=given)


def test_offsets_of_tokens_that_are_not_packed():
    message = r"Expected `policy_hidden` to have shape \[tokens, H\] with `cu_seqlens`, but got \(2, 3, 4\)"
    with pytest.raises(ValueError, match=message):
        linear_sequence_statistics(**GOOD, cu_seqlens=torch.tensor([0, 3]))


def test_a_scalar_label_is_no_sequence():
    one = {
        name: value[0, 0] if name != "policy_weight" and name != "reference_weight" else value
        for name, value in GOOD.items()
    }
    with pytest.raises(ValueError, match=r"Expected `labels` to have shape \[\.\.\., T\], but got \(\)"):
        linear_sequence_statistics(**one)
