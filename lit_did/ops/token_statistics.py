"""token_statistics: the statistics of a policy's and a reference's logits for every token, in one pass over both.

In plain torch, for z = policy_logits / temperature and r = reference_logits / temperature:

    policy_logprob = z.log_softmax(-1)[label]           reference_logprob = r.log_softmax(-1)[label]
    token_did_entropy = Categorical(logits=z - r).entropy()
    token_did_concentration = log(V) - token_did_entropy
    token_did_log_partition = log(sum(softmax(z) / softmax(r)))
    policy_entropy, reference_entropy = entropy of softmax(z), of softmax(r)
    kl = KL(softmax(z), softmax(r))                     reverse_kl = KL(softmax(r), softmax(z))
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_did.ops import reference
from lit_did.ops.checks import check_inplace_backward, check_labels, check_token_arguments
from lit_did.ops.extension import EXTENSION, Backend, choose_backend
from lit_did.ops.statistics import TokenStatistics

if EXTENSION.module is not None:
    from lit_did.ops import fused


def token_statistics(
    policy_logits: Tensor,
    reference_logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    temperature: float = 1.0,
    backend: Backend = "auto",
    inplace_backward: bool = False,
) -> TokenStatistics:
    """Statistics of every token of a policy and its reference (arXiv 2505.23761, per token).

    Args:
        policy_logits: [..., V] float32, bfloat16, float16 or float64. Any strides; a last dimension that is not
            contiguous is copied.
        reference_logits: [..., V], the same shape; its dtype may differ.
        labels: [...] integers: labels[t] is the token that position t's logits predict, so callers shift.
        ignore_index: Rows with this label are not read. They return 0 and get a gradient of 0.
        temperature: Both logits are divided by it.
        backend: "fused" (compiled), "reference" (plain torch) or "auto": fused if it supports the device. Under
            `torch.func`'s transforms and forward-mode differentiation only the reference works.
        inplace_backward: The backward writes each gradient over its logits instead of into new memory. See below.

    Returns:
        TokenStatistics: nine tensors [...], in nats, float32 (float64 if either input is), differentiable once (any
        number of times with the reference) in both logits. No rows give empty tensors. `lit-did docs theory` says what
        infinite and NaN logits give.

    With `inplace_backward=True` the backward allocates nothing of size [..., V]: one such tensor less for each side
    that requires a gradient, and the time to touch its memory first. In exchange those logits hold their gradients
    after the backward. Another part of the graph that needs their values (the backward of a final tanh or softmax,
    another loss, a second backward) then raises autograd's error for variables "modified by an inplace operation". Code
    that reads them outside the graph, after the backward, reads gradients. Values and gradients are the same, bit for
    bit.

    - Only the logits that the kernel itself reads are written. If this function copies first (one side float64 and the
      other not, or a last dimension that is not contiguous), the copy is written and the caller's logits stay.
    - Logits that require no gradient, or under `torch.no_grad`, are left alone.
    - The ordinary backward runs instead under `torch.compile`, which plans the memory itself; with `create_graph=True`;
      within hooks on saved tensors (activation checkpointing or offloading), where autograd does not check for
      overwritten values; and if "auto" chooses the reference.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: Shapes or devices do not fit, a label is out of range (checked on the CPU and by the reference),
            `temperature` is not in [1e-30, 1e30], or `backend` is unknown. With `inplace_backward=True`: `backend` is
            "reference"; logits that require a gradient are a leaf or a view of one; or, from the backward, they have
            rows that overlap (expanded) or share memory with the other side.
        RuntimeError: `backend="fused"` does not support the device, or a transform.

    Example:
        >>> import torch
        >>> from lit_did import token_statistics
        >>> logits = torch.tensor([[0.0, 1.0, 2.0], [1.0, 1.0, 1.0]])
        >>> statistics = token_statistics(logits, torch.zeros(2, 3), torch.tensor([2, -100]))
        >>> statistics.log_ratio
        tensor([0.6910, 0.0000])
        >>> statistics.token_did_entropy  # the reference is uniform: the DID is the policy itself
        tensor([0.8324, 0.0000])
    """
    check_token_arguments(policy_logits, reference_logits, labels, ignore_index, temperature)
    check_inplace_backward(inplace_backward, backend)
    chosen = choose_backend(backend, policy_logits.device, (policy_logits, reference_logits, labels))
    double = torch.float64 in (policy_logits.dtype, reference_logits.dtype)
    labels = labels.long()
    if double:
        policy_logits, reference_logits = policy_logits.double(), reference_logits.double()
    if chosen == "fused":
        return fused.token_statistics(
            policy_logits, reference_logits, labels, ignore_index, temperature, inplace_backward
        )
    if not torch.compiler.is_compiling():
        check_labels(labels, policy_logits.shape[-1], ignore_index)
    if not double:
        policy_logits, reference_logits = policy_logits.float(), reference_logits.float()
    return reference.token_statistics(policy_logits, reference_logits, labels, ignore_index, temperature)
