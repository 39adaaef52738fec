"""LitDPOPG's gradient against its formula on single, unpadded sequences, and under all that the Trainer does to it."""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext

import lightning
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy
from torch import Tensor, nn

from lit_did import LitDPO, LitDPOPG
from tests.modules.tiny import collate, loader, make_pairs, tiny_gpt2, trainer

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:At the first step the policy should equal its reference"
    ),  # it is not, on purpose
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
]
BETA = 0.3
LORA = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}  # an adapter that is not zero
PROJECTED = make_pairs(4, seed=10)
UNTOUCHED = make_pairs(2, seed=3)
# Each rejected completion is the chosen one twice: what lowers it lowers the chosen one.
TWICE = [(prompt, chosen, chosen + chosen) for prompt, chosen, _ in make_pairs(4, seed=1)]


class Record(lightning.Callback):
    """Each optimiser step's gradient and logged values."""

    def __init__(self) -> None:
        self.gradients: list[list[Tensor | None]] = []
        self.cosines: list[float] = []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        trained = [p for p in module.policy.parameters() if p.requires_grad]
        self.gradients.append([None if p.grad is None else p.grad.clone() for p in trained])

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if "train/gradient_cosine" in trainer.logged_metrics:
            self.cosines.append(float(trainer.logged_metrics["train/gradient_cosine"]))


def fit(module: LitDPO, pairs: list, batch_size: int | None = None, **options) -> Record:
    record = Record()
    trainer(**{"max_epochs": 1, "callbacks": [record], **options}).fit(module, loader(pairs, batch_size or len(pairs)))
    return record


def projecting(**options) -> LitDPOPG:
    return LitDPOPG(tiny_gpt2(0), tiny_gpt2(1), beta=BETA, **options)


def log_prob(model: nn.Module, prompt: list[int], completion: list[int]) -> Tensor:
    log_probs = model(torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
    return log_probs[len(prompt) - 1 : -1].gather(1, torch.tensor(completion)[:, None]).sum()


def terms(module: LitDPO, pairs: list) -> tuple[Tensor, Tensor]:
    """g_w and g_l, flat, in float64, straight from their definition."""
    policy = copy.deepcopy(module.policy).double()
    reference = None if module.reference is None else copy.deepcopy(module.reference).double()
    totals = [0.0, 0.0]
    for prompt, chosen, rejected in pairs:
        with torch.no_grad():
            margin = 0.0
            for sign, completion in ((1, chosen), (-1, rejected)):
                with nullcontext() if reference is not None else policy.disable_adapter():
                    base = log_prob(reference or policy, prompt, completion)
                margin += sign * BETA * float(log_prob(policy, prompt, completion) - base)
        weight = BETA / (1 + math.exp(margin)) / len(pairs)
        for i, completion in enumerate((chosen, rejected)):
            totals[i] = totals[i] + weight * log_prob(policy, prompt, completion)
    trained = [p for p in policy.parameters() if p.requires_grad]
    return tuple(flat(torch.autograd.grad(total, trained)) for total in totals)


def flat(gradient: list[Tensor]) -> Tensor:
    return torch.cat([g.flatten() for g in gradient]).double()


def direction(chosen: Tensor, rejected: Tensor) -> Tensor:
    return chosen - (rejected - max(0, float(rejected @ chosen)) / float(chosen @ chosen) * chosen)


@pytest.mark.parametrize("pairs", [PROJECTED, UNTOUCHED, TWICE])
@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}, {"lora": LORA}])
def test_gradient_is_that_of_the_formula(pairs, options):
    torch.manual_seed(0)  # of the adapter
    reference = None if "lora" in options else tiny_gpt2(1)
    module = LitDPOPG(tiny_gpt2(0), reference, beta=BETA, **options)
    chosen, rejected = terms(module, pairs)
    record = fit(module, pairs, precision="64-true")
    # float64 throughout; entries reach 1
    torch.testing.assert_close(flat(record.gradients[0]), -direction(chosen, rejected), atol=1e-12, rtol=0)
    cosine = float(chosen @ rejected / (chosen.norm() * rejected.norm()))
    assert record.cosines[0] == pytest.approx(cosine, rel=1e-6)  # logged in float32
    if not options:
        assert (cosine > 0.1) if pairs is not UNTOUCHED else (cosine < -0.1)  # the premise: both cases are met


def test_without_a_positive_product_it_is_dpo():
    gradients = []
    for kind in (LitDPO, LitDPOPG):
        for pairs in (UNTOUCHED, PROJECTED):
            gradients.append(flat(fit(kind(tiny_gpt2(0), tiny_gpt2(1), beta=BETA), pairs).gradients[0]))
    torch.testing.assert_close(gradients[2], gradients[0], atol=1e-6, rtol=1e-4)
    assert (gradients[3] - gradients[1]).norm() > 0.05 * gradients[1].norm()


