"""The races: how fast are the token statistics and their gradient, compared with others and with reading the inputs?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from benchmarks import check, memory
from benchmarks.contestants import BASELINE, Contestant
from benchmarks.harness import LIMIT, Result, Runner, Size, race
from lit_did import SequenceStatistics, sequence_statistics

FORWARD, BACKWARD = slice(0, 1), slice(1, 2)
BOTH = slice(0, 2)
FEW_ROWS = (1, 2, 4, 8)
IGNORED = 0.6


@dataclass
class Plan:
    """The options of the command line."""

    device: torch.device
    rows: int
    vocabularies: Sequence[int]
    dtypes: Sequence[torch.dtype]
    contestants: dict[str, Contestant]
    repeats: int
    seconds: float
    read: Callable[[Tensor, int], int] | None
    """Reads a tensor (`read_limit.load()`). None: there is no limit on the CPU."""
    notes: list[str] = field(default_factory=list)
    """What was left out, and why."""

    def race(self, name: str, runners: Sequence[Runner]) -> list[Result]:
        return race(name, runners, repeats=self.repeats, seconds=self.seconds)

    @property
    def ours(self) -> dict[str, Contestant]:
        return {name: contestant for name, contestant in self.contestants.items() if name.startswith(BASELINE)}


class Inputs:
    """Logits as peaked as a language model's, a reference near the policy, labels; and the runners on them."""

    def __init__(self, plan: Plan, size: Size) -> None:
        self.plan, self.size = plan, size
        generator = torch.Generator(size.device).manual_seed(0)
        random = partial(torch.randn, size.rows, size.vocabulary, generator=generator, device=size.device)
        policy = random().mul_(3)
        self.reference = random().mul_(0.5).add_(policy).to(size.dtype)
        self.policy = policy.to(size.dtype)
        self.labels = torch.randint(size.vocabulary, (size.rows,), generator=generator, device=size.device)
        # Four sequences, each with its prompt ignored.
        length = -(-size.rows // 4)
        place = (torch.arange(size.rows, device=size.device) % length + 0.5) / length
        self.labels[place < size.ignored] = -100
        self._truths: dict[object, check.Truth] = {}

    def runners(self, name: str, contestant: Contestant, **options) -> list[Runner]:
        """The contestant forward, and forward + backward; only the latter if its backward overwrites the logits."""
        policy, reference, labels = self.policy, self.reference, self.labels
        bytes_read = round((policy.nbytes + reference.nbytes) * (1 - self.size.ignored))
        common = {"size": self.size, "warmup": contestant.warmup, **options}
        truth = self._truth(contestant)
        upstream: list[Tensor] = []  # Made in the first call, a warm-up, so that their small kernels are not timed.

        def forward(state: tuple) -> tuple:
            return contestant.function(*state, labels)

        def prepare() -> tuple[Tensor, Tensor]:
            leaves = policy.detach().requires_grad_(), reference.detach().requires_grad_()
            return (leaves[0].clone(), leaves[1].clone()) if contestant.overwrites else leaves

        def forward_for_backward(state: tuple) -> tuple:
            return state, contestant.function(*state, labels)

        def backward(state: tuple) -> tuple:
            logits, values = state
            if not upstream:
                upstream.extend(check.upstream(values))
            gradients = torch.autograd.grad(list(values), logits, upstream)
            return [value.detach() for value in values], gradients

        forwards = Runner(
            name,
            prepare=lambda: (policy, reference),
            steps=(forward,),
            directions={"forward": (FORWARD, bytes_read)},
            verify=lambda values: truth.verify(name, contestant.fields, values),
            **common,
        )
        both = Runner(
            name,
            prepare=prepare,
            steps=(forward_for_backward, backward),
            # Backward reads both inputs and writes both gradients, those of ignored rows too.
            directions={
                "backward": (BACKWARD, bytes_read + policy.nbytes + reference.nbytes),
                "both": (BOTH, 2 * bytes_read + policy.nbytes + reference.nbytes),
            },
            verify=lambda returned: truth.verify(name, contestant.fields, *returned),
            **common,
        )
        return [both] if contestant.overwrites else [forwards, both]

    def limit(self, threads: int | None = None) -> list[Runner]:
        """Merely reading both inputs; on CUDA copying the policy's logits, which reads and writes."""
        threads, read = threads or torch.get_num_threads(), self.plan.read
        moved = self.policy.nbytes + self.reference.nbytes
        if self.size.device.type == "cuda":
            target = torch.empty_like(self.policy)
            steps = (target.copy_,)
        elif read is not None:
            steps = (lambda policy: (read(policy, threads), read(self.reference, threads)),)
        else:
            return []
        directions = {LIMIT: (FORWARD, moved)}
        return [Runner(LIMIT, self.size, lambda: self.policy, steps, directions, threads=threads)]

    def _truth(self, contestant: Contestant) -> check.Truth:
        key = contestant.fields
        if key not in self._truths:
            self._truths[key] = check.Truth(contestant.truth, self.policy, self.reference, self.labels)
        return self._truths[key]


def table(plan: Plan) -> Iterator[Result]:
    """Every contestant at every vocabulary size and dtype."""
    for vocabulary in plan.vocabularies:
        for dtype in plan.dtypes:
            size = Size(plan.rows, vocabulary, dtype, plan.device)
            inputs = Inputs(plan, size)
            memory.free(plan.device)
            # After a few sizes torch would stop compiling and run eagerly without a warning.
            torch.compiler.reset()
            runners = inputs.limit()
            for name, contestant in plan.contestants.items():
                needed = contestant.copies * 4 * size.rows * size.vocabulary
                free = memory.available(plan.device)
                if needed > free:
                    plan.notes.append(
                        f"{name} is left out at {size}: it may need {needed / 2**30:.1f} GiB, but only "
                        f"{free / 2**30:.1f} GiB are free."
                    )
                    continue
                runners += inputs.runners(name, contestant)
            yield from plan.race("table", runners)


def threads(plan: Plan) -> Iterator[Result]:
    """One thread against two, at the first vocabulary size."""
    for dtype in plan.dtypes:
        inputs = Inputs(plan, Size(plan.rows, plan.vocabularies[0], dtype, plan.device))
        runners = []
        for count in (1, 2):
            runners += inputs.limit(count)
            for name, contestant in plan.ours.items():
                runners += inputs.runners(name, contestant, threads=count)
        yield from plan.race("threads", runners)


def ignored(plan: Plan) -> Iterator[Result]:
    """No rows ignored against a share `IGNORED`, at the first vocabulary size."""
    for dtype in plan.dtypes:
        runners = []
        for share in (0.0, IGNORED):
            inputs = Inputs(plan, Size(plan.rows, plan.vocabularies[0], dtype, plan.device, share))
            for name, contestant in plan.ours.items():
                runners += inputs.runners(name, contestant)
        yield from plan.race("ignored", runners)


def few_rows(plan: Plan) -> Iterator[Result]:
    """Fewer rows than threads could share, at the last vocabulary size; on the CPU with one thread and with all."""
    several = sorted({1, torch.get_num_threads()}) if plan.device.type == "cpu" else [torch.get_num_threads()]
    for dtype in plan.dtypes:
        for rows in FEW_ROWS:
            inputs = Inputs(plan, Size(rows, plan.vocabularies[-1], dtype, plan.device))
            runners = []
            for count in several:
                runners += inputs.limit(count)
                for name, contestant in plan.ours.items():
                    runners += inputs.runners(name, contestant, threads=count)
            yield from plan.race("few-rows", runners)


def growth(plan: Plan) -> Iterator[Result]:
    """The cost by vocabulary size up to the first, and by rows at the first. The table adds the larger vocabularies."""
    most, rows = plan.vocabularies[0], plan.rows
    sizes = {(rows, v) for v in (most // 64, most // 16, most // 4, most) if v}
    sizes |= {(r, most) for r in (rows // 64, rows // 16, rows // 4, 2 * rows) if r}
    for dtype in plan.dtypes:
        for rows, vocabulary in sorted(sizes):
            inputs = Inputs(plan, Size(rows, vocabulary, dtype, plan.device))
            runners = inputs.limit()
            for name, contestant in plan.ours.items():
                runners += inputs.runners(name, contestant)
            yield from plan.race("growth", runners)


def sequence(plan: Plan) -> Iterator[Result]:
    """Packed sequences of `check.ROWS` tokens: the cost of the sums over them beyond the token statistics."""
    packed = Contestant(
        partial(_packed_sequences, backend="fused"),
        fields=SequenceStatistics._fields[:-1],  # num_tokens, the last, has no gradient.
        truth=partial(_packed_sequences, backend="reference"),
    )
    for dtype in plan.dtypes:
        inputs = Inputs(plan, Size(plan.rows, plan.vocabularies[0], dtype, plan.device))
        runners = inputs.limit() + inputs.runners(BASELINE, plan.contestants[BASELINE])
        yield from plan.race("sequence", runners + inputs.runners("fused sequences", packed))


def _packed_sequences(policy: Tensor, reference: Tensor, labels: Tensor, backend: str) -> tuple[Tensor, ...]:
    rows = len(labels)
    ends = torch.arange(0, rows + check.ROWS, check.ROWS, device=labels.device).clamp(max=rows)
    return sequence_statistics(policy, reference, labels, cu_seqlens=ends, backend=backend)[:-1]


RACES = {
    "table": table,
    "threads": threads,
    "ignored": ignored,
    "few-rows": few_rows,
    "growth": growth,
    "sequence": sequence,
}
ON_CPU_ONLY = ("threads",)
