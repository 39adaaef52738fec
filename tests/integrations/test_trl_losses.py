"""The preference losses beside TRL's own code: values and gradients, on the same tensors and on the same batches."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

from lit_did import LitDPO
from lit_did.batches.reading import read_batch
from lit_did.functional import preference_loss
from tests.integrations.tiny_trl import llama, trainer
from tests.modules.steps import train
from tests.modules.tiny import collate, make_pairs, tiny_llama


def bare(cls: type, **attributes):
    """A trainer that has what its loss reads, and nothing else."""
    run = object.__new__(cls)
    accelerator = SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=lambda value: value)
    defaults = {"accelerator": accelerator, "is_encoder_decoder": False, "aux_loss_enabled": False}
    vars(run).update({**defaults, "pad_token_id": 0, "padding_value": 0, **attributes})
    return run


def cpo(loss_type: str, *, label_smoothing: float = 0.0, gamma: float = 0.5, nll_weight: float = 1.0, beta: float):
    return bare(
        CPOTrainer, loss_type=loss_type, label_smoothing=label_smoothing, simpo_gamma=gamma, cpo_alpha=nll_weight,
        beta=beta, alpha=0.0,
    )  # fmt: skip


# loss: its options, and TRL's trainer with the same
REFERENCE_FREE = [
    ("slic", {}, lambda beta: cpo("hinge", beta=beta)),
    ("slic", {"nll_weight": 0.3}, lambda beta: cpo("hinge", nll_weight=0.3, beta=beta)),
    ("cpo", {}, lambda beta: cpo("sigmoid", beta=beta)),
    ("cpo", {"label_smoothing": 0.1}, lambda beta: cpo("sigmoid", label_smoothing=0.1, beta=beta)),
    ("simpo", {}, lambda beta: cpo("simpo", nll_weight=0.0, beta=beta)),
    (
        "simpo",
        {"gamma": 1.2, "nll_weight": 0.5, "label_smoothing": 0.1},
        lambda beta: cpo("simpo", gamma=1.2, nll_weight=0.5, label_smoothing=0.1, beta=beta),
    ),
    ("orpo", {}, lambda beta: bare(ORPOTrainer, beta=beta)),
]
each = pytest.mark.parametrize(("loss", "options", "theirs"), REFERENCE_FREE)


@each
@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_on_the_same_log_probabilities(loss, options, theirs, beta):
    """What TRL computes of log-probabilities is the loss without its NLL term; for simpo and orpo they are means."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 30, (2, 64), generator=generator)
    logprob = -tokens * 3 * torch.rand(2, 64, generator=generator)
    (ours_in, theirs_in), means = (logprob.clone().requires_grad_() for _ in range(2)), loss in ("simpo", "orpo")
    ours = preference_loss(
        *ours_in, beta=beta, loss=loss, chosen_num_tokens=tokens[0], rejected_num_tokens=tokens[1],
        **{**options, "nll_weight": 0},
    )  # fmt: skip
    run = theirs(beta)
    compared = theirs_in / tokens if means else theirs_in
    # TRL's ORPO returns beta log sigmoid and subtracts it from the NLL
    expected = -run.odds_ratio_loss(*compared)[0] if loss == "orpo" else run.cpo_loss(*compared)[0]
    gradients = [torch.autograd.grad(v.sum(), x)[0] for v, x in ((ours, ours_in), (expected, theirs_in))]
    # float32, sums of up to 90 nats: the same formula in another order
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


@each
@pytest.mark.parametrize("pairs", [1, 5])
def test_a_batch_in_the_whole_trainer(loss, options, theirs, pairs):
    """From token ids to the loss and the gradient of every weight.

    With a prompt of one token, and one pair, for ORPO, because the NLL of TRL's takes in the prompt.
    """
    beta = 0.3
    if loss == "orpo" and pairs > 1:
        options = {**options, "nll_weight": 0}
    rows = [(prompt[:1], chosen, rejected) for prompt, chosen, rejected in make_pairs(pairs, seed=7)]
    assert 1 < len(rows[0][2]) < len(rows[0][1])  # the premise: lengths tell sums from means
    batch = collate(rows)
    run, model = theirs(beta), tiny_llama()
    unshifted = torch.where(batch["labels"].roll(1, 1) != -100, batch["input_ids"], -100)
    rows = {
        f"{side}_{name}": value[half * pairs : (half + 1) * pairs]
        for half, side in enumerate(("chosen", "rejected"))
        for name, value in (batch | {"labels": unshifted}).items()
    }
    expected, metrics = run.get_batch_loss_metrics(model, rows)
    if loss == "orpo" and pairs > 1:  # without its NLL term
        expected = expected - metrics["nll_loss"]
        model, expected = None, expected.detach()
    else:
        expected.backward()
    module = LitDPO(tiny_llama(), beta=beta, loss=loss, **options)
    statistics = module.pair_statistics(batch)
    statistics.loss.mean().backward()
    assert statistics.loss.mean().item() == pytest.approx(expected.item(), rel=1e-5)
    assert statistics.reward_margin.mean().item() == pytest.approx(metrics["rewards/margins"], rel=1e-4)
    if model is None:
        return
    for p, q in zip(module.policy.parameters(), model.parameters(), strict=True):
        # float32 through two layers and back
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-5)


MIXTURE = {"sigmoid": 0.8, "sft": 0.2}


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        *(
            ({"loss": loss}, {"loss_type": loss})
            for loss in ("sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "sft")
        ),
        ({"loss": "robust", "label_smoothing": 0.1}, {"loss_type": "robust", "label_smoothing": 0.1}),
        ({"loss": MIXTURE}, {"loss_type": ["sigmoid", "sft"], "loss_weights": [0.8, 0.2]}),
        ({"nll_weight": 0.3}, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]}),
        (
            {"loss": {"hinge": 0.5, "ipo": 1, "robust": 0.2}, "nll_weight": 0.4, "label_smoothing": 0.1},
            {
                "loss_type": ["hinge", "ipo", "robust", "sft"],
                "loss_weights": [0.5, 1.0, 0.2, 0.4],
                "label_smoothing": 0.1,
            },
        ),
    ],
)
def test_a_batch_in_dpo_trainer(tmp_path, ours, theirs):
    """The loss of a batch, its gradient, and what a training step makes of it: whole, and a pair at a time."""
    run = trainer(
        tmp_path, llama(0), llama(1), beta=0.3, per_device_train_batch_size=6, max_steps=1, eval_strategy="no",
        **{"loss_type": "sigmoid", **theirs},
    )  # fmt: skip
    batch = next(iter(run.get_train_dataloader()))
    expected = run.compute_loss(run.model, batch)
    expected.backward()
    batch = read_batch(batch)
    for parts in (None, 1):
        module = LitDPO(llama(0), llama(1), beta=0.3, micro_batch_tokens=parts, learning_rate=0.0, **ours)
        pairs = module.pair_statistics(batch)
        assert pairs.chosen.num_tokens.unique().numel() > 2  # the premise: lengths differ
        assert pairs.loss.mean().item() == pytest.approx(expected.item(), rel=1e-5)
        record = train(module, DataLoader([batch] * 2, batch_size=None))
        assert record.logged[0]["train/loss"] == pytest.approx(expected.item(), rel=1e-5)
        for gradient, parameter in zip(record.gradients[0], run.model.parameters(), strict=True):
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-3, atol=1e-5)
