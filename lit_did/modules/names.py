"""Names of parameters, whatever has been wrapped around their modules."""

FSDP_PREFIX = "_fsdp_wrapped_module."
_WRAPPERS = (FSDP_PREFIX, "_checkpoint_wrapped_module.", "_orig_mod.")


def plain_name(name: str) -> str:
    """A name without what wrappers add to it."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name
