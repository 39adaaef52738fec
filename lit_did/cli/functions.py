"""Turns a Python function into a command: its signature gives the options, and its docstring gives their help."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NoReturn, get_type_hints

import docstring_parser
import jsonargparse

from lit_did.cli.errors import InputError
from lit_did.cli.wrong_keys import check_yaml_files, explain


class Parser(jsonargparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise InputError(explain(message, self)) from ex


def call(function: Callable[..., Any], command: str, arguments: list[str]) -> Any:
    """Calls a function with a command line.

    Parameters without a default that can be passed by position are positional on the command line too. All others are
    options. Those that are True or False need no value: `--merge`, `--no_merge`. `-c FILE` reads options from a YAML
    file.

    Args:
        function: The function. Its docstring has a section Args.
        command: The command's name, for the help.
        arguments: The command line after that name.

    Returns:
        What the function returns.

    Raises:
        InputError: The command line cannot be used.
    """
    check_yaml_files(arguments)
    documented = docstring_parser.parse(inspect.getdoc(function) or "")
    helps = {parameter.arg_name: parameter.description for parameter in documented.params}
    parameters = inspect.signature(function).parameters.values()
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty]
    parser = Parser(prog=f"lit-did {command}", description=documented.description, allow_abbrev=False)
    parser.add_argument("-c", "--config", action="config", help="A YAML file with options.")
    for name in positional:
        parser.add_argument(name, type=get_type_hints(function)[name], help=helps[name])
    switches = {p.name: p.default for p in parameters if get_type_hints(function)[p.name] is bool}
    for name, default in switches.items():
        parser.add_argument(f"--{name}", action=jsonargparse.ActionYesNo, default=default, help=helps[name])
    parser.add_function_arguments(function, skip={*positional, *switches}, fail_untyped=True)
    values = parser.instantiate(parser.parse_args(arguments)).as_dict()
    values.pop("config")
    return function(**values)