def test_micro_batches_give_the_projected_gradient_of_one_batch():
    pairs = make_pairs(12)
    whole = fit(projecting(), pairs, 6)
    parts = fit(projecting(), pairs, 2, accumulate_grad_batches=3)
    assert len(whole.gradients) == len(parts.gradients) == 2
    for a, b in zip(whole.gradients, parts.gradients, strict=True):
        torch.testing.assert_close(flat(b), flat(a), atol=1e-5, rtol=1e-4)
    assert parts.cosines[-1] == pytest.approx(whole.cosines[-1], abs=1e-5)
    # the premise: projecting every micro-batch by itself is something else
    apart = sum(direction(*terms(projecting(), pairs[i : i + 2])) for i in (0, 2, 4)) / 3
    assert (apart + flat(whole.gradients[0])).norm() > 1e-2


def test_the_projected_gradient_is_what_is_clipped():
    class KeepClipped(Record):
        def on_train_start(self, trainer, module):
            def keep(*_):
                self.clipped = flat([p.grad.clone() for p in module.policy.parameters()])

            trainer.optimizers[0].register_step_post_hook(keep)

    record = KeepClipped()
    fit(projecting(), TWICE, gradient_clip_val=0.1, callbacks=[record])
    projected = flat(record.gradients[0])
    assert projected.norm() > 0.2
    torch.testing.assert_close(record.clipped, projected * 0.1 / projected.norm(), atol=1e-6, rtol=1e-4)


def test_a_trained_module_can_be_copied():
    module = projecting()
    fit(module, TWICE)
    copy.deepcopy(module)  # which a tensor with a graph could not be


def test_bfloat16_stays_near_float32():
    exact, rounded = fit(projecting(), TWICE), fit(projecting(), TWICE, precision="bf16-mixed")
    a, b = flat(exact.gradients[0]), flat(rounded.gradients[0])
    assert (a - b).norm() < 0.05 * a.norm()  # bfloat16 keeps 8 bits, through two layers there and back
    assert rounded.cosines[0] == pytest.approx(exact.cosines[0], abs=0.02)


class Scaling(MixedPrecision):
    """The gradient scaler of 16-mixed by itself: its float16 arithmetic is not for CPUs."""

    def __init__(self) -> None:
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))

    def forward_context(self):
        return nullcontext()


def test_a_gradient_scaler_changes_nothing():
    plain = fit(projecting(), PROJECTED, 2, accumulate_grad_batches=2)
    scaled = fit(projecting(), PROJECTED, 2, accumulate_grad_batches=2, plugins=[Scaling()])
    # powers of two: no digit is lost
    torch.testing.assert_close(flat(scaled.gradients[0]), flat(plain.gradients[0]), atol=1e-9, rtol=1e-6)
    assert scaled.cosines[0] == pytest.approx(plain.cosines[0], rel=1e-6)


def test_a_gradient_scaler_sees_an_overflow_of_the_rejected_term():
    class Overflowing(LitDPOPG):
        def backward(self, loss, *args, **kwargs):
            super().backward(loss, *args, **kwargs)
            self._rejected_gradient[0].fill_(torch.inf)

    module = Overflowing(tiny_gpt2(0), tiny_gpt2(1), learning_rate=1e-2)
    scaling = Scaling()
    fit(module, PROJECTED, plugins=[scaling])
    for mine, start in zip(module.policy.parameters(), tiny_gpt2(0).parameters(), strict=True):
        assert torch.equal(mine, start)  # the step is left out
    assert scaling.scaler.get_scale() == 512


