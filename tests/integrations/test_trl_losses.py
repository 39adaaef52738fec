"""The preference losses beside TRL's own code: values and gradients, on the same tensors and on the same batches."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

from lit_did import LitDPO
from lit_did.functional import preference_loss
from lit_did.models.batches import read_batch
from tests.integrations.tiny_trl import llama, trainer
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
def test_a_pair_in_the_whole_trainer(loss, options, theirs):
    """From token ids to the loss and the gradient of every weight.

    With one pair, because TRL's NLL is a mean over the batch's tokens and ours one over pairs of means over their own;
    with a prompt of one token, because the NLL of its ORPO takes in the prompt.
    """
    beta = 0.3
    prompt, chosen, rejected = make_pairs(1, seed=7)[0]
    assert 1 < len(rejected) < len(chosen)  # the premise: lengths tell sums from means
    batch = collate([(prompt[:1], chosen, rejected)])
    run, model = theirs(beta), tiny_llama()
    unshifted = torch.where(batch["labels"].roll(1, 1) != -100, batch["input_ids"], -100)
    rows = {
        f"{side}_{name}": value[row : row + 1]
        for row, side in enumerate(("chosen", "rejected"))
        for name, value in (batch | {"labels": unshifted}).items()
    }
    expected, metrics = run.get_batch_loss_metrics(model, rows)
    expected.backward()
    module = LitDPO(tiny_llama(), beta=beta, loss=loss, **options)
    pairs = module.pair_statistics(batch)
    pairs.loss.mean().backward()
    assert pairs.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert pairs.reward_margin.item() == pytest.approx(metrics["rewards/margins"], rel=1e-4)
    for p, q in zip(module.policy.parameters(), model.parameters(), strict=True):
        # float32 through two layers and back
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("loss", "options"),
    [("sigmoid", {}), ("hinge", {}), ("ipo", {}), ("robust", {"label_smoothing": 0.1}), ("robust", {})],
)
def test_a_batch_in_dpo_trainer(tmp_path, loss, options):
    run = trainer(
        tmp_path, llama(0), llama(1), loss_type=loss, beta=0.3, per_device_train_batch_size=6, max_steps=1,
        eval_strategy="no", **options,
    )  # fmt: skip
    batch = next(iter(run.get_train_dataloader()))
    expected = run.compute_loss(run.model, batch)
    expected.backward()
    module = LitDPO(llama(0), llama(1), beta=0.3, loss=loss, **options)
    pairs = module.pair_statistics(read_batch(batch))
    pairs.loss.mean().backward()
    assert pairs.chosen.num_tokens.unique().numel() > 2  # the premise: lengths differ
    assert pairs.loss.mean().item() == pytest.approx(expected.item(), rel=1e-5)
    for p, q in zip(module.policy.parameters(), run.model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-5)
