"""LitDPO's checkpoints: they hold what is trained and nothing else, and are refused if they do not fit."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Set
from itertools import accumulate
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import lightning
from lightning.pytorch.plugins import DoublePrecision
from torch import nn

from lit_did.models.adapters import REFERENCE_ADAPTER
from lit_did.models.policy_and_reference import PolicyAndReference
from lit_did.models.wrappers import FSDP_PREFIX, is_peft, plain_name
from lit_did.modules.optimizer_state import by_names

if TYPE_CHECKING:
    from typing import Self

_OWN = re.compile(r"\bmodels\.(policy|reference)\..*")


class TrainedState(lightning.LightningModule):
    """A LightningModule whose `state_dict` leaves out the reference model and the frozen parts of the policy.

    It keeps the frozen copy of an adapter that is the reference. The adapter that a resumed run loads by the same name
    may have been trained and saved in between.

    This holds in every strategy's checkpoints, in Lightning's averages of weights, and in the weights that a spawned
    process returns. `load_state_dict` does not miss what was left out.
    """

    models: PolicyAndReference | None
    _reference_digests: dict[str, str]
    """of the reference's weights and of its files, as far as they are known"""
    _start_checked: bool

    def __init__(self) -> None:
        super().__init__()
        self.models = None
        self._reference_digests = {}
        self._saved_optimizer: str | None = None  # the class of the optimiser in the checkpoint that is being restored
        # Strategies would compare the names of all parameters. on_load_checkpoint checks those of what was trained.
        self.strict_loading = False
        self.register_state_dict_post_hook(_leave_out)
        self.register_load_state_dict_post_hook(_do_not_miss)

    @classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: str | Path | IO,
        map_location: Any = None,
        hparams_file: str | Path | None = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> Self:
        """A module with the trained weights and the arguments of a checkpoint.

        Args:
            checkpoint_path: The file.
            map_location: The device of the weights, as `torch.load` takes it.
            hparams_file: A file of arguments that are used instead of the checkpoint's.
            strict: None or False. The module itself checks that nothing trained is missing.
            weights_only: As `torch.load` takes it.
            kwargs: Arguments of the class. A checkpoint does not hold modules, functions and configuration objects, so
                pass them again. A model must be freshly loaded, because training modifies the policy in place.

        Raises:
            TypeError: `policy` was a module and is not passed again.
        """
        options = {"hparams_file": hparams_file, "strict": strict, "weights_only": weights_only, **kwargs}
        try:
            return super().load_from_checkpoint(checkpoint_path, map_location, **options)
        except TypeError as error:
            if "argument: 'policy'" not in str(error):
                raise
            raise TypeError(
                "Expected `policy` to be passed again, because it was a module and the checkpoint holds only what was "
                f"trained of it. Use `{cls.__name__}.load_from_checkpoint(path, policy=...)` with a freshly loaded "
                "model. If `reference` was a module, pass it too."
            ) from error

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads what `state_dict` holds, as every module's does. Models that were given by name are loaded first."""
        self.configure_model()
        self._start_checked = True  # a policy that was trained has left its reference
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the names of what was trained, which `on_load_checkpoint` compares, and the class of the optimiser."""
        checkpoint["reference_digests"] = self._reference_digests
        checkpoint["trained"] = sorted(self._trained_names())
        if "optimizer_states" in checkpoint:
            checkpoint["optimizer_states"] = by_names(checkpoint["optimizer_states"], self)
            checkpoint["optimizer_class"] = next((type(o).__name__ for o in self.trainer.strategy.optimizers), None)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint of another policy, or of a run with a reference that was not passed again."""
        arguments = checkpoint.get(self.CHECKPOINT_HYPER_PARAMS_KEY)
        if arguments and "reference" not in arguments and self.hparams.get("reference", "a module") is None:
            raise ValueError(
                "Expected `reference` to be passed again, because it was a module in the run that saved the "
                "checkpoint, but got None. Otherwise the reference would be a copy of the `policy` that you passed."
            )
        self._saved_optimizer = checkpoint.get("optimizer_class")
        self.configure_model()
        assert self.models is not None
        if self._trainer is not None and isinstance(self.trainer.precision_plugin, DoublePrecision):
            self.double()  # Lightning would do it after float64 weights have been rounded to float32
        if "state_dict" in checkpoint:
            state = {f"models.policy.{name}": value for name, value in self.models.policy.state_dict().items()}
            own = {plain_name(name): name for name in state}
            saved = {plain_name(name): value for name, value in checkpoint["state_dict"].items()}
            # One of the two runs may have another kind of reference. A warning says so below.
            saved = {name: value for name, value in saved.items() if name in own or not _of_reference(name)}
            self._check_names(saved.keys(), own.keys())
            trained = self._trained_names()
            _check_shapes(saved, {name: state[own[name]] for name in own if name in trained})
            kept = {name: value for name, value in state.items() if _of_reference(name)}
            # One of the two policies may be compiled.
            checkpoint["state_dict"] = kept | {own.get(name, name): value for name, value in saved.items()}
        elif "trained" in checkpoint:  # a sharded strategy has loaded the weights and removed them
            self._check_names(set(checkpoint["trained"]), self._trained_names())
        warn_unless_same_reference(checkpoint.get("reference_digests", {}), self._reference_digests)
        self._start_checked = True

    def _trained_names(self) -> set[str]:
        return {plain_name(name) for name, p in self.named_parameters(remove_duplicate=False) if p.requires_grad}

    def _check_names(self, saved: Set[str], own: Set[str]) -> None:
        """Raises ValueError if something that is trained was not saved, or if the saved policy has other parts."""
        trained = self._trained_names()
        missing = sorted(trained - saved)
        if missing:
            raise ValueError(
                f"Expected the checkpoint to hold the {len(trained)} trained parameters of this policy, but "
                f"{len(missing)} are missing. The first is {missing[0]}. Pass the `policy` and `lora` of the run that "
                "saved it."
            )
        surplus = sorted(name for name in saved - own if name.startswith("models.policy."))
        if surplus:
            raise ValueError(
                f"Expected the checkpoint to hold parameters of this policy only, but this policy does not have "
                f"{len(surplus)} of them. The first is {surplus[0]}. Pass the `policy` and `lora` of the run that "
                "saved it."
            )


