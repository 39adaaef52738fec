"""Says in one line what jsonargparse does not accept, with the nearest good name."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path

import jsonargparse
import yaml

from lit_did.cli.errors import InputError


def check_yaml_files(arguments: Sequence[str]) -> None:
    """Raises InputError unless each file that `-c` or `--config` names exists and is YAML."""
    for option, value in zip(arguments, [*arguments[1:], ""], strict=False):
        name, _, attached = option.partition("=")
        if name not in ("-c", "--config"):
            continue
        path = Path(attached or value).expanduser()
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            near = _near(path.name, (p.name for p in path.parent.glob("*.y*ml")) if path.parent.is_dir() else ())
            raise InputError(f"Expected {name} to be a YAML file, but got {path}: {error.strerror}.{near}") from error
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            where = str(path) if mark is None else f"{path}, line {mark.line + 1}"
            raise InputError(f"{where}: Expected YAML, but: {getattr(error, 'problem', None) or error}.") from error
        if not isinstance(content, dict):
            raise InputError(f"{path}: Expected YAML with options as keys, but got {content!r:.60}.")


def explain(message: str, parser: jsonargparse.ArgumentParser) -> str:
    """The message of an error of `parser` in one line, with the nearest good name.

    Args:
        message: The error's message, which may hold the errors of several types that a value could have.
        parser: The parser that raised it.
    """
    options = [option.lstrip("-") for action in parser._actions for option in action.option_strings if "--" in option]
    key = match[1] if (match := re.search(r'Parser key "([^"]+)"', message)) else ""
    inner = re.findall(r'Parser key "([^"]+)"', message)[1:]
    if match := re.search(r"[Uu]nrecognized arguments: (.*)", message):
        name = match[1].split()[0]
        if not name.startswith("-"):
            return f"Expected an option, which starts with --, but got {name}."
        return (
            f"Expected an option of this command, but got {name}.{_near(name.strip('-').split('=')[0], options, '--')}"
        )
    if match := re.search(r"Group '([^']+)' does not accept option '([^']+)'", message):
        return _unknown(f"{match[1]}.{match[2]}", options)
    if match := re.fullmatch(r"Option '([^']+)' is not accepted", message):
        return _unknown(match[1], options)
    if match := re.search(r"Option '([^']+)' is not accepted", message):
        classes = re.findall(r"Problem with given class_path '([^']+)'", message[: match.start()])
        good = _parameters(classes[-1], _classes(message)) if classes else []
        of = f" of {classes[-1].rpartition('.')[2]}" if classes else ""
        return f"Expected `{key}` to have options{of} only, but got {match[1]}.{_near(match[1], good)}"
    if match := re.search(r"arguments? (?:is|are) required: (.*)", message):
        names = [f"{key}.{name}".lstrip(".") for name in match[1].split(", ")]
        names = ["model.policy" if name == "model" else name for name in names]
        if names[0] not in options:
            return f"Expected `{names[0]}` to be given after the command's name, but it is not."
        listed = ", ".join(f"`{name}`" for name in names)
        return f"Expected {listed} to be given, in a recipe (-c FILE) or as an option (--{names[0]})."
    if match := re.search(r"module '([^']+)' has no attribute '([^']+)'", message):
        return (
            f"Expected `{key}` to be a class, but {match[1]} has no {match[2]}.{_near(match[2], _exported(match[1]))}"
        )
    if match := re.search(r"Multiple subclasses with name (\w+)\..*: (.*)\.", message):
        return f"Expected `{key}` to be a class with its module, one of {match[2]}, but got {match[1]}."
    if match := re.search(r"Expected a dot import path string: (\S+)", message):
        good = [kind.__name__ for kind in _classes(message)]
        return f"Expected `{key}` to be a class, but got {match[1]}.{_near(match[1], good)}"
    if match := re.search(r"No module named '([^']+)'", message):
        return f"Expected `{key}` to be a class, but there is no module {match[1]}."
    if match := re.search(r"Expected `.*", message):  # what a class of this package raised
        return match[0]
    name = ".".join([key, *inner[-1:]])
    if match := re.search(r"Expected an? (.*?)\. Got value: (.*)", message):
        kind = match[1].replace("typing.Literal", "one of ")
        choices = re.findall(r"'([^']+)'", match[1]) if "Literal" in match[1] else []
        return f"Expected `{name}` to be {_readable(kind)}, but got {match[2]!r}.{_near(match[2], choices)}"
    if match := re.search(r"Subtypes: \[(.*)\]\n(?:.*\n)*.*Given value: (.*)", message):
        return f"Expected `{name}` to be {_readable(match[1])}, but got {match[2]!r}."
    return " ".join(message.split())


_WORDS = {"int": "a whole number", "float": "a number", "bool": "true or false"}


def _unknown(key: str, options: Iterable[str]) -> str:
    parts = key.split(".")
    sections = {".".join(option.split(".")[:n]) for option in options for n in range(1, option.count(".") + 2)}
    for n in range(1, len(parts) + 1):  # the first part that is wrong
        wrong = ".".join(parts[:n])
        if wrong not in sections:
            near = _near(wrong, (s for s in sections if s.count(".") == n - 1))
            return f"Expected keys that this command knows, but got {wrong}.{near}"
    return f"Expected keys that this command knows, but got {key}."


def _near(name: str, names: Iterable[str], prefix: str = "") -> str:
    found = get_close_matches(name, list(dict.fromkeys(names)), n=1, cutoff=0.5)
    return f" Did you mean {prefix}{found[0]}?" if found else ""


def _readable(types: str) -> str:
    """Types as jsonargparse prints them, in words."""
    names = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", types).replace("NoneType", "None")
    types = re.sub(r"\b(int|float|bool)\b", lambda match: _WORDS[match[1]], names)
    types = re.sub(r"typing\.Literal\[([^\]]*)\]", r"\1", types)
    types = re.sub(r"one of \[([^\]]*)\]", r"one of \1", types)
    head, comma, last = types.rpartition(", ")
    return f"{head} or {last}" if comma and not types.startswith("one of") else types


def _resolve(path: str) -> object:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _parameters(path: str, classes: Iterable[type]) -> list[str]:
    """The names of a class's arguments. `path` may be its name alone, if it is one of `classes`."""
    found = next((c for c in classes if c.__name__ == path), None) if "." not in path else _resolve(path)
    return list(inspect.signature(found).parameters) if callable(found) else []


def _exported(module: str) -> list[str]:
    loaded = importlib.import_module(module)
    return [*vars(loaded), *getattr(loaded, "__all__", ())]


def _classes(message: str) -> list[type]:
    """The classes that the message expects, with those below them."""
    paths = re.findall(r"<class '([\w.]+\.\w+)'>", message) + re.findall(r"list\[([\w.]+)\]", message)
    waiting = [found for path in paths if isinstance(found := _resolve(path), type)]
    classes: dict[type, None] = {}
    while waiting:
        kind = waiting.pop()
        if kind not in classes:
            classes[kind] = None
            waiting += type.__subclasses__(kind)
    return list(classes)
