"""LitDPO's step: packed, with shared prompts and in parts; the same numbers as padded and whole, and less memory."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision, Precision
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor

from lit_did import LitDPO, LitDPOPG
from lit_did.batches.sequences import read_sequences
from lit_did.functional import LOSSES, REFERENCE_FREE_LOSSES
from tests.models.architectures import double, true_statistics
from tests.modules.steps import OPTIMISER, PLAIN, SWITCHES, assert_same, examples, loader, make, train
from tests.modules.tiny import tiny_llama, trainer


@pytest.mark.parametrize("loss", LOSSES)
def test_switches_change_no_number(loss):
    free = loss in REFERENCE_FREE_LOSSES
    options = {"loss": loss} if free else {"loss": loss, "token_did_entropy_weight": 0.3}
    limits = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05}

    def run(**switches):
        module = LitDPO(tiny_llama(0), None if free else tiny_llama(1), **OPTIMISER, **options, **switches)
        return train(module, loader(8, 2), **limits)

    expected = run(**PLAIN)
    assert max(g.norm() for g in expected.gradients[0]) > 0.05  # the premise: clipping happens
    for switches in SWITCHES if loss == "sigmoid" else SWITCHES[2:4]:
        assert_same(run(**switches), expected)


@pytest.mark.parametrize("switches", SWITCHES[2:4])
def test_the_gradient_of_float64(switches):
    module = make(token_did_entropy_weight=0.3, **switches)
    batch = next(iter(loader()))
    policy, reference = double(module.policy), double(module.reference)
    truth = true_statistics(policy, reference, read_sequences(batch))
    margin = 0.1 * (truth.log_ratio[:4] - truth.log_ratio[4:])
    entropy = (truth.token_did_entropy * truth.num_tokens).sum() / truth.num_tokens.sum()
    (torch.log1p((-margin).exp()).mean() - 0.3 * entropy).backward()
    record = train(module)
    for gradient, parameter in zip(record.gradients[0], policy.parameters(), strict=True):
        expected = parameter.grad
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_parts_in_bfloat16():
    def run(**switches):
        module, precisions = make(**switches), []
        module.policy.model.layers[0].register_forward_hook(  # not of the trial, in eval mode
            lambda layer, *_: precisions.append(torch.is_autocast_enabled("cpu")) if layer.training else None
        )
        record = train(module, precision="bf16-mixed")
        assert set(precisions) == {True}  # in every part
        return record

    runs = [run(**switches) for switches in (PLAIN, *SWITCHES[:4])]
    exact = train(make(**PLAIN))
    for record in runs:
        for a, b in zip(record.gradients[0], exact.gradients[0], strict=True):
            # bfloat16 keeps 8 bits: what is seen is that no part is lost, or counted twice
            assert (a - b).norm() < 0.1 * b.norm()
        assert record.logged[0]["train/loss"] == pytest.approx(exact.logged[0]["train/loss"], rel=0.02)


def test_the_gradient_scaler_reaches_every_part(monkeypatch):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    monkeypatch.setattr(MixedPrecision, "autocast_context_manager", lambda self: torch.autocast("cpu", enabled=False))
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    expected = train(make(**PLAIN))
    assert_same(train(make(micro_batch_tokens=1), plugins=[plugin]), expected)


def test_the_projected_gradient_of_micro_batches_is_that_of_the_whole_batch():
    whole, parts = (train(make(LitDPOPG, micro_batch_tokens=tokens)) for tokens in (None, 1))
    assert_same(parts, whole)
    assert "train/gradient_cosine" in whole.logged[0]


class Held:
    """A tensor that a backward pass waits for; `bytes` of all of them, and the most there were."""

    bytes = most = 0

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.size = 0 if tensor.is_leaf and tensor.requires_grad else tensor.nbytes
        Held.bytes += self.size
        Held.most = max(Held.most, Held.bytes)

    def __del__(self) -> None:
        Held.bytes -= self.size


def test_activations_of_one_part_are_held_at_a_time():
    most, seen = {}, {}
    lengths = [len(e.prompt_ids) + max(len(e.chosen_ids), len(e.rejected_ids)) for e in examples()]
    for tokens in (None, 70, 1):
        module = make(**{**PLAIN, "padding_free": True, "micro_batch_tokens": tokens})
        calls = seen[tokens] = []
        train(module)  # finds out what the models allow
        module.policy.get_input_embeddings().register_forward_hook(lambda m, i, o, c=calls: c.append(i[0].numel()))
        Held.most = 0
        with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
            train(module)
        most[tokens] = Held.most
        assert Held.bytes == 0
    assert len(seen[None]) == 2
    assert len(seen[1]) == 8
    assert 2 < len(seen[70]) < 8
    assert max(seen[70]) <= 70 < 2 * max(lengths) * 4
    assert sum(seen[None]) == sum(seen[70]) == sum(seen[1])  # nothing twice
    # What a part holds goes with its tokens, weights' views and masks aside.
    for tokens in (70, 1):
        assert most[tokens] < 1.3 * most[None] * max(seen[tokens]) / max(seen[None])


@pytest.mark.parametrize("arguments", [((), {"retain_graph": True}), ((None,), {})])
def test_arguments_of_the_backward_pass_are_refused(arguments):
    class Retains(LitDPO):
        def backward(self, loss, *args, **kwargs):
            super().backward(loss, *arguments[0], **arguments[1])

    with pytest.raises(
        TypeError, match=r"backward\(\) (got an unexpected keyword argument 'retain_graph'|takes 2 positional)"
    ):
        train(make(Retains))


def test_no_gradients_are_held_through_a_forward_pass():
    module, held = make(micro_batch_tokens=None), []
    parameters = list(module.policy.parameters())
    module.policy.get_input_embeddings().register_forward_hook(
        lambda *_: held.append(sum(p.grad is not None for p in parameters))
    )
    train(module)  # finds out what the models allow
    held.clear()
    train(module, loader(12, 2), accumulate_grad_batches=3)
    assert held == [0, len(parameters), len(parameters)] * 2


def test_training_after_validation_of_the_same_batches():
    """Which runs in inference mode: nothing that it made may be saved for a backward pass."""
    module = make()
    trainer().validate(module, loader(), verbose=False)
    trainer(max_epochs=1).fit(module, loader())


def test_gradients_stay_where_the_strategy_accumulates_them(monkeypatch):
    monkeypatch.setattr(SingleDeviceStrategy, "handles_gradient_accumulation", True)
    module, held = make(), []
    module.policy.get_input_embeddings().register_forward_hook(lambda m, *_: held.append(m.weight.grad is not None))
    trainer(max_epochs=1).fit(module, loader(8, 2))
    assert held[-3:] == [True] * 3


@pytest.mark.parametrize("scaler", [None, torch.amp.GradScaler("cpu")])
def test_a_gradient_scaler_of_whatever_precision_wants_the_optimiser_not_fused(scaler):
    class Scaling(Precision):  # as FSDP's, which is no MixedPrecision
        pass

    Scaling.scaler = scaler
    module = make()
    run = trainer(max_epochs=1, plugins=[Scaling()])
    run.fit(module, loader())
    assert run.optimizers[0].defaults["fused"] == (None if scaler else True)


@pytest.mark.parametrize("clip", [None, 0.05])
def test_mixed_precision_without_a_scaler_has_the_fused_optimiser_and_clips(clip):
    def run(**options):
        module = make()
        fit = trainer(max_epochs=1, precision="bf16-mixed", gradient_clip_val=clip)
        if options:
            module.configure_optimizers = lambda: torch.optim.AdamW(
                module.policy.parameters(), 1e-2, eps=1e-2, **options
            )
        fit.fit(module, loader())
        return fit.optimizers[0].defaults["fused"], [p.detach().clone() for p in module.policy.parameters()]

    (fused, ours), (_, expected) = run(), run(weight_decay=0.0, fused=False)
    assert fused
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
