"""Configurations: TOML or JSON, then dotted overrides, into frozen dataclasses.

A key that nothing reads, a value of the wrong type or a name that does not exist raises a
`ConfigError` that says where it stands, what is allowed, and what was probably meant.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import tomllib
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from sixfold.discover import unknown
from sixfold.errors import ConfigError

T = TypeVar("T")


def read(path: Path) -> dict[str, Any]:
    """Read a ``.toml`` or ``.json`` file.

    Raises ConfigError when it is missing, of another kind, or does not parse (with the line).
    """
    if path.suffix not in (".toml", ".json"):
        raise ConfigError(f"{path}: a configuration is a .toml or a .json file")
    try:
        text = path.read_text()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    try:
        values = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a configuration is a table, not {type(values).__name__}")
    return values


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over`, table by table.

    >>> merge({"train": {"steps": 1, "seed": 0}}, {"train": {"steps": 5}})
    {'train': {'steps': 5, 'seed': 0}}
    """
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            merged[key] = merge(old, value)
        else:
            merged[key] = value
    return merged


def override(values: Mapping[str, Any], assignment: str) -> dict[str, Any]:
    """Apply one ``section.key=value``; the value is read as TOML where it is, else as a string.

    >>> override({}, "train.steps=500")
    {'train': {'steps': 500}}
    """
    path, equals, text = assignment.partition("=")
    if not equals or not path:
        raise ConfigError(f"{assignment!r} is not an override; write section.key=value")
    over: Any = parse_value(text)
    for key in reversed(path.strip().split(".")):
        over = {key: over}
    return merge(values, over)


def parse_value(text: str) -> Any:
    """A value as TOML reads it, else a plain string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def build(kind: type[T], values: Mapping[str, Any], source: str, prefix: str = "") -> T:
    """Make the frozen dataclass `kind` from plain values.

    Args:
        kind: the dataclass; its annotations are the allowed types.
        values: what was configured; keys left out keep their defaults.
        source: file or command line, for messages.
        prefix: dotted path of this section, for messages.

    Raises:
        ConfigError: naming source, key, what is allowed, and the nearest match.
    """
    hints = typing.get_type_hints(kind)
    fields = {field.name: hints[field.name] for field in dataclasses.fields(typing.cast(Any, kind))}
    made = {}
    for key, value in values.items():
        path = f"{prefix}{key}"
        if key not in fields:
            what = f"key of {prefix[:-1]}" if prefix else "key"
            raise ConfigError(f"{source}: {unknown(what, key, fields)}")
        if dataclasses.is_dataclass(fields[key]):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{source}: {path} must be a table, got {value!r}")
            made[key] = build(typing.cast(Any, fields[key]), value, source, f"{path}.")
        else:
            made[key] = checked(value, fields[key], source, path)
    try:
        return kind(**made)
    except ValueError as error:
        raise ConfigError(f"{source}: {error}") from error


def check_call(
    function: Callable[..., Any],
    values: Mapping[str, Any],
    source: str,
    prefix: str,
    given: Iterable[str] = (),
) -> dict[str, Any]:
    """Options for `function`, checked against its signature.

    Args:
        function: what will be called; its annotations are the allowed types.
        values: what was configured.
        source: file or command line, for messages.
        prefix: name of the section, for messages.
        given: arguments that come from elsewhere and may not be configured.

    Raises:
        ConfigError: as `build` does, and for a required option that is missing.
    """
    target = function.__init__ if inspect.isclass(function) else function
    hints = typing.get_type_hints(target)
    parameters = {
        name: parameter
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is not parameter.VAR_KEYWORD and name not in given
    }
    for key in values:
        if key not in parameters:
            raise ConfigError(f"{source}: {unknown(f'key of {prefix}', key, parameters)}")
    for name, parameter in parameters.items():
        if parameter.default is parameter.empty and name not in values:
            hint = describe(hints.get(name, Any))
            raise ConfigError(f"{source}: {prefix}.{name} is missing; it must be {hint}")
    return {
        key: checked(value, hints.get(key, Any), source, f"{prefix}.{key}")
        for key, value in values.items()
    }


def checked(value: Any, hint: Any, source: str, path: str) -> Any:
    """The value, if it is of the annotated type; integers serve as floats, ``none`` as None."""
    if value == "none" and fits(None, hint):
        return None
    if not fits(value, hint):
        raise ConfigError(f"{source}: {path} must be {describe(hint)}, got {value!r}")
    wants_float = hint is float or (
        float in typing.get_args(hint) and int not in typing.get_args(hint)
    )
    return float(value) if wants_float and type(value) is int else value


def fits(value: Any, hint: Any) -> bool:
    """Whether a plain value is of an annotated type."""
    origin = typing.get_origin(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, option) for option in typing.get_args(hint))
    if hint is type(None):
        return value is None
    if hint is float:
        return type(value) in (int, float)
    if origin is not None:
        if origin in (list, tuple, Sequence):
            return isinstance(value, list | tuple)
        return isinstance(value, origin)
    if hint is int:
        return type(value) is int
    return isinstance(value, hint)


def describe(hint: Any) -> str:
    """An annotated type in words.

    >>> describe(int | None)
    'an integer or none'
    """
    names = {
        int: "an integer",
        float: "a number",
        str: "a text",
        bool: "true or false",
        type(None): "none",
    }
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(describe(option) for option in typing.get_args(hint))
    origin = typing.get_origin(hint) or hint
    if origin in (list, tuple, Sequence):
        return "a list"
    return names.get(
        origin, "a table" if origin in (dict, Mapping) else str(getattr(origin, "__name__", origin))
    )


def plain(config: Any) -> dict[str, Any]:
    """A dataclass as plain values, ready for JSON.

    Raises TypeError for anything else.
    """
    values: dict[str, Any] = dataclasses.asdict(config)
    return values