def test_what_an_interrupted_run_leaves_is_forgotten():
    class Interrupt(lightning.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            raise RuntimeError("interrupted")

    expected = fit(projecting(), PROJECTED, 2, accumulate_grad_batches=2)
    module = projecting()
    with pytest.raises(RuntimeError, match="interrupted"):
        fit(module, PROJECTED, 2, accumulate_grad_batches=2, callbacks=[Interrupt()])
    again = fit(module, PROJECTED, 2, accumulate_grad_batches=2)
    torch.testing.assert_close(flat(again.gradients[0]), flat(expected.gradients[0]))


def test_parameters_that_one_side_does_not_reach():
    class Experts(nn.Module):
        """A bias from token 66 of a sequence on, and one from token -1 on: never."""

        def __init__(self, seed: int) -> None:
            super().__init__()
            self.model = tiny_gpt2(seed)
            self.sixty_six, self.never = nn.Parameter(torch.zeros(67)), nn.Parameter(torch.ones(67))

        def forward(self, input_ids, attention_mask):
            output = self.model(input_ids=input_ids, attention_mask=attention_mask)
            for token, bias in ((66, self.sixty_six), (-1, self.never)):
                holds = (input_ids == token).cumsum(1) > 0
                if holds.any():
                    output.logits = output.logits + holds[:, :, None] * bias
            return output

    pairs = [([1, 2], [3, 4], [3, 4, 66, 5]), ([7], [8, 9], [8, 9, 66, 3])]
    gradients = {kind: fit(kind(Experts(0), Experts(1), beta=BETA), pairs).gradients[0] for kind in (LitDPO, LitDPOPG)}
    names = [name for name, _ in Experts(0).named_parameters()]
    reached, never = names.index("sixty_six"), names.index("never")
    # The chosen term's gradient is zero there: what is left is DPO's.
    torch.testing.assert_close(gradients[LitDPOPG][reached], gradients[LitDPO][reached])
    assert gradients[LitDPOPG][reached].norm() > 1e-3
    assert gradients[LitDPOPG][never] is None  # so that weight decay leaves it alone


def chosen_change(kind: type[LitDPO], learning_rate: float) -> float:
    """How far one step of gradient descent moves the mean of beta s log pi(y_w), a unit of learning rate."""

    class Descending(kind):
        def configure_optimizers(self):
            return torch.optim.SGD(self.policy.parameters(), lr=learning_rate)

    module = Descending(tiny_gpt2(0).double(), tiny_gpt2(1).double(), beta=BETA)
    batch = collate(TWICE)

    def chosen() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            pairs = module.pair_statistics(batch)
        return pairs.chosen.policy_logprob, BETA * torch.sigmoid(-pairs.reward_margin)

    before, weight = chosen()
    fit(module, TWICE, precision="64-true")
    return float((weight * (chosen()[0] - before)).mean()) / learning_rate


def test_the_chosen_likelihood_does_not_fall_to_first_order_where_dpos_does():
    chosen, rejected = terms(LitDPO(tiny_gpt2(0), tiny_gpt2(1)), TWICE)
    assert chosen @ rejected > chosen @ chosen  # the premise
    # What is left is of second order: a hundredth of the rate brings it a hundredth as near.
    for kind, limit in ((LitDPO, chosen @ (chosen - rejected)), (LitDPOPG, chosen @ chosen)):
        coarse, fine = (abs(chosen_change(kind, rate) / float(limit) - 1) for rate in (1e-4, 1e-6))
        assert fine < 1e-3
        assert fine < 0.03 * coarse
    assert chosen_change(LitDPO, 1e-4) < 0 < chosen_change(LitDPOPG, 1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "ipo"}, "`loss` to be 'sigmoid' with LitDPOPG, but got 'ipo'"),
        ({"loss": {"sigmoid": 1.0}}, "`loss` to be 'sigmoid' with LitDPOPG, but got {'sigmoid': 1.0}"),
        ({"loss": lambda chosen, rejected: -chosen.log_ratio}, "`loss` to be 'sigmoid' with LitDPOPG, but got <func"),
        ({"nll_weight": 0.2}, "`nll_weight` to be None with LitDPOPG, but got 0.2"),
        ({"label_smoothing": 0.1}, "`label_smoothing` to be 0 with LitDPOPG, but got 0.1"),
        ({"token_did_entropy_weight": 0.1}, "`token_did_entropy_weight` to be 0 with LitDPOPG, but got 0.1"),
        ({"beta": 0}, "`beta` to be above 0, but got 0"),
    ],
)
def test_objectives_that_it_does_not_have_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LitDPOPG(tiny_gpt2(), **options)


class ShardingDDP(DDPStrategy):
    """A DDPStrategy by name, as DeepSpeed's are."""


@pytest.mark.parametrize("strategy", [FSDPStrategy, ShardingDDP])
def test_other_strategies_that_shard_gradients_are_refused(strategy):
    run = trainer(max_epochs=1)
    run._accelerator_connector.strategy = strategy()  # the Trainer itself wants a GPU for it
    module = projecting()
    module.trainer = run
    module.setup("validate")
    with pytest.raises(ValueError, match=rf"`strategy` to be .* with LitDPOPG, but got {strategy.__name__}"):
        module.setup("fit")


def test_a_batch_may_hold_what_is_no_tensor():
    batch = {**collate(make_pairs(2)), "index": torch.arange(2), "name": "first", "epoch": 3, "nothing": None}
    ours, theirs = (module(tiny_gpt2()).pair_statistics(batch) for module in (LitDPOPG, LitDPO))
    for side in ("chosen", "rejected"):
        torch.testing.assert_close(getattr(ours, side).policy_logprob, getattr(theirs, side).policy_logprob)
