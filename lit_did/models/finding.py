"""Finds the policy and its reference among the children of any module."""

from __future__ import annotations

import inspect
import os
from operator import attrgetter

from torch import nn

from lit_did.models.loading import load_reference
from lit_did.models.policy_and_reference import PolicyAndReference
from lit_did.models.wrappers import inner, is_peft, unwrapped


def find_models(
    module: nn.Module,
    policy: str | None,
    reference: str | os.PathLike | nn.Module | None,
    *,
    loaded: nn.Module | None = None,
) -> tuple[PolicyAndReference, nn.Module | None]:
    """The policy of `module` beside its reference, both as they are: neither is frozen, copied or put into a mode.

    Args:
        module: A module that trains a language model.
        policy: The name of the attribute that is the policy. None: it is found.
        reference: A model, the name of an attribute, or a model's name or path. None: it is found.
        loaded: The model of the name `reference`, if it was loaded before.

    Returns:
        The two models, and the reference if it was loaded by its name.

    Raises:
        TypeError: `reference` is of another type, or the attribute `policy` is no module.
        ValueError: There is no such attribute, or not exactly one policy or reference.
    """
    held = [child for child in module.children() if isinstance(child, PolicyAndReference)]
    if policy is None and reference is None and len(held) == 1 and held[0].reference_kind != "policy":
        return held[0], loaded
    found = find_policy(module, policy)
    if reference is None:
        return PolicyAndReference(found, find_reference(module, found), freeze=False), loaded
    model = find_attribute(module, reference) if isinstance(reference, str) else reference
    if isinstance(model, nn.Module):
        return PolicyAndReference(found, load_reference(model, found), freeze=False), loaded
    if loaded is None:
        loaded = load_reference(reference, found)
    return PolicyAndReference(found, loaded.to(next(found.parameters()).device), freeze=False), loaded


def find_policy(module: nn.Module, name: str | None) -> nn.Module:
    """The policy of `module`.

    Args:
        module: Any module, such as another LightningModule.
        name: The policy's attribute, such as "net.lm". None: the one child that is a causal language model with
            trainable parameters.

    Raises:
        TypeError: The attribute is no module.
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
            raise TypeError(f"Expected `policy` ({name!r}) to be a module, but got {type(policy).__name__}.")
        return policy
    found = [child for child in _language_models(module).values() if _trains(child)]
    if len(found) != 1:
        raise ValueError(
            f"Expected one child of {type(module).__name__} to be a causal language model that trains, but got "
            f"{len(found)}{_names(module)}. Name it with `policy`, freeze the reference, or pass `logits_fn`."
        )
    return found[0]


def find_attribute(module: nn.Module, name: str) -> nn.Module | None:
    """The submodule with the attribute `name`, such as "net.lm". None: there is none."""
    try:
        found = attrgetter(name)(module)
    except AttributeError:
        return None
    return found if isinstance(found, nn.Module) else None


def find_reference(module: nn.Module, policy: nn.Module) -> nn.Module | None:
    """The reference of `policy`: the other child that is a causal language model, without trainable parameters.

    Args:
        module: The module that holds both.
        policy: The policy.

    Returns:
        The reference. None: there is none, and the policy is a PeftModel, whose reference is itself with its adapter
        off.

    Raises:
        ValueError: There is not exactly one, and the policy is not a PeftModel.
    """
    found = [child for child in _language_models(module).values() if child is not policy and not _trains(child)]
    if len(found) == 1:
        return found[0]
    if not found and is_peft(unwrapped(policy)):
        return None
    raise ValueError(
        f"Expected one child of {type(module).__name__} to be a causal language model that does not train, or the "
        f"policy to be a PeftModel, but got {len(found)}{_names(module)}. Pass `reference` "
        "or `logits_fn`."
    )


def _language_models(module: nn.Module) -> dict[str, nn.Module]:
    children = dict(module.named_children())
    for name, child in list(children.items()):
        if isinstance(child, PolicyAndReference):
            children |= {f"{name}.{part}": model for part, model in child.named_children()}
    return {name: child for name, child in children.items() if _is_language_model(child)}


def _is_language_model(module: nn.Module) -> bool:
    model = inner(module)
    return "input_ids" in inspect.signature(model.forward).parameters and hasattr(model, "config")


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _names(module: nn.Module) -> str:
    names = ", ".join(_language_models(module))
    return f" (language models: {names})" if names else ""
