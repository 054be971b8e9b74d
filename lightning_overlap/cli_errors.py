"""Shortens the command's errors to one line: which setting, what is wrong, which name or value is near.

jsonargparse reports every type that a value could have had, in nested lists. The line that a user needs is the deepest one that is not
about an alternative such as ``None``.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
from collections.abc import Iterable
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser

_KEY = re.compile(r'Parser key "(?P<key>[^"]+)":\s*(?P<rest>.*)')
_CLASS = re.compile(r"Problem with given class_path '(?P<path>[^']+)'")
_UNKNOWN = re.compile(r"Option '(?P<name>[^']+)' is not accepted")
_MISSING_CLASS = re.compile(r"No module named '(?P<module>[^']+)'|has no attribute '(?P<attribute>[^']+)'")
_NESTED = re.compile(r"NestedArg\(key='(?P<key>[^']+)', val='?(?P<value>[^')]*)'?\)")
_ALTERNATIVE = re.compile(r"Subtypes:|Expected a (<class '|path|dot import path|List|valid subclass)|not accessible")
_NOISE = ("Does not validate against any of the Union", "Errors:", "Given value")
_TYPE = re.compile(r"<class '([^']+)'>")
_GOT = re.compile(r"Got value: (?P<value>.*)")
_ALLOWED = re.compile(r"Expected a typing\.Literal\[(?P<values>[^\]]+)\]")
_SHORT = 140
"""Longest value that is repeated in an error, in characters."""


class Parser(LightningArgumentParser):
    """Lightning's parser, with errors of one line."""

    def error(self, message: str, ex: Exception | None = None) -> Any:
        """Prints the error without the usage of every option, and ends the command with status 2."""
        if not self.exit_on_error:  # the parser of a class's settings: its error is a part of another parser's
            super().error(message, ex)
        self.exit(2, f"error: {shorten(message)}\n")


def shorten(message: str) -> str:
    """Shortens an error of jsonargparse to one line.

    Args:
        message: the error's text, of any number of lines.

    Returns:
        The setting, the problem, and the nearest known name if a name is unknown. A text of one line stays as it is.
    """
    lines = [line.strip().removeprefix("- ") for line in message.strip().splitlines()]
    lines = [line for line in lines if line]
    keys, class_path, problems = list[str](), "", list[str]()
    for line in lines:
        if match := _KEY.match(line):
            keys.append(match["key"])
            line = match["rest"]
            problems.clear()  # those of the settings around it
        elif match := _CLASS.match(line):
            class_path = match["path"]
            continue
        if line and not line.startswith(_NOISE):
            problems.append(line)
    path = _joined(keys)
    given = next((_NESTED.search(line) for line in lines if _NESTED.search(line)), None)
    if given is not None and not path.endswith(f".{given['key']}"):
        path = f"{path}.{given['key']}" if path else given["key"]
    problem = _problem(problems, class_path)
    value = next((line.removeprefix("Given value: ") for line in lines if line.startswith("Given value: ")), "")
    value = next((match["value"] for line in lines if (match := _GOT.search(line))), value)
    value = given["value"] if given is not None else value
    ending = f", got {value}" if value and len(value) <= _SHORT and "unknown" not in problem and not problem.endswith(value) else ""
    return f"{path}: {problem}{ending}" if path else problem + ending


def nearest(name: str, known: Iterable[str]) -> str:
    """Names the nearest known name: ``; did you mean 'size'?``, or the known names if none is near."""
    known = sorted(known)
    if close := difflib.get_close_matches(name, known, 1):
        return f"; did you mean '{close[0]}'?"
    return f"; known: {', '.join(known)}" if 0 < len(known) <= 12 else ""


def _joined(keys: Iterable[str]) -> str:
    """The name of a nested setting: each key may repeat the ones around it."""
    joined = ""
    for key in keys:
        joined = key if not joined or key.startswith(joined) else f"{joined}.{key}"
    return joined


def _problem(problems: list[str], class_path: str) -> str:
    for problem in problems:
        if match := _UNKNOWN.search(problem):
            return (
                f"unknown setting '{match['name']}' of {class_path.rpartition('.')[2]}{nearest(match['name'], _settings(class_path))}"
            )
        if match := _MISSING_CLASS.search(problem):
            return f"unknown class {class_path!r}: {problem}{_nearest_class(class_path)}"
    for problem in problems:
        if match := _ALLOWED.search(problem):
            return f"must be one of {match['values']}"
    types = [name.rpartition(".")[2] for problem in problems for name in _TYPE.findall(problem) if "NoneType" not in name]
    telling = [problem for problem in problems if not _ALTERNATIVE.search(problem)]
    if types and not telling:
        return f"must be {' or '.join(dict.fromkeys(types))}"
    chosen = telling or problems
    return " ".join(chosen[-1].split()) if chosen else "cannot be read"


def _settings(class_path: str) -> list[str]:
    """Names of the arguments of a class; empty if it cannot be imported."""
    module, _, name = class_path.rpartition(".")
    try:
        return [n for n in inspect.signature(getattr(importlib.import_module(module), name)).parameters if n != "self"]
    except (ImportError, AttributeError, ValueError):
        return []


def _nearest_class(class_path: str) -> str:
    module, _, name = class_path.rpartition(".")
    try:
        known = [n for n, value in vars(importlib.import_module(module)).items() if inspect.isclass(value)]
    except (ImportError, ValueError):
        return "; the folder in which the command runs is searched too"
    return nearest(name, known)
