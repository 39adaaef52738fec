"""Turns a Python function into a command: its signature gives the options, and its docstring gives their help."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Collection, Sequence
from typing import Any, NoReturn, get_type_hints

import docstring_parser
import jsonargparse
import yaml

from lit_did.cli.errors import InputError
from lit_did.cli.wrong_keys import check_yaml_files, explain


class Parser(jsonargparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise InputError(explain(message, self)) from ex


def call(
    function: Callable[..., Any],
    command: str,
    arguments: list[str],
    *,
    options_of: Sequence[Callable[..., Any]] = (),
    without: Collection[str] = (),
) -> Any:
    """Calls a function with a command line.

    Parameters without a default that can be passed by position are positional on the command line too. All others are
    options. Those that are True or False need no value: `--merge`, `--no_merge`. Those that are lists of texts may be
    given several times, and commas may separate their values. `--max-pairs` means `--max_pairs`. `-c FILE` reads
    options from a YAML file.

    Args:
        function: The function. Its docstring has a section Args.
        command: The command's name, for the help.
        arguments: The command line after that name.
        options_of: Other functions, whose parameters `function` takes as `**options`. Of parameters with the same name,
            the first one counts.
        without: Parameters of `options_of` that are left out.

    Returns:
        What the function returns.

    Raises:
        InputError: The command line cannot be used.
    """
    of_function = _parameters(function)
    positional = [p.name for p in of_function.values() if p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty]
    parser = Parser(prog=f"lit-did {command}", description=_documented(function).description, allow_abbrev=False)
    parser.add_argument("-c", "--config", action="config", help="A YAML file with options.")
    lists, taken = [], set(without)
    for owner in (function, *options_of):
        own = of_function if owner is function else _parameters(owner, taken)
        taken |= own.keys()
        hints = get_type_hints(owner)
        helps = {parameter.arg_name: parameter.description for parameter in _documented(owner).params}
        switches = [name for name in own if hints[name] is bool]
        lists += [name for name in own if hints[name] == list[str] | None]
        for name in positional if owner is function else ():
            parser.add_argument(name, type=hints[name], help=helps[name])
        for name in switches:
            parser.add_argument(
                f"--{name}", action=jsonargparse.ActionYesNo, default=own[name].default, help=helps[name]
            )
        others = {*own} - {*positional, *switches}
        everything: set[str | int] = {
            name for each in (owner, *options_of) for name in inspect.signature(each).parameters
        }
        parser.add_function_arguments(owner, skip=everything - others, fail_untyped=True, as_group=False)
    arguments = _gathered(_with_underscores(arguments), lists)
    check_yaml_files(arguments)
    values = parser.instantiate(parser.parse_args(arguments)).as_dict()
    values.pop("config")
    return function(**values)


def _documented(function: Callable[..., Any]) -> docstring_parser.Docstring:
    return docstring_parser.parse(inspect.getdoc(function) or "")


def _parameters(function: Callable[..., Any], left_out: Collection[str] = ()) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p for p in parameters if p.kind is not p.VAR_KEYWORD and p.name not in left_out}


def _with_underscores(arguments: Sequence[str]) -> list[str]:
    """The command line with options' names as Python has them: --max-pairs becomes --max_pairs."""
    return [re.sub(r"^--[\w-]+", lambda name: "--" + name[0][2:].replace("-", "_"), part) for part in arguments]


def _gathered(arguments: Sequence[str], lists: Collection[str]) -> list[str]:
    """The command line with each option of `lists` once: `--by a --by b,c` becomes `--by ["a", "b", "c"]`."""
    left, found = [], dict[str, list[str]]()
    parts = iter(arguments)
    for part in parts:
        option, attached, value = part.partition("=")
        name = option.removeprefix("--")
        if name not in lists or option == name:
            left.append(part)
            continue
        if not attached:
            value = next(parts, "")
        if not value or value.startswith("--"):
            raise InputError(f"Expected a value after {option}, but got none.")
        values = yaml.safe_load(value) if value.startswith("[") else value.split(",")
        found.setdefault(name, []).extend(str(value).strip() for value in values)
    return [*left, *(f"--{name}={json.dumps(values)}" for name, values in found.items())]
