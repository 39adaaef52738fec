"""Enumeration of small models against a recursion in plain Python, and against what is known in closed form."""

from __future__ import annotations

import math

import pytest
import torch

from lit_did.functional.enumeration import enumerate_did


class Tabular:
    """A model with logits of its own after every prefix, so that a mistaken prefix shows."""

    def __init__(
        self, vocab_size: int, max_new_tokens: int, seed: int, base: Tabular | None = None, scale: float = 1.0
    ):
        generator = torch.Generator().manual_seed(seed)
        self.vocab_size = vocab_size
        self.logits = []
        for length in range(max_new_tokens):
            noise = torch.randn(vocab_size**length, vocab_size, generator=generator, dtype=torch.float64)
            self.logits.append(scale * noise + (base.logits[length] if base else 0))

    def __call__(self, prefixes: torch.Tensor) -> torch.Tensor:
        powers = self.vocab_size ** torch.arange(prefixes.shape[1])
        return self.logits[prefixes.shape[1]][(prefixes * powers).sum(1)]


def recursion(policy, reference, max_new_tokens, eos_token_id, prefix=(), pi=1.0, rho=1.0):
    """(completion, pi(y), rho(y)) of every completion that begins with `prefix`."""
    if len(prefix) == max_new_tokens or (prefix and prefix[-1] == eos_token_id):
        return [(prefix, pi, rho)]
    given = torch.tensor([prefix], dtype=torch.long).view(1, len(prefix))
    weights = [[math.exp(x) for x in model(given)[0].tolist()] for model in (policy, reference)]
    rows = []
    for token, (w, v) in enumerate(zip(*weights, strict=True)):
        chances = pi * w / sum(weights[0]), rho * v / sum(weights[1])
        rows += recursion(policy, reference, max_new_tokens, eos_token_id, (*prefix, token), *chances)
    return rows


@pytest.mark.parametrize("eos_token_id", [None, 0, 2])
@pytest.mark.parametrize(("vocab_size", "max_new_tokens"), [(3, 1), (3, 4), (4, 3)])
def test_against_a_recursion(vocab_size, max_new_tokens, eos_token_id):
    reference = Tabular(vocab_size, max_new_tokens, seed=0)
    policy = Tabular(vocab_size, max_new_tokens, seed=1, base=reference)
    exact = enumerate_did(policy, reference, max_new_tokens=max_new_tokens, eos_token_id=eos_token_id)
    rows = recursion(policy, reference, max_new_tokens, eos_token_id)
    rows.sort(key=lambda row: (len(row[0]), row[0]))
    assert [tuple(c[:n]) for c, n in zip(exact.completions.tolist(), exact.lengths, strict=True)] == [
        r[0] for r in rows
    ]
    assert all((c[n:] == -1).all() for c, n in zip(exact.completions, exact.lengths, strict=True))
    assert exact.policy_logprob.exp().tolist() == pytest.approx([pi for _, pi, _ in rows], rel=1e-12)
    assert exact.reference_logprob.exp().tolist() == pytest.approx([rho for _, _, rho in rows], rel=1e-12)
    partition = sum(pi / rho for _, pi, rho in rows)
    did = [pi / rho / partition for _, pi, rho in rows]
    assert float(exact.log_partition) == pytest.approx(math.log(partition), rel=1e-12)
    assert float(exact.entropy) == pytest.approx(-sum(q * math.log(q) for q in did), rel=1e-12)
    assert exact.did_logprob.exp().tolist() == pytest.approx(did, rel=1e-12)
    assert {value.dtype for value in exact[2:]} == {torch.float64}


@pytest.mark.parametrize(("vocab_size", "max_new_tokens", "eos_token_id"), [(5, 7, 0), (8, 5, 3), (6, 6, None)])
def test_probabilities_sum_to_one(vocab_size, max_new_tokens, eos_token_id):
    reference = Tabular(vocab_size, max_new_tokens, seed=0)
    exact = enumerate_did(
        Tabular(vocab_size, max_new_tokens, seed=1, base=reference, scale=2),
        reference,
        max_new_tokens=max_new_tokens,
        eos_token_id=eos_token_id,
    )
    for logprob in (exact.policy_logprob, exact.reference_logprob, exact.did_logprob):
        assert float(logprob.exp().sum()) == pytest.approx(1, rel=1e-12)
    # L(0) = 1, L(n) = 1 + (V - 1) L(n - 1), in closed form.
    v = vocab_size
    expected = v**max_new_tokens if eos_token_id is None else ((v - 1) ** (max_new_tokens + 1) - 1) // (v - 2)
    assert len(exact.completions) == len(exact.completions.unique(dim=0)) == expected


def test_log_partition_is_that_of_the_tokens_where_they_are_independent():
    policy, reference = torch.randn(2, 6, generator=torch.Generator().manual_seed(0)).double().log_softmax(-1)
    exact = enumerate_did(
        lambda prefixes: policy.expand(len(prefixes), 6),
        lambda prefixes: reference.expand(len(prefixes), 6),
        max_new_tokens=4,
    )
    token_did = (policy - reference).softmax(-1)
    assert float(exact.log_partition) == pytest.approx(4 * float((policy - reference).logsumexp(-1)))
    assert float(exact.entropy) == pytest.approx(4 * float(torch.special.entr(token_did).sum()))


