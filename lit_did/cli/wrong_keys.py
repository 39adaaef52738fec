"""Says in one line what jsonargparse does not accept, with the nearest good name."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from textwrap import dedent, shorten
from typing import NamedTuple

import jsonargparse
import yaml

from lit_did.cli.errors import InputError
from lit_did.cli.recipes import RECIPES


def check_yaml_files(arguments: Sequence[str]) -> None:
    """Raises InputError unless each file that `-c` or `--config` names exists and is YAML."""
    for option, value in zip(arguments, [*arguments[1:], ""], strict=False):
        name, _, attached = option.partition("=")
        if name not in ("-c", "--config"):
            continue
        if not (attached or value):
            raise InputError(f"Expected a YAML file after {name}, but got nothing.")
        path = Path(attached or value).expanduser()
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            files = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
            near = _near(path.name, [*files, *(p.stem for p in RECIPES.glob("*.yaml"))])
            raise InputError(f"Expected {name} to be a YAML file, but got {path}: {error.strerror}.{near}") from error
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: Expected YAML in UTF-8, but {error.reason} at byte {error.start}.") from error
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
    key, kind, nested, text, types, value = _innermost(message)
    if match := re.search(r"[Uu]nrecognized arguments: (.*)", text):
        name = match[1].split()[0]
        if not name.startswith("-"):
            return f"Expected an option, which starts with --, but got {name}."
        return (
            f"Expected an option of this command, but got {name}.{_near(name.strip('-').split('=')[0], options, '--')}"
        )
    if match := re.match(r"argument ([^/:]+).*: (?:expected one argument|ignored explicit argument '(.*)')", text):
        if match[2] is None:
            return f"Expected a value after {match[1]}, but got none."
        return f"Expected {match[1]} without a value, but got {match[1]}={match[2]}."
    if match := re.search(r"Group '([^']+)' does not accept option '([^']+)'", text):
        return _unknown(f"{match[1]}.{match[2]}", options)
    if match := re.search(r"Option '([^']+)' is not accepted", text):
        if not kind:
            return _unknown(match[1], options)
        name = kind.rpartition(".")[2]
        if name in ("Optimizer", "LRScheduler"):  # what stands for "no class"
            return f"Expected `{key}` to name a class before its option {match[1]}, as in --{key} CLASS, but got none."
        near = _near(match[1], _parameters(kind, _classes(message)))
        return f"Expected `{key}` to have options of {name} only, but got {match[1]}.{near}"
    if match := re.search(r"arguments? (?:is|are) required: (.*)", text):
        names = ["model.policy" if name == "model" else name for name in match[1].split(", ")]
        names = [f"{key}.{name}" if key else name for name in names]
        listed = ", ".join(f"`{name}`" for name in names)
        if kind and names[0] != "model.policy":
            option = f"in init_args of {kind.rpartition('.')[2]} or as an option (--{names[0]})"
        elif key or names[0] in [*options, "model.policy"]:
            option = f"in a recipe (-c FILE) or as an option (--{names[0]})"
        else:
            return f"Expected {listed} to be given after the command's name, but it is not."
        return f"Expected {listed} to be given, {option}."
    if match := re.search(r"module '([^']+)' has no attribute '([^']+)'", text):
        return (
            f"Expected `{key}` to be a class, but {match[1]} has no {match[2]}.{_near(match[2], _exported(match[1]))}"
        )
    if match := re.search(r"Multiple subclasses with name (\w+)\..*: (.*)\.", text):
        return f"Expected `{key}` to be a class with its module, one of {match[2]}, but got {match[1]}."
    if match := re.search(r"Expected a dot import path string: (\S+)", text):
        near = _near(match[1], [found.__name__ for found in _classes(message)])
        hint = near or (" To name a model, use `model.policy`." if key == "model" else "")
        return f"Expected `{key}` to be a class, but got {match[1]}.{hint}"
    if match := re.search(r"No module named '([^']+)'", text):
        return f"Expected `{key}` to be a class, but there is no module {match[1]}."
    if match := re.search(r"Expected `.*", text):  # what a class of this package raised
        return match[0]
    if match := re.match(r"Unable to load config '([^\n]*)'", text):
        below = next((option for option in options if re.fullmatch(rf"{key}\.\w+", option)), f"{key}.NAME")
        return f"Expected `{key}` to hold options, such as `{below}`, but got {match[1]}."
    name = f"{key}.{nested}".strip(".") if nested else key
    if match := re.match(r"Expected an? (.*?)\. Got value: (.*)", text, re.DOTALL):
        choices = re.findall(r"'([^']+)'", match[1]) if "Literal" in match[1] else []
        kind = match[1].replace("typing.Literal", "one of ")
        return f"Expected `{name}` to be {_readable(kind)}, but got {_short(match[2])!r}.{_near(match[2], choices)}"
    if types and text == types:
        if not re.search(r"'(?:int|float|bool|str|dict|list)'|Mapping", types):
            return (
                f"Expected `{name}` to hold the options of {_readable(types)}, or class_path and init_args, "
                f"but got {_short(value)}."
            )
        return f"Expected `{name}` to be {_readable(types)}, but got {_short(value)!r}."
    if kind:  # what a class of another package raised
        return f"Expected arguments that {kind.rpartition('.')[2]} accepts, but: {_short(text, 250)}"
    return " ".join(text.split())


class _Fault(NamedTuple):
    """The innermost cause in an error of jsonargparse."""

    key: str
    kind: str
    """the path of the class whose arguments are wrong"""
    nested: str
    """the part of the key below `key`"""
    text: str
    """what is wrong. `types`: the value has none of these."""
    types: str
    value: str


_UNION = re.compile(
    r"(?:- Expected a path [^\n]*\s*- )?Does not validate against any of the Union subtypes\s+"
    r"Subtypes: \[(.*?)\]\n\s*Errors:\n(.*)\n\s*Given value type: [^\n]*\n\s*Given value: (.*)",
    re.DOTALL,
)
_ONE_TYPE = re.compile(  # only that a value has not this type, or how jsonargparse fails on it
    r"Expected an? (?!.*Got value)|Not a valid subclass|Import path .* does not correspond|Type .* expects a function|"
    r"(?:Problem with given class_path '[^']+':\s*)?(?:'\w+' object|argument of type)"
)


def _innermost(message: str) -> _Fault:
    """Follows the errors of a value's types, of which at most one is of interest, inwards."""
    keys, kind, nested, types, value = [], "", "", "", ""
    text = message.strip()
    while True:
        if match := re.match(r'Parser key "([^"]+)":\s*(.*)', text, re.DOTALL):
            keys.append(match[1])
            nested, text = "", match[2]
        elif match := re.match(r"Problem with given class_path '([^']+)':\s*(.*)", text, re.DOTALL):
            kind, text = match[1], match[2]
        elif match := _UNION.match(text):
            types, value = match[1], match[3].strip()
            if inner := re.match(r"NestedArg\(key='(.*?)', val=(.*)\)$", value, re.DOTALL):
                nested, value = inner[1], inner[2].strip("'")
            made = set(re.findall(r"class_path='([^']+)'", value))
            items = [item.strip() for item in re.split(r"^- ", dedent(match[2]), flags=re.MULTILINE)[1:]]
            inner_faults = [item for item in items if not _ONE_TYPE.match(item)]
            simple = re.search(r"'(?:int|float|bool|str)'", types)
            imports = [item for item in items if item.startswith("Expected a dot import") and not simple]
            found = sorted(inner_faults, key=lambda item: not item.startswith("Problem with given")) or imports
            if not found:
                return _Fault(".".join(keys), kind, nested, types, types, value)
            text = found[0]
            if len(made) == 1 and not keys:  # the class was being made
                (kind,) = made
        else:
            return _Fault(".".join(keys), kind, nested, text, types, value)


def _short(text: str, width: int = 80) -> str:
    return shorten(text, width, placeholder=" ...")


_WORDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a text"}


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
    types = re.sub(r"(?:list|(?:\w+\.)+(?:Sequence|Iterable))\[[^\]]*\]", "a list", types)
    types = re.sub(r"(?:\w+\.)*Mapping\[[^\]]*\]|<class '(?:\w+\.)*Mapping'>", "a mapping", types)
    types = re.sub(r"(?:\w+\.)*Callable\[.*\](?=, |$)", "a function", types)
    names = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", types).replace("NoneType", "None")
    types = re.sub(r"\b(int|float|bool|str)\b", lambda match: _WORDS[match[1]], names)
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