def _check_shapes(saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raises ValueError if a saved tensor has another shape than this policy's."""
    for name, value in saved.items():
        shape, expected = getattr(value, "shape", None), getattr(own.get(name), "shape", None)
        if shape is not None and expected is not None and shape != expected:
            raise ValueError(
                f"Expected the checkpoint to hold tensors of this policy's shapes, but {name} has {list(shape)} there "
                f"and {list(expected)} here. Pass the `policy` and `lora` of the run that saved it."
            )


def warn_unless_same_reference(saved: Mapping[str, str], own: Mapping[str, str]) -> None:
    """Warns if the digests of two references differ: of a checkpoint's run and of this module.

    Sharded weights have no digest, and a model that was not given by name has no files. One kind of digest that both
    have is enough. Files may be written in another way, so that weights count first.
    """
    both = next((kind for kind in ("weights", "files") if kind in saved and kind in own), None)
    if both is not None and saved[both] != own[both]:
        warnings.warn(
            "The reference's weights differ from those of the run that saved the checkpoint, so losses, rewards and "
            "the DID are measured against another model than before. If you want that, ignore this. Otherwise pass "
            "the `policy` and `reference` of that run. If they are models and not names, load them again, because "
            "training modifies the policy in place.",
            stacklevel=3,
        )


def _of_reference(name: str) -> bool:
    """Whether a name in a `state_dict` is that of the frozen copy of an adapter that is the reference."""
    return REFERENCE_ADAPTER in name.split(".")


def _leave_out(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """Removes what is left out. It is a hook, because a wrapper's `state_dict` does not call that of its children."""
    assert isinstance(module, TrainedState)
    if prefix.endswith(FSDP_PREFIX):  # FSDP 1's own hooks, which run next, need all parameters that it holds
        wrapper = module.trainer.strategy.model
        assert wrapper is not None
        if _leave_out_wrapped not in wrapper._state_dict_hooks.values():
            wrapper.register_state_dict_post_hook(_leave_out_wrapped)
        return
    left_out = _left_out(module)
    for name in [n for n in state_dict if n.startswith(prefix) and left_out(plain_name(n.removeprefix(prefix)))]:
        del state_dict[name]


def _leave_out_wrapped(wrapper: Any, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    _leave_out(wrapper.module, state_dict, prefix, local_metadata)


def _do_not_miss(module: nn.Module, keys: Any) -> None:
    """Removes what is left out from the missing keys, which may have a wrapper's prefix."""
    assert isinstance(module, TrainedState)
    left_out = _left_out(module)
    names = {name: _OWN.search(plain_name(name)) for name in keys.missing_keys}
    keys.missing_keys[:] = [name for name, own in names.items() if own is None or not left_out(own[0])]


def _left_out(module: TrainedState) -> Callable[[str], bool]:
    """A function of a name in a full `state_dict`: whether it is left out, as the reference's or as frozen.

    Buffers and extra state, such as the scales of a 4-bit layer, are kept with the parameters of their module. Those of
    a module without parameters are kept unless the policy has an adapter, because its base model does not change.
    """
    trained: dict[str, bool] = {}  # by parameter and module with parameters: whether anything in it is trained
    parameters = {plain_name(n): p.requires_grad for n, p in module.named_parameters(remove_duplicate=False)}
    for name, trains in parameters.items():
        for part in accumulate(name.split("."), "{}.{}".format):
            trained[part] = trained.get(part, False) or trains
    without = not (module.models is not None and is_peft(module.models.policy))
    trained = dict.fromkeys((plain_name(name) for name, _ in module.named_modules()), without) | trained

    def left_out(name: str) -> bool:
        if not name.startswith("models.policy."):
            return name.startswith("models.reference.")
        if _of_reference(name):
            return False
        while name not in trained:  # a buffer, or several levels below a parameter
            name = name.rpartition(".")[0]
        return not trained[name]

    return left_out
