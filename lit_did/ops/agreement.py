"""What the processes of a vocabulary-parallel group agree on before they compute: the slices' sizes and the labels.

One message of six integers a call goes between the hosts, over a gloo group made once for each process group. Nothing
in it waits for the device. A process that raises for its arguments says so in the same message, and the others raise
too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from weakref import WeakKeyDictionary, finalize

import torch
import torch.distributed as dist
from torch import Tensor

from lit_did.ops.checks import is_fake, on_host

_REFUSED = [-1] * 6
_host_groups: WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup] = WeakKeyDictionary()


@contextmanager
def refusals_shared(process_group: dist.ProcessGroup | None) -> Iterator[None]:
    """Lets the other processes know if this one raises for its arguments. Otherwise they would wait for it for ever."""
    try:
        yield
    except (TypeError, ValueError, RuntimeError):
        if isinstance(process_group, dist.ProcessGroup):
            with suppress(Exception):  # the error that is already being raised says more
                _exchange(_REFUSED, process_group)
        raise


def agree_on_slices(
    policy_entries: int, reference_entries: int, labels: Tensor, process_group: dist.ProcessGroup | None
) -> tuple[int, int]:
    """Checks that all processes fit together.

    Args:
        policy_entries: Rows of this process's slice of the policy's output layer.
        reference_entries: The same of the reference.
        labels: [N] the labels that count. Their values are compared if they are on the CPU, their number always.
        process_group: None: this process has the whole vocabulary.

    Returns:
        The first entry of this process's slice, and the size of the whole vocabulary.

    Raises:
        ValueError: On all processes: one of them refused its arguments, the labels differ, or the slices of the two
            models do.
    """
    everyones = [[policy_entries, reference_entries]]
    rank = 0
    if process_group is not None:
        rank = dist.get_rank(process_group)
        ends = labels.aminmax() if len(labels) and on_host(labels) else (0, 0)
        numbers = [0, policy_entries, reference_entries, len(labels), *map(int, ends)]
        if is_fake(labels):  # there are no other processes
            everyones = [numbers] * dist.get_world_size(process_group)
        else:
            everyones = _exchange(numbers, process_group)
        for number, message in enumerate(everyones):
            if message == _REFUSED:
                raise ValueError(
                    "Expected all processes of `process_group` to pass valid arguments, but rank "
                    f"{number} of the group refused its own. See the error there."
                )
        if any(message[3:] != everyones[0][3:] for message in everyones):
            of_all = zip(*(message[3:] for message in everyones), strict=True)
            count, least, largest = (", ".join(map(str, values)) for values in of_all)
            raise ValueError(
                f"Expected `labels` to be the same on all processes of `process_group`, but got {count} tokens that "
                f"are not ignored, the least {least}, the largest {largest}."
            )
        everyones = [message[1:3] for message in everyones]
    of_policy, of_reference = ([sizes[side] for sizes in everyones] for side in (0, 1))
    if of_policy != of_reference:
        if process_group is None:
            expected, got = f"the vocabulary of `policy_weight`, {of_policy[0]} entries", f"{of_reference[0]}"
        else:
            expected = f"the slices of `policy_weight`, of {', '.join(map(str, of_policy))} entries a process"
            got = ", ".join(map(str, of_reference))
        raise ValueError(f"Expected `reference_weight` to have {expected}, but got {got}.")
    return sum(of_policy[:rank]), sum(of_policy)


def _exchange(numbers: list[int], process_group: dist.ProcessGroup) -> list[list[int]]:
    """Every process's numbers, in the order of the group's ranks."""
    group = _host_groups.get(process_group)
    if group is None:
        ranks = dist.get_process_group_ranks(process_group)
        group = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
        assert isinstance(group, dist.ProcessGroup)  # this process is one of the ranks
        _host_groups[process_group] = group
        finalize(process_group, _destroy, group).atexit = False
    own = torch.tensor(numbers)
    gathered = [torch.empty_like(own) for _ in range(dist.get_world_size(process_group))]
    dist.all_gather(gathered, own, group=group)
    return torch.stack(gathered).tolist()


def _destroy(group: dist.ProcessGroup) -> None:
    """Destroys the group on the CPU with the one that it belongs to."""
    with suppress(ValueError, AssertionError):  # all groups may have been destroyed together
        dist.destroy_process_group(group)
