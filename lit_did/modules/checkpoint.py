"""What LitDPO keeps in checkpoints, what is trained and nothing else, and what it accepts from them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Set
from itertools import accumulate
from typing import Any

import lightning
from lightning.pytorch.plugins import DoublePrecision
from torch import nn

from lit_did.models.wrappers import FSDP_PREFIX, is_peft, plain_name
from lit_did.modules.optimizer_state import by_names

_OWN = re.compile(r"\b(policy|reference)\..*")


class TrainedState(lightning.LightningModule):
    """A LightningModule whose `state_dict` leaves out `reference` and what is frozen of `policy`.

    So it is in every strategy's checkpoints, in Lightning's averages of weights, and in what a process that trained
    hands back. `load_state_dict` does not miss what was left out.
    """

    policy: nn.Module | None
    reference: nn.Module | None
    _reference_digest: str | None
    _start_checked: bool

    def __init__(self) -> None:
        super().__init__()
        # Strategies compare names themselves, of all parameters; on_load_checkpoint checks what was trained.
        self.strict_loading = False
        self.register_state_dict_post_hook(_leave_out)
        self.register_load_state_dict_post_hook(_do_not_miss)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As every module's, without what `state_dict` leaves out. Models that were given by name are loaded first."""
        self.configure_model()
        self._start_checked = True  # a policy that was trained has left its reference
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the names of what was trained, for strategies that load before `on_load_checkpoint`."""
        checkpoint["reference_digest"] = self._reference_digest
        checkpoint["trained"] = sorted(self._trained_names())
        if "optimizer_states" in checkpoint:
            checkpoint["optimizer_states"] = by_names(checkpoint["optimizer_states"], self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint of another policy, or of a run with a reference that is not given here."""
        arguments = checkpoint.get(self.CHECKPOINT_HYPER_PARAMS_KEY)
        if arguments and "reference" not in arguments and self.hparams.get("reference", "a module") is None:
            raise ValueError(
                "Expected `reference` to be given as it was to the run that saved the checkpoint, a module, but got "
                "None: the policy would be compared with itself as it is given here."
            )
        self.configure_model()
        if self._trainer is not None and isinstance(self.trainer.precision_plugin, DoublePrecision):
            self.double()  # Lightning would do it when float32 weights have taken the float64 ones, rounded
        if "state_dict" in checkpoint:
            own = {f"policy.{plain_name(name)}": f"policy.{name}" for name in self.policy.state_dict()}
            saved = {plain_name(name): value for name, value in checkpoint["state_dict"].items()}
            self._check_names(saved.keys(), own.keys())
            # One of the two policies may be compiled.
            checkpoint["state_dict"] = {own.get(name, name): value for name, value in saved.items()}
        elif "trained" in checkpoint:  # a strategy that shards has loaded the weights and removed them
            self._check_names(set(checkpoint["trained"]), self._trained_names())
        warn_unless_same_reference(checkpoint.get("reference_digest"), self._reference_digest)
        self._start_checked = True

    def _trained_names(self) -> set[str]:
        return {plain_name(name) for name, p in self.named_parameters(remove_duplicate=False) if p.requires_grad}

    def _check_names(self, saved: Set[str], own: Set[str]) -> None:
        """Raises ValueError unless all that is trained was saved, and nothing of a policy that is not in `own`."""
        trained = self._trained_names()
        missing = sorted(trained - saved)
        if missing:
            raise ValueError(
                f"Expected the checkpoint to hold the {len(trained)} trained parameters of this policy, but "
                f"{len(missing)} are missing, {missing[0]} the first: was it saved with another `policy` or `lora`?"
            )
        surplus = sorted(name for name in saved - own if name.startswith("policy."))
        if surplus:
            raise ValueError(
                f"Expected the checkpoint to hold parameters of this policy alone, but {len(surplus)} are not its, "
                f"{surplus[0]} the first: was it saved with another `policy` or `lora`?"
            )


def warn_unless_same_reference(saved: str | None, own: str | None) -> None:
    """Warns if a checkpoint's run had another reference than this module; None: nobody knows."""
    if None not in (saved, own) and saved != own:
        warnings.warn(
            "The reference's weights differ from those of the run that saved the checkpoint, so rewards are measured "
            "against another model. If you passed a model as `policy` or `reference`, pass a freshly loaded one: "
            "training modifies the policy in place.",
            stacklevel=3,
        )


def _leave_out(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """Removes what is left out. A hook of `state_dict`, because a wrapper's `state_dict` does not call a child's."""
    if prefix.endswith(FSDP_PREFIX):  # FSDP 1's own hooks, which are next, want all parameters that it holds
        wrapper = module.trainer.strategy.model
        if _leave_out_wrapped not in wrapper._state_dict_hooks.values():
            wrapper.register_state_dict_post_hook(_leave_out_wrapped)
        return
    left_out = _left_out(module)
    for name in [n for n in state_dict if n.startswith(prefix) and left_out(plain_name(n.removeprefix(prefix)))]:
        del state_dict[name]


def _leave_out_wrapped(wrapper: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    _leave_out(wrapper.module, state_dict, prefix, local_metadata)


def _do_not_miss(module: nn.Module, keys: Any) -> None:
    """Takes what is left out off the missing keys; a wrapper may have put a prefix before them."""
    left_out = _left_out(module)
    names = {name: _OWN.search(plain_name(name)) for name in keys.missing_keys}
    keys.missing_keys[:] = [name for name, own in names.items() if own is None or not left_out(own[0])]


def _left_out(module: TrainedState) -> Callable[[str], bool]:
    """Tells of a name in a full `state_dict` whether it is left out: what is the reference's, or frozen.

    Buffers and extra state, such as a 4-bit layer's scales, go with the parameters of the part that holds them. Those
    of a part without parameters are kept, unless the policy has an adapter: what is under it does not change.
    """
    trained: dict[str, bool] = {}  # of each parameter and part that holds some: whether anything in it is trained
    parameters = {plain_name(n): p.requires_grad for n, p in module.named_parameters(remove_duplicate=False)}
    for name, trains in parameters.items():
        for part in accumulate(name.split("."), "{}.{}".format):
            trained[part] = trained.get(part, False) or trains
    without = not (module.policy is not None and is_peft(module.policy))
    trained = dict.fromkeys((plain_name(name) for name, _ in module.named_modules()), without) | trained

    def left_out(name: str) -> bool:
        if not name.startswith("policy."):
            return name.startswith("reference.")
        while name not in trained:  # a buffer, or several levels below a parameter
            name = name.rpartition(".")[0]
        return not trained[name]

    return left_out