def test_models_are_called_once_a_length_with_all_prefixes_that_go_on():
    asked = []

    def model(prefixes):
        asked.append(prefixes.tolist())
        return torch.zeros(len(prefixes), 3)

    enumerate_did(model, Tabular(3, 3, seed=0), max_new_tokens=3, eos_token_id=1)
    assert asked == [[[]], [[0], [2]], [[0, 0], [0, 2], [2, 0], [2, 2]]]


def test_logits_and_log_probabilities_of_any_dtype_are_one():
    reference = Tabular(4, 3, seed=0)
    policy = Tabular(4, 3, seed=1, base=reference)
    exact = enumerate_did(policy, reference, max_new_tokens=3)
    as_log_probabilities = enumerate_did(lambda p: policy(p).log_softmax(-1), reference, max_new_tokens=3)
    in_float32 = enumerate_did(lambda p: policy(p).float() + 7, lambda p: reference(p).float(), max_new_tokens=3)
    assert float(as_log_probabilities.entropy) == pytest.approx(float(exact.entropy), rel=1e-12)
    assert float(in_float32.entropy) == pytest.approx(float(exact.entropy), rel=1e-5)
    assert float(in_float32.policy_logprob.exp().sum()) == pytest.approx(1, rel=1e-12)


def test_a_token_that_the_policy_never_takes():
    never = torch.tensor([[0.0, -torch.inf, 0.0]])
    exact = enumerate_did(lambda p: never.expand(len(p), 3), lambda p: torch.zeros(len(p), 3), max_new_tokens=3)
    assert float(exact.entropy) == pytest.approx(3 * math.log(2))
    assert float(exact.did_logprob.exp().sum()) == pytest.approx(1)


def test_entropy_is_differentiable():
    reference = Tabular(3, 2, seed=0)
    logits = torch.randn(3, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)

    def entropy(logits):
        return enumerate_did(lambda p: reference(p) + logits, reference, max_new_tokens=2, eos_token_id=0).entropy

    assert torch.autograd.gradcheck(entropy, logits)


def uniform(prefixes):
    return torch.zeros(len(prefixes), 4)


def impossible(prefixes):
    return torch.tensor([[0.0, 0.0, -torch.inf, 0.0]]).expand(len(prefixes), 4)


def not_a_number(prefixes):
    return uniform(prefixes) + torch.nan


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"max_new_tokens": 0}, ValueError, "`max_new_tokens` to be an integer of at least 1, but got 0"),
        ({"max_new_tokens": 2.0}, TypeError, "`max_new_tokens` to be an integer of at least 1, but got 2.0"),
        ({"max_new_tokens": None}, TypeError, "`max_new_tokens` to be an integer of at least 1, but got None"),
        ({"eos_token_id": [0]}, TypeError, r"`eos_token_id` to be an integer, but got \[0\]"),
        ({"eos_token_id": 4}, ValueError, r"`eos_token_id` to be in \[0, 4\), but got 4"),
        (
            {"max_new_tokens": 5, "max_completions": 1023},
            ValueError,
            "`max_new_tokens` to leave at most 1,023 completions",
        ),
        (
            {"max_new_tokens": 10**9},
            ValueError,
            "at most 5,000,000 completions .*, but got 1000000000 with a vocabulary of 4",
        ),
        (
            {"max_new_tokens": 5, "eos_token_id": 0, "max_completions": 363},
            ValueError,
            "`max_new_tokens` to leave at most 363",
        ),
        ({"policy": lambda p: 0.0}, TypeError, "`policy` to return a tensor of floats, but got float"),
        ({"reference": lambda p: uniform(p).long()}, TypeError, "`reference` to return .* floats, but got torch.int64"),
        (
            {"policy": lambda p: torch.zeros(1, 4, 1)},
            ValueError,
            r"`policy` to return shape \(1, V\) .* got \(1, 4, 1\)",
        ),
        ({"policy": lambda p: torch.zeros(1, 4)}, ValueError, r"`policy` to return shape \(4, 4\) .* got \(1, 4\)"),
        ({"reference": lambda p: torch.zeros(len(p), 5)}, ValueError, r"`reference` to return shape \(1, 4\) .*5\)"),
        ({"policy": not_a_number}, ValueError, r"`policy` to return numbers .* got \[nan, nan, nan, nan\] after \[\]"),
        ({"reference": impossible}, ValueError, r"`reference` to give every completion .* got 0 for \[0, 2\]"),
    ],
)
def test_errors(change, error, words):
    with pytest.raises(error, match=words):
        enumerate_did(**{"policy": uniform, "reference": uniform, "max_new_tokens": 2, **change})


def test_the_limit_itself_is_allowed():
    assert len(enumerate_did(uniform, uniform, max_new_tokens=5, max_completions=1024).completions) == 1024
    assert (
        len(enumerate_did(uniform, uniform, max_new_tokens=5, eos_token_id=0, max_completions=364).completions) == 364
    )
