"""Options as tables: each field of a dataclass declares its group, its help and the rule for its value.

The command line, the YAML file and the checks are all derived from these tables, so they cannot disagree.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastlora.errors import ConfigError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


@dataclass(frozen=True)
class Rule:
    """A condition on a value and the words that state it in an error."""

    text: str
    holds: Callable[[Any], bool]


POSITIVE = Rule("> 0", lambda value: value > 0)
FINITE = Rule("a finite number", math.isfinite)
NOT_NEGATIVE = Rule(">= 0", lambda value: value >= 0)
AT_LEAST_ONE = Rule(">= 1", lambda value: value >= 1)
PROBABILITY = Rule(">= 0 and < 1", lambda value: 0 <= value < 1)
NOT_EMPTY = Rule("not empty", lambda value: len(value) > 0)


def one_of(*names: str) -> Rule:
    """The rule of an option with a fixed set of values."""
    return Rule("one of " + ", ".join(names), lambda value: value in names)


def option(
    group: str,
    default: Any,
    text: str,
    rule: Rule | None = None,
    resumable: bool = False,
) -> Any:
    """Declares a field. group, text: for --help. resumable: whether a resumed run may change it."""
    about = {"group": group, "help": text, "rule": rule, "resumable": resumable}
    return dataclasses.field(default=default, metadata=about)


def declared(options: Any) -> dict[str, dataclasses.Field[Any]]:
    """The fields of a dataclass or its instance that `option` declared, by name."""
    return {spec.name: spec for spec in dataclasses.fields(options) if "group" in spec.metadata}


def check_options(options: DataclassInstance) -> None:
    """Converts every declared field to its type, in place, and checks its rule; text without a rule must be NOT_EMPTY.

    Raises: ConfigError, naming the field, the expected and the given value.
    """
    for name, spec in declared(options).items():
        value = _converted(type(options), name, getattr(options, name))
        rule: Rule | None = spec.metadata["rule"] or (NOT_EMPTY if isinstance(value, str) else None)
        if rule is not None and value is not None and not rule.holds(value):
            raise ConfigError(f"{name}: expected {rule.text}, got {value!r}")
        object.__setattr__(options, name, value)


_hints = cache(typing.get_type_hints)


def value_type(options: type, name: str) -> type:
    """The type of a field's value (int, float, bool, str or tuple), without None."""
    hint = _hints(options)[name]
    kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
    plain = kinds[0] if type(None) in typing.get_args(hint) else hint
    return typing.cast(type, typing.get_origin(plain) or plain)


def _converted(options: type, name: str, value: Any) -> Any:
    """A value in its field's type: YAML reads `1e-3` as text and gives lists."""
    if value is None and type(None) in typing.get_args(_hints(options)[name]):
        return None
    kind = value_type(options, name)
    if kind is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        with suppress(ValueError):
            if math.isfinite(number := float(value)):
                return number
    elif kind is tuple and isinstance(value, (list, tuple)):
        if all(isinstance(item, str) for item in value):
            return tuple(value)
    elif kind is str and isinstance(value, (str, Path)):
        return str(value)
    elif type(value) is kind:  # int and bool: True is not an integer
        return value
    wanted = {float: "a finite number", int: "an integer", tuple: "a list of names"}
    wanted |= {bool: "true or false", str: "text"}
    raise ConfigError(f"{name}: expected {wanted[kind]}, got {value!r}")
