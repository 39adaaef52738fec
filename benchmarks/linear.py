"""From hidden states to the loss and its gradients: linear_sequence_statistics beside TRL, Liger and eager torch.

python -m benchmarks.linear [--device cuda] [--cases 576x49152xfloat32 ...] [--tokens 816] [--contestants NAME ...]

A DPO loss of the log-ratios of eight sequences, and its gradients in the policy's hidden states and weight. Contestants
are checked against plain torch and take turns. On the CPU their memory is measured in a process of their own.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from benchmarks import report
from benchmarks.contestants import eager as eager_statistics
from benchmarks.harness import Result, Runner, Size, in_own_process, race
from benchmarks.targets import Verdict
from lit_did import linear_sequence_statistics
from lit_did.cli.errors import Arguments
from lit_did.functional import preference_loss

SEQUENCES = 8  # the chosen ones first
TOKENS = 816
CASES = ["576x49152xfloat32", "640x262144xbfloat16"]
TOKENS_ON_CUDA = 8192
CASES_ON_CUDA = ["2048x128256xbfloat16", "4096x128256xbfloat16"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BETA = 0.1
MASKED = 0.6  # Share of the tokens that Liger masks: it takes whole sequences.
OURS, PRODUCTS, LIGER, LIGERS_WAY = "lit_did", "products", "liger", "liger's way"


@dataclass(frozen=True)
class Case:
    """Sizes of a race: hidden states [tokens, hidden], weights [vocabulary, hidden] of both models."""

    tokens: int
    hidden: int
    vocabulary: int
    dtype: torch.dtype
    device: str = "cpu"

    @property
    def name(self) -> str:
        return f"hidden {self.hidden}, {self.tokens} x {self.vocabulary} {str(self.dtype).removeprefix('torch.')}"


class Inputs:
    """Hidden states and weights with logits as peaked as a language model's, and a reference near the policy."""

    def __init__(self, case: Case) -> None:
        self.case = case
        generator = torch.Generator(case.device).manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=case.device)

        hidden, weight = random(case.tokens, case.hidden), random(case.vocabulary, case.hidden)
        weight.mul_(3 / case.hidden**0.5)
        self.reference_hidden = (hidden + 0.1 * random(*hidden.shape)).to(case.dtype)
        self.reference_weight = weight.to(case.dtype)
        self.policy_hidden = hidden.to(case.dtype)
        self.policy_weight = weight.add_(random(*weight.shape), alpha=0.3 / case.hidden**0.5).to(case.dtype)
        self.labels = torch.randint(case.vocabulary, (case.tokens,), generator=generator, device=case.device)
        self.cu_seqlens = torch.arange(0, case.tokens + 1, case.tokens // SEQUENCES, device=case.device)

    @cached_property
    def truth(self) -> tuple[Tensor, Tensor, Tensor]:
        """Log-ratios, and the gradients of hidden and weight, by the formula, in float32 a few rows at a time."""
        hidden, weight, reference, reference_weight = (
            x.float() for x in (self.policy_hidden, self.policy_weight, self.reference_hidden, self.reference_weight)
        )
        rows = range(0, self.case.tokens, 64)
        log_ratio = torch.cat(
            [
                _logprobs(hidden[i : i + 64] @ weight.T, self.labels[i : i + 64])
                - _logprobs(reference[i : i + 64] @ reference_weight.T, self.labels[i : i + 64])
                for i in rows
            ]
        )
        log_ratio = sequences(log_ratio).requires_grad_()
        (slope,) = torch.autograd.grad(loss(log_ratio), log_ratio)
        slope = slope.repeat_interleave(self.case.tokens // SEQUENCES)
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        for i in rows:
            chosen = slice(i, i + 64)
            grad = (hidden[chosen] @ weight.T).softmax(-1).neg_()
            grad[torch.arange(len(grad), device=grad.device), self.labels[chosen]] += 1
            grad *= slope[chosen, None]
            grad_hidden[chosen] = grad @ weight
            grad_weight.addmm_(grad.T, hidden[chosen])
        return log_ratio.detach(), grad_hidden, grad_weight

    def verify(self, name: str, returned: Sequence[Tensor]) -> None:
        """Raises RuntimeError if log-ratios or gradients are further from the truth than rounding explains."""
        # Log-ratios may be differences of float32 sums of about 1,000 nats. Gradients have a share of that error,
        # through the slope of the loss. They are compared as a whole.
        eps = max(torch.finfo(self.case.dtype).eps, 1e-5)
        fields = {"log-ratio": 1e-3, "hidden's gradient": 0.0, "weight's gradient": 0.0}
        for (what, rounding), value, expected in zip(fields.items(), returned, self.truth, strict=True):
            error, size = (value.float() - expected).norm(), expected.norm()
            if not error < 10 * eps * size + rounding:
                raise RuntimeError(f"{name} is wrong: its {what} is off by {100 * error / size:.2g} percent.")


def loss(log_ratio: Tensor) -> Tensor:
    """DPO's, of the log-ratios of sequences, the chosen ones first."""
    return preference_loss(*log_ratio.chunk(2), beta=BETA).mean()


def sequences(tokens: Tensor) -> Tensor:
    """Sums over every sequence."""
    return tokens.view(SEQUENCES, -1).sum(-1)


def _logprobs(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, labels[:, None])[:, 0]


# ---------------------------------------------------------------------------------------------------------------------
# Contestants: a function of the inputs, made once, from (hidden, weight) of the policy to log-ratios and gradients
# ---------------------------------------------------------------------------------------------------------------------

State = tuple[Tensor, Tensor]
Function = Callable[[State], Sequence[Tensor]]


def _differentiated(log_ratios: Callable[[Tensor, Tensor], Tensor]) -> Function:
    def function(state: State) -> Sequence[Tensor]:
        log_ratio = log_ratios(*state)
        return log_ratio.detach(), *torch.autograd.grad(loss(log_ratio), state)

    return function


def _ours(inputs: Inputs) -> Function:
    def log_ratios(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_sequence_statistics(
            hidden,
            weight,
            inputs.reference_hidden,
            inputs.reference_weight,
            inputs.labels,
            cu_seqlens=inputs.cu_seqlens,
        ).log_ratio

    return _differentiated(log_ratios)


def _products(inputs: Inputs) -> Function:
    """The four products that every contestant needs, into buffers made before. Their gradients belong to no loss."""
    case = inputs.case
    logits, other = (torch.empty(case.tokens, case.vocabulary, dtype=case.dtype, device=case.device) for _ in range(2))
    grads = torch.empty_like(inputs.policy_hidden), torch.empty_like(inputs.policy_weight)

    def function(state: State) -> Sequence[Tensor]:
        hidden, weight = (x.detach() for x in state)
        torch.mm(hidden, weight.T, out=logits)
        torch.mm(inputs.reference_hidden, inputs.reference_weight.T, out=other)
        torch.mm(logits, weight, out=grads[0])
        torch.mm(logits.T, hidden, out=grads[1])
        return ()

    return function


def _eager(inputs: Inputs) -> Function:
    def log_ratios(hidden: Tensor, weight: Tensor) -> Tensor:
        with torch.no_grad():
            reference = _logprobs(F.linear(inputs.reference_hidden, inputs.reference_weight).float(), inputs.labels)
        return sequences(_logprobs(F.linear(hidden, weight).float(), inputs.labels) - reference)

    return _differentiated(log_ratios)


def _eager_did(inputs: Inputs) -> Function:
    """With the other statistics that lit_did logs, computed without gradients."""

    def log_ratios(hidden: Tensor, weight: Tensor) -> Tensor:
        logits = F.linear(hidden, weight)
        with torch.no_grad():
            statistics = eager_statistics(
                logits, F.linear(inputs.reference_hidden, inputs.reference_weight), inputs.labels
            )
        return sequences(_logprobs(logits.float(), inputs.labels) - statistics.reference_logprob)

    return _differentiated(log_ratios)


def _trl(outputs: tuple[str, ...]) -> Callable[[Inputs], Function]:
    def make(inputs: Inputs) -> Function:
        try:
            from trl.kernels import ChunkedLogProbFunction
            from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as columns
        except ImportError as error:
            raise RuntimeError(f"contestant trl needs TRL 1.16: pip install 'trl>=1.16' ({error})") from error

        def logprobs(hidden: Tensor, weight: Tensor) -> Tensor:
            arguments = (None, inputs.labels, 1.0, columns, None, 1.0, outputs)
            return ChunkedLogProbFunction.apply(hidden, weight, *arguments)[0]

        def log_ratios(hidden: Tensor, weight: Tensor) -> Tensor:
            with torch.no_grad():
                reference = logprobs(inputs.reference_hidden, inputs.reference_weight)
            return sequences(logprobs(hidden, weight) - reference)

        return _differentiated(log_ratios)

    return make


def _whole_sequences(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, int]:
    """Hidden states of policy and reference and labels, [sequences, length, ...], and how many tokens of each sequence,
    its first, are masked: Liger's loss takes no less."""
    per_sequence = inputs.case.tokens // SEQUENCES
    masked = round(per_sequence * MASKED / (1 - MASKED))

    def whole(hidden: Tensor) -> Tensor:
        parts = hidden.detach().view(SEQUENCES, per_sequence, -1)
        return torch.cat([parts[:, :1].expand(-1, masked, -1), parts], dim=1)

    target = F.pad(inputs.labels.view(SEQUENCES, -1), (masked, 0), value=-100)
    return whole(inputs.policy_hidden), whole(inputs.reference_hidden), target, masked


def _liger(inputs: Inputs) -> Function:
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss
    except ImportError as error:
        raise RuntimeError(
            f"contestant liger needs Liger: pip install --no-deps liger-kernel, on a CPU without triton ({error})"
        ) from error
    hidden, reference, target, masked = _whole_sequences(inputs)
    hidden.requires_grad_()
    function = LigerFusedLinearDPOLoss(beta=BETA)

    def run(state: State) -> Sequence[Tensor]:
        _, weight = state
        value, (*_, chosen, rejected) = function(
            weight, hidden, target, ref_input=reference, ref_weight=inputs.reference_weight
        )
        grad_hidden, grad_weight = torch.autograd.grad(value, (hidden, weight))
        return torch.cat([chosen, rejected]) / BETA, grad_hidden[:, masked:].flatten(0, 1), grad_weight

    return run


def _ligers_way(inputs: Inputs) -> Function:
    """What Liger's loss does, in plain torch: logits, loss and gradients of one pair after another."""
    hidden, reference, target, masked = _whole_sequences(inputs)
    pairs = SEQUENCES // 2

    def sums(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        logprobs = F.linear(hidden, weight).float().log_softmax(-1)
        picked = logprobs.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        return (picked * (labels != -100)).sum(-1)

    def run(state: State) -> Sequence[Tensor]:
        _, weight = state
        log_ratios = torch.empty(2, pairs, device=weight.device)
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight.detach())
        for first in range(pairs):
            pair = [first, first + pairs]
            of_pair = hidden[pair].requires_grad_()
            with torch.no_grad():
                expected = sums(reference[pair], inputs.reference_weight, target[pair])
            log_ratio = sums(of_pair, weight, target[pair]) - expected
            grad_hidden[pair], more = torch.autograd.grad(loss(log_ratio) / pairs, (of_pair, weight))
            grad_weight += more
            log_ratios[:, first] = log_ratio.detach()
        return log_ratios.flatten(), grad_hidden[:, masked:].flatten(0, 1), grad_weight

    return run


MAKERS: dict[str, Callable[[Inputs], Function]] = {
    OURS: _ours,
    PRODUCTS: _products,
    "trl": _trl(()),
    "trl, as DPOTrainer": _trl(("entropy", "mean_logits", "is_top1")),
    LIGER: _liger,
    LIGERS_WAY: _ligers_way,
    "eager": _eager,
    "eager, all statistics": _eager_did,
}
NEEDS = {"trl": "trl", "trl, as DPOTrainer": "trl", LIGER: "liger_kernel"}


def default() -> list[str]:
    """The default contestants: those that are installed. Where Liger is, nothing stands in for it."""
    names = [name for name in MAKERS if name not in NEEDS or importlib.util.find_spec(NEEDS[name])]
    return [name for name in names if not (name == LIGERS_WAY and LIGER in names)]


# ---------------------------------------------------------------------------------------------------------------------


def runner(name: str, inputs: Inputs) -> Runner:
    """A contestant that is ready to run, checked on its first call."""
    case = inputs.case
    function = MAKERS[name](inputs)
    weights = inputs.policy_weight, inputs.reference_weight, inputs.policy_hidden, inputs.reference_hidden
    moved = sum(x.nbytes for x in weights) + inputs.policy_hidden.nbytes + inputs.policy_weight.nbytes
    return Runner(
        name,
        Size(case.tokens, case.vocabulary, case.dtype, torch.device(case.device)),
        prepare=lambda: tuple(x.detach().requires_grad_() for x in (inputs.policy_hidden, inputs.policy_weight)),
        steps=(function,),
        directions={"both": (slice(0, 1), moved)},
        verify=lambda returned: name == PRODUCTS or inputs.verify(name, returned),
    )


def fits(name: str, inputs: Inputs) -> bool:
    """Whether a contestant runs without running out of memory."""
    try:
        contestant = runner(name, inputs)
        contestant.steps[0](contestant.prepare())
    except torch.OutOfMemoryError:
        print(f"Note: {name} is left out of {inputs.case.name}: there is too little memory.", flush=True)
        return False
    return True


def alone(name: str, case: Case) -> Result:
    """Runs one contestant alone, to measure its memory."""
    return race(case.name, [runner(name, Inputs(case))], repeats=1)[0]


def measure(case: Case, names: Sequence[str], *, repeats: int, seconds: float, threads: int) -> list[Result]:
    """Measures times in turns, and memory; on the CPU, where others' leaves traces, in one process for each contestant.

    On CUDA, contestants for which the device has too little memory are left out.
    """
    inputs = Inputs(case)
    on_cuda = case.device == "cuda"
    runners = [runner(name, inputs) for name in names if not on_cuda or fits(name, inputs)]
    results = race(case.name, runners, repeats=repeats, seconds=seconds)
    if on_cuda:
        return results
    del inputs, runners
    by_itself = []
    for result in results:
        memory = in_own_process(threads, alone, result.contestant, case)
        by_itself.append(dataclasses.replace(result, peak_mib=memory.peak_mib, extra_mib=memory.extra_mib))
    return by_itself


def judge(results: Sequence[Result]) -> list[Verdict]:
    """The targets, for the CPU's default cases with 816 tokens and two threads."""
    bounds = {"trl": 1.7, "trl, as DPOTrainer": 1.7, LIGER: 2.5, "eager": 1.4, "eager, all statistics": 1.4}
    verdicts = []
    judged = {_case(text, TOKENS).name for text in CASES}
    for name in [case for case in dict.fromkeys(result.race for result in results) if case in judged]:
        by_name = {result.contestant: result for result in results if result.race == name}
        ours = by_name[OURS]
        at = (ours.dtype, ours.vocabulary)
        if PRODUCTS in by_name:
            ratio = ours.median_ms / by_name[PRODUCTS].median_ms
            verdicts.append(Verdict("time over that of the bare products", *at, ratio, 1.5, " x", at_most=True))
        for other, bound in bounds.items():
            if other in by_name:
                ratio = by_name[other].median_ms / ours.median_ms
                verdicts.append(Verdict(f"faster than {other}", *at, ratio, bound, " x"))
        for other in ("eager", "eager, all statistics"):
            if other in by_name:
                share = ours.peak_mib / by_name[other].peak_mib
                verdicts.append(Verdict(f"memory over that of {other}", *at, share, 0.25, " x", at_most=True))
    return verdicts


def show(results: Sequence[Result]) -> None:
    """Prints every case's contestants."""
    for name in dict.fromkeys(result.race for result in results):
        table = Table(title=name, title_justify="left")
        table.add_column("contestant", no_wrap=True)
        for column in ("calls", "median ms", "fastest", "slowest", f"over {OURS}", "peak", "extra"):
            table.add_column(column, justify="right", no_wrap=True)
        chosen = [result for result in results if result.race == name]
        ours = next(result.median_ms for result in chosen if result.contestant == OURS)
        for r in chosen:
            times = (f"{value:.0f}" for value in (r.median_ms, r.fastest_ms, r.slowest_ms))
            sizes = (f"{value:.0f} MiB" for value in (r.peak_mib, r.extra_mib))
            table.add_row(r.contestant, str(r.repeats), *times, f"{r.median_ms / ours:.2f} x", *sizes)
        Console(width=report.WIDTH).print(table)
    print("`peak`: memory beyond the inputs. `extra`: the same, beyond the gradients too.")


def main(arguments: Sequence[str] | None = None) -> list[Result]:
    """Parses the command line and runs."""
    parser = Arguments(
        prog="python -m benchmarks.linear",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--device", default="cpu", choices=["cpu", "cuda"], help="(default: %(default)s)")
    add(
        "--cases",
        nargs="+",
        metavar="HIDDENxVOCABULARYxDTYPE",
        help=f"sizes (default: {' '.join(CASES)}, SmolLM2-135M's and Gemma 3 270M's; on CUDA "
        f"{' '.join(CASES_ON_CUDA)}, those of Llama 3.2 1B and Llama 3.1 8B)",
    )
    add(
        "--tokens",
        type=int,
        help=f"tokens of all {SEQUENCES} completions (default: {TOKENS}, on CUDA {TOKENS_ON_CUDA})",
    )
    add(
        "--contestants",
        nargs="+",
        choices=MAKERS,
        metavar="NAME",
        help=f"of {', '.join(map(repr, MAKERS))}; default: all that are installed",
    )
    add("--repeats", type=int, default=7, help="timed calls of each contestant (default: %(default)s)")
    add("--seconds", type=float, default=60, help="seconds of timed calls: slower contestants are called less often")
    add("--threads", type=int, default=min(2, os.cpu_count() or 1), help="the targets are for 2")
    add("--output", type=Path, default=Path("bench_output"), help="folder for linear.csv")
    options = parser.parse_args(arguments)
    on_cuda = options.device == "cuda"
    options.tokens = options.tokens if options.tokens is not None else TOKENS_ON_CUDA if on_cuda else TOKENS
    options.cases = options.cases or (CASES_ON_CUDA if on_cuda else CASES)
    if on_cuda and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device")
    if options.repeats < 1:
        parser.error(f"--repeats must be at least 1, but got {options.repeats}")
    if options.tokens <= 0 or options.tokens % SEQUENCES:
        parser.error(f"--tokens must be a multiple of {SEQUENCES}, the sequences")
    try:
        cases = [_case(text, options.tokens, options.device) for text in options.cases]
    except (ValueError, KeyError):
        parser.error(
            f"--cases must look like 576x49152xfloat32, with one of {', '.join(DTYPES)}, but got "
            f"{' '.join(options.cases)}"
        )
    names = options.contestants or default()
    if OURS not in names:
        parser.error(f"--contestants must hold {OURS}: the others are compared with it")
    torch.set_num_threads(options.threads)
    title = report.machine(torch.device(options.device))
    print(title, flush=True)
    results: list[Result] = []
    try:
        for case in cases:
            results += measure(case, names, repeats=options.repeats, seconds=options.seconds, threads=options.threads)
    except RuntimeError as error:
        parser.error(str(error))
    show(results)
    verdicts = [] if on_cuda else judge(results)
    if verdicts:
        report.show_verdicts(verdicts, title)
    report.write_csv(results, options.output / "linear.csv")
    for name in NEEDS.keys() - set(default()):
        package = NEEDS[name].replace("_", "-")
        print(f"Note: {name} is left out because it is not installed: pip install --no-deps {package}")
    return results


def _case(text: str, tokens: int, device: str = "cpu") -> Case:
    hidden, vocabulary, dtype = text.split("x")
    return Case(tokens, int(hidden), int(vocabulary), DTYPES[dtype], device)


if __name__ == "__main__":
    main()
