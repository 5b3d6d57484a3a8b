"""Declare the keys of a configuration: default, meaning, bounds, and whether a key decides the trained weights."""

from __future__ import annotations

import copy
import dataclasses
import functools
import operator
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

NOT_NEUTRAL = object()
BOUNDS = {
    "ge": (operator.ge, "at least"),
    "gt": (operator.gt, "greater than"),
    "le": (operator.le, "at most"),
    "lt": (operator.lt, "less than"),
}


def key(default: Any, help: str, *, decides: bool | None = None, neutral: Any = NOT_NEUTRAL, **bounds: float) -> Any:
    """Return a dataclass field with a default, a meaning in Markdown for the documentation, and BOUNDS such as `ge=1`.

    `decides=False`: the key changes no trained weight, so it is not part of a training's identity; by default a key is
    as its section. `neutral` is for a key that is added to a released schema: at this value, fingerprints and frozen
    slices are those of the program without the key.
    """
    metadata = {"help": help, "bounds": bounds, "decides": decides, "neutral": neutral}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def section(kind: Any, decides: bool | None = None) -> Any:
    """Return a dataclass field that holds a section: `kind` is its class, or a function that makes its defaults."""
    return field(default_factory=kind, metadata={"decides": decides})


@dataclass(frozen=True)
class Key:
    """A key of a schema: its name in dot notation, its type, its default and what `key` or `section` said of it."""

    name: str
    hint: Any
    default: Any
    metadata: Mapping[str, Any]
    decides: bool = True

    @property
    def section(self) -> type | None:
        """The dataclass of a section, or None for a plain value."""
        return next((hint for hint in alternatives(self.hint) if dataclasses.is_dataclass(hint)), None)  # type: ignore[return-value]

    @property
    def choices(self) -> tuple[Any, ...]:
        """The allowed values of a key with `Literal` type; empty if any value is allowed."""
        literals = [hint for hint in alternatives(self.hint) if typing.get_origin(hint) is Literal]
        return tuple(value for literal in literals for value in typing.get_args(literal))

    @property
    def bounds(self) -> dict[str, float]:
        """The bounds of the value by their names in BOUNDS."""
        return self.metadata.get("bounds", {})

    @property
    def limits(self) -> str:
        """The bounds in words; empty if there are none."""
        return " and ".join(f"{BOUNDS[name][1]} {bound}" for name, bound in self.bounds.items())

    @property
    def is_mapping(self) -> bool:
        """Whether the value must be a mapping: a section or a dict."""
        return self.section is not None or any(typing.get_origin(hint) is dict for hint in alternatives(self.hint))


def alternatives(hint: Any) -> tuple[Any, ...]:
    """Return the members of a union type, or the type itself."""
    return (hint,) if typing.get_origin(hint) is Literal else (hint, *typing.get_args(hint))


@functools.cache
def keys_of(schema: type) -> dict[str, Key]:
    """Return the keys directly in a schema."""
    hints = typing.get_type_hints(schema)
    found = {}
    for f in dataclasses.fields(schema):
        default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        found[f.name] = Key(f.name, hints[f.name], default, f.metadata)
    return found


@functools.cache
def all_keys(schema: type) -> tuple[Key, ...]:
    """Return the keys of a schema and of the sections in it, in dot notation, each section before its own keys."""
    return tuple(_walk(schema, None, "", True))


def _walk(schema: type, values: Any, prefix: str, decides: bool) -> Iterator[Key]:
    """Yield the keys of a section; `values` is an instance with its defaults, where they differ from the schema's."""
    for entry in keys_of(schema).values():
        own = entry.metadata.get("decides")
        default = entry.default if values is None else getattr(values, entry.name)
        found = Key(prefix + entry.name, entry.hint, default, entry.metadata, decides if own is None else own)
        yield found
        if found.section:
            yield from _walk(found.section, default, f"{found.name}.", found.decides)
