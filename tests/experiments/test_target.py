"""The experiment `target`: draws token by token against DPO's optimum over whole completions, by brute force."""

from __future__ import annotations

import csv
import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from lit_did.experiments import __main__ as command
from lit_did.experiments.energy_models import Preferences, population_loss
from lit_did.experiments.target import bigram, compare
from lit_did.sampling import TargetLogitsProcessor


class Bigram(nn.Module):
    """A language model of transformers' kind; token 0 before the first one."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits, requires_grad=False)

    def forward(self, input_ids, attention_mask=None):
        from transformers.modeling_outputs import CausalLMOutputWithPast

        return CausalLMOutputWithPast(logits=self.logits[input_ids])


@pytest.mark.filterwarnings("ignore:.* has no cache of keys and values")
def test_the_processor_is_not_where_dpo_ends():
    beta, vocab_size, length = 0.5, 3, 3
    generator = torch.Generator().manual_seed(0)
    reference, rejected = torch.randn(2, vocab_size, vocab_size, generator=generator, dtype=torch.float64)
    every = list(itertools.product(range(vocab_size), repeat=length))

    def logprob(logits: Tensor) -> Tensor:
        table = logits.log_softmax(-1)
        return torch.tensor([sum(table[a, b] for a, b in itertools.pairwise((0, *y))) for y in every]).double()

    rho, pi_l = logprob(reference), logprob(rejected)
    target = (rho + (rho - pi_l) / beta).log_softmax(0)
    # DPO's loss is stationary at the target, over whole completions.
    logits = target.clone().requires_grad_()
    preferences = Preferences(rho, rho, pi_l, target)
    population_loss(logits.log_softmax(-1), preferences, loss="sigmoid", beta=beta).backward()
    assert logits.grad.abs().max() < 1e-14
    # What the processor draws, from its own log-probabilities.
    processor, drawn = TargetLogitsProcessor(Bigram(rejected), beta=beta), []
    for y in every:
        ids = torch.tensor([[0, *y]])
        steps = [processor(ids[:, : t + 1], reference[ids[:, t]])[0, y[t]] for t in range(length)]
        drawn.append(float(sum(steps)))
    drawn = torch.tensor(drawn).double()
    assert float(drawn.exp().sum()) == pytest.approx(1, abs=1e-6)
    kl = float((drawn.exp() * (drawn - target)).sum())
    found = compare(bigram(reference), bigram(rejected), length, beta=beta, eos_token_id=None)
    assert found["kl"] == pytest.approx(kl, abs=1e-6)
    assert found["kl"] > 0.01
    assert found["kl_reference"] == pytest.approx(float((target.exp() * (target - rho)).sum()), abs=1e-9)
    assert 0 < found["jensen_shannon"] < math.log(2)


def test_quick_run_and_what_it_finds(tmp_path, capsys):
    assert command.main(["target", "--quick", "--output", str(tmp_path)]) == 0
    with (tmp_path / "target.csv").open() as file:
        rows = list(csv.DictReader(file))
    kl = {(row["rejected"], row["T"], row["seed"]): float(row["kl"]) for row in rows}
    assert len(kl) == 3 * 3 * 2
    for (_, length, _), value in kl.items():
        assert (value < 1e-14) == (length == "1")
    for kind in ("another model", "temperature 0.7", "temperature 1.4"):
        assert all(kl[kind, "2", seed] < kl[kind, "3", seed] for seed in "01")
    assert "Found: for completions of one token the two distributions are the same" in capsys.readouterr().out
    assert (tmp_path / "target.png").read_bytes().startswith(b"\x89PNG")
