"""Run-config keys to frozen dataclasses: typed, validated, and an unknown key names its nearest neighbour.

A field ``learning_rate`` of a dataclass read with prefix ``"fedmerge."`` is the key ``fedmerge.learning-rate``. Its
type and default are the key's, and the string below it says what the key means. ``make docs`` makes the tables of
pyproject.toml, which Flower reads, and docs/options.md from these three; nothing else declares a key.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

RunConfig = Mapping[str, bool | float | int | str]
C = TypeVar("C")


@dataclasses.dataclass(frozen=True)
class NoOptions:
    """The options of a strategy that has none."""


class OptionError(ValueError):
    """A run-config key is unknown, or its value has the wrong type or is out of range."""


def key_of(field: str, prefix: str = "") -> str:
    """The run-config key of a dataclass field."""
    return prefix + field.replace("_", "-")


def keys_of(kind: type[Any], prefix: str = "") -> dict[str, Any]:
    """Every run-config key of an options dataclass, with its default."""
    return {key_of(field.name, prefix): field.default for field in dataclasses.fields(kind)}


def read_options(kind: type[C], run_config: RunConfig, prefix: str = "") -> C:
    """An options dataclass filled from run-config; absent keys keep their defaults.

    Raises:
        OptionError: a value has the wrong type, or the dataclass refuses it.
    """
    hints = typing.get_type_hints(kind)
    values: dict[str, Any] = {}
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        key = key_of(field.name, prefix)
        if key in run_config:
            values[field.name] = _convert(key, run_config[key], hints[field.name])
    try:
        return kind(**values)
    except OptionError:
        raise
    except ValueError as error:
        raise OptionError(f"{prefix or 'run-config: '}{error}") from None


def problems_of(kinds: Iterable[tuple[str, type[Any]]], run_config: RunConfig) -> list[str]:
    """Everything that is wrong with run-config, one line each: unknown keys, types, and what each dataclass refuses."""
    kinds = list(kinds)
    known = {key for prefix, kind in kinds for key in keys_of(kind, prefix)}
    found: list[str] = []
    for key in [key for key in run_config if key not in known]:
        found += _problem(lambda key=key: require_known({key: 0}, known))  # type: ignore[misc]
    for prefix, kind in kinds:
        hints, sound = typing.get_type_hints(kind), {}
        for field in dataclasses.fields(kind):
            key = key_of(field.name, prefix)
            if key in run_config:
                wrong = _problem(lambda key=key, hint=hints[field.name]: _convert(key, run_config[key], hint))  # type: ignore[misc]
                found += wrong
                sound.update({} if wrong else {key: run_config[key]})
        if sound:
            found += _problem(lambda kind=kind, sound=sound, prefix=prefix: read_options(kind, sound, prefix))  # type: ignore[misc]
    return found


def _problem(attempt: Callable[[], object]) -> list[str]:
    try:
        attempt()
    except OptionError as error:
        return [str(error)]
    return []


def require_known(run_config: Mapping[str, Any], known: Iterable[str]) -> None:
    """Refuse a key that nobody reads.

    Raises:
        OptionError: naming the unknown key and the nearest known one.
    """
    known = sorted(known)
    for key in run_config:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"
            raise OptionError(f"unknown run-config key {key!r}; {hint}")


def require_choice(key: str, value: str, choices: Iterable[str]) -> None:
    """Refuse a value that is not among the choices.

    Raises:
        OptionError: naming the key, the value and the choices.
    """
    choices = [str(choice) for choice in choices]
    if value not in choices:
        close = difflib.get_close_matches(value, choices, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise OptionError(f"{key} = {value!r}{hint}, expected one of {', '.join(choices)}")


def require_range(key: str, value: float, low: float, high: float = float("inf")) -> None:
    """Refuse a number outside ``[low, high]``, and any that is not finite.

    Raises:
        OptionError: naming the key, the value and the range.
    """
    if not low <= value <= high or value == float("inf"):
        upper = f" and at most {high:.10g}" if high != float("inf") else ""
        raise OptionError(f"{key} = {value}, expected a finite number of at least {low:g}{upper}")


def _convert(key: str, value: object, hint: Any) -> object:
    if isinstance(hint, types.UnionType):
        hint = next(argument for argument in typing.get_args(hint) if argument is not type(None))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise OptionError(f"{key} is an integer beyond the largest float, expected a finite number") from None
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise OptionError(f"{key} = {value!r} is {type(value).__name__}, expected {hint.__name__}")
    return value
