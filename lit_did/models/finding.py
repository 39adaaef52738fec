"""Which part of somebody's module is the policy, and which its reference."""

from __future__ import annotations

import inspect
from operator import attrgetter

from torch import nn

from lit_did.models.loading import check_adapter_is_all_that_trains
from lit_did.models.wrappers import inner, is_peft, unwrapped


def find_policy(module: nn.Module, name: str | None) -> nn.Module:
    """The policy of `module`: the attribute `name`, or its one child that is a causal language model and trains.

    Raises:
        ValueError: There is no such attribute, or not exactly one such child.
    """
    if name is not None:
        try:
            policy = attrgetter(name)(module)
        except AttributeError as error:
            raise ValueError(
                f"Expected `policy` to be an attribute of {type(module).__name__}, but got {name!r}."
            ) from error
        if not isinstance(policy, nn.Module):
            raise ValueError(f"Expected `policy` ({name!r}) to be a module, but got {type(policy).__name__}.")
        return policy
    found = [child for child in _language_models(module).values() if _trains(child)]
    if len(found) != 1:
        raise ValueError(
            f"Expected one child of {type(module).__name__} to be a causal language model that trains, but got "
            f"{len(found)}{_names(module)}: name it with `policy`, freeze the reference, or give `logits_fn`."
        )
    return found[0]


def find_attribute(module: nn.Module, name: str) -> nn.Module | None:
    """The part of `module` that `name` names, such as "net.lm"; None if there is none."""
    try:
        found = attrgetter(name)(module)
    except AttributeError:
        return None
    return found if isinstance(found, nn.Module) else None


def find_reference(module: nn.Module, policy: nn.Module) -> nn.Module | None:
    """The reference beside `policy`: the one child that is a causal language model without parameters that train.

    None stands for the policy, a PeftModel, with its adapter off.

    Raises:
        ValueError: There is not exactly one, and the policy is no PeftModel whose adapter can be switched off.
    """
    found = [child for child in _language_models(module).values() if child is not policy and not _trains(child)]
    if len(found) == 1:
        return found[0]
    if not found and is_peft(unwrapped(policy)):
        check_adapter_is_all_that_trains(unwrapped(policy))
        return None
    hint = "give `reference` or `logits_fn`"
    if getattr(getattr(module, "hparams", None), "cache_reference", None) is not None:
        hint = (
            "with `cache_reference` the reference's layers are freed. LitDPO logs these metrics itself; for a callback "
            "beside it, give `logits_fn=lambda module, batch: module(batch)`"
        )
    raise ValueError(
        f"Expected one child of {type(module).__name__} to be a causal language model that does not train, or the "
        f"policy to be a PeftModel, but got {len(found)}{_names(module)}: {hint}."
    )


def _language_models(module: nn.Module) -> dict[str, nn.Module]:
    return {name: child for name, child in module.named_children() if _is_language_model(child)}


def _is_language_model(module: nn.Module) -> bool:
    model = inner(module)
    return "input_ids" in inspect.signature(model.forward).parameters and hasattr(model, "config")


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _names(module: nn.Module) -> str:
    names = ", ".join(_language_models(module))
    return f" (language models: {names})" if names else ""
