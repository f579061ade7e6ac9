"""Configuration files and `--set` values as tables, and what is wrong with a table in one line."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from flowcore.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Table = dict[str, Any]
MAX_VALUE = 80
_RULES = {
    "model_type": "must be a table of keys",
    "dict_type": "must be a table of keys",
    "tuple_type": "must be a list",
    "missing": "must be given",
}


def read_table(path: Path) -> Table:
    """The table of a YAML or TOML file. Raises: ConfigError that names the file."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as err:
        raise ConfigError(f"{path}: configuration must exist; no such file") from err
    except (OSError, UnicodeDecodeError) as err:
        raise ConfigError(f"{path}: configuration must be readable UTF-8 text ({err})") from err
    try:
        table = tomllib.loads(text) if path.suffix.lower() == ".toml" else yaml.safe_load(text)
    except (yaml.YAMLError, tomllib.TOMLDecodeError) as err:
        reason = " ".join(str(err).split())[:200]
        raise ConfigError(f"{path}: configuration must be valid YAML or TOML ({reason})") from err
    if not isinstance(table, dict):
        raise ConfigError(f"{path}: configuration must be a table of sections, got {type(table).__name__}")
    return {str(name): value for name, value in table.items() if value is not None}


def assign(kind: type[BaseModel], table: Table, assignment: str) -> str:
    """Puts a `key.path=value` assignment into a table; returns the key.

    Items of lists are numbers; the number after the last one adds an item.
    Raises: ConfigError that names the key as typed and the nearest valid one.
    """
    name, equals, text = assignment.partition("=")
    if not equals:
        raise ConfigError(f"--set must have the form key.path=value, got {assignment!r}")
    if not _is_known(kind, name):
        raise ConfigError(f"--set {name}: unknown key{_suggest(kind, name)}")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as err:
        raise ConfigError(f"--set {name}: value must be a YAML scalar or list, got {text!r}") from err
    *parents, last = name.split(".")
    node: object = table
    for place, part in enumerate(parents):
        node = _child(node, part, name, is_list=[*parents, last][place + 1].isdecimal())
    _put(node, last, value, name)
    return name


def _child(node: object, part: str, name: str, *, is_list: bool) -> object:
    """The table or list under a part of a path, made if it is not there."""
    empty: object = [] if is_list else {}
    if isinstance(node, list):
        number = _index(node, part, name)
        if number == len(node):
            node.append(empty)
        return node[number]
    if not isinstance(node, dict):
        raise ConfigError(f"--set {name}: {part!r} must lie in a section, got {node!r}")
    if node.get(part) is None:
        node[part] = empty
    child: object = node[part]
    return child


def _put(node: object, last: str, value: object, name: str) -> None:
    if isinstance(node, list):
        number = _index(node, last, name)
        node[number : number + 1] = [value]
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise ConfigError(f"--set {name}: {last!r} must lie in a section, got {node!r}")


def _index(node: list[object], part: str, name: str) -> int:
    if not part.isdecimal() or int(part) > len(node):
        raise ConfigError(f"--set {name}: the item must be a number from 0 to {len(node)}, got {part!r}")
    return int(part)


def merged(table: Table, changes: Mapping[str, Any]) -> Table:
    """A copy of a table with changes, in its inner tables as well."""
    result = dict(table)
    for name, value in changes.items():
        inner = result.get(name)
        is_table = isinstance(inner, dict) and isinstance(value, Mapping)
        result[name] = merged(result[name], value) if is_table else value
    return result


def describe(kind: type[BaseModel], err: ValidationError, source: str, assigned: Sequence[str]) -> str:
    """The first problem of a validation error in one line; an unknown key comes before what it leaves out.

    `source` is the file; a key among `assigned` is said to come from `--set`.
    """
    problems = sorted(err.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    problem = problems[0]
    name = ".".join(str(part) for part in problem["loc"]) or "configuration"
    is_assigned = any(name == key or name.startswith(f"{key}.") for key in assigned)
    place = "--set " if is_assigned else f"{source}: "
    if problem["type"] == "extra_forbidden":
        return f"{place}unknown key {name}{_suggest(kind, name)}"
    rule, value = _rule(problem), problem["input"]
    text = f"{name} {rule}" if rule.startswith("must ") else f"{name}: {rule}"
    if problem["type"] == "missing" or isinstance(value, (dict, BaseModel)) or ", got " in rule:
        return place + text
    shown = repr(value)
    shown = shown if len(shown) <= MAX_VALUE else shown[:MAX_VALUE] + "..."
    remedy = "; put it in quotes" if problem["type"] == "string_type" and value is not None else ""
    return f"{place}{text}, got {shown}{remedy}"


def _rule(problem: Mapping[str, Any]) -> str:
    """What a value must be, as `must ...`."""
    message: str = _RULES.get(problem["type"], problem["msg"])
    return message.removeprefix("Value error, ").replace("Input should ", "must ")


def _suggest(kind: type[BaseModel], name: str) -> str:
    """The nearest valid key, as the end of a sentence; the sections where none is near."""
    near = difflib.get_close_matches(_plain(name), key_paths(kind), n=1, cutoff=0.5)
    return f"; nearest valid key is {near[0]}" if near else f"; sections are {', '.join(kind.model_fields)}"


def _plain(name: str) -> str:
    """A dotted path without the numbers of list items."""
    return re.sub(r"\.\d+(?=\.|$)", "", name)


def _is_known(kind: type[BaseModel], name: str) -> bool:
    plain = _plain(name)
    return plain in key_paths(kind) or any(plain.startswith(f"{path}.") for path in _open_paths(kind))


def key_paths(kind: type[BaseModel], prefix: str = "") -> list[str]:
    """Every key of a configuration as a dotted path (items of lists without their number)."""
    paths = []
    for name, field in kind.model_fields.items():
        paths.append(prefix + name)
        for table in _tables(field.annotation):
            paths += key_paths(table, f"{prefix}{name}.")
    return paths


def _open_paths(kind: type[BaseModel], prefix: str = "") -> list[str]:
    """Keys whose tables may hold any names."""
    paths = []
    for name, field in kind.model_fields.items():
        if get_origin(field.annotation) is dict:
            paths.append(prefix + name)
        for table in _tables(field.annotation):
            paths += _open_paths(table, f"{prefix}{name}.")
    return paths


def _tables(annotation: object) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [table for part in get_args(annotation) for table in _tables(part)]
