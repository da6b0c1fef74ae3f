"""Frozen dataclasses to JSON values and back, by an explicit list of allowed classes.

A dataclass becomes `{"class": "Name", field: value, ...}`.  Reading checks every value against
the field's annotation and builds only classes that the caller lists; nothing is evaluated.
"""

import dataclasses
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from jaxherd.core.errors import JaxherdError, nearest


def to_dict(config: Any) -> Any:
    """Return `config` as values that `json.dumps` takes.

    Raises:
      JaxherdError: a value that is neither a dataclass, tuple, list, text, number, bool nor None.
    """
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        fields = {f.name: to_dict(getattr(config, f.name)) for f in _fields(type(config))}
        return {"class": type(config).__name__, **fields}
    if isinstance(config, tuple | list):
        return [to_dict(item) for item in config]
    if config is None or isinstance(config, bool | int | float | str):
        return config
    raise JaxherdError(f"a config cannot hold a value of type {type(config).__name__}.")


def from_dict(data: Any, allowed: Iterable[type], *, where: str = "config") -> Any:
    """Return the dataclass that `to_dict` wrote.

    Args:
      data: what `json.loads` gave.
      allowed: the classes that may be built, nested ones included.
      where: what to call the place in messages.
    Raises:
      JaxherdError: an unknown class or field, a missing field or a value of the wrong type.
    """
    return _build(data, {cls.__name__: cls for cls in allowed}, where)


def _fields(cls: type) -> list[dataclasses.Field]:
    return [f for f in dataclasses.fields(cls) if f.init]


def _build(data: Any, allowed: Mapping[str, type], where: str) -> Any:
    if not isinstance(data, Mapping) or not isinstance(data.get("class"), str):
        raise JaxherdError(f"{where} is no object with a 'class'.")
    name = data["class"]
    if name not in allowed:
        raise JaxherdError(f"{where} names the class {name!r}: " + nearest(name, allowed))
    cls = allowed[name]
    hints, names = typing.get_type_hints(cls), [f.name for f in _fields(cls)]
    values = {}
    for key, value in data.items():
        if key == "class":
            continue
        if key not in names:
            raise JaxherdError(f"{where}: {name} has no field {key!r}: " + nearest(key, names))
        values[key] = _value(hints[key], value, allowed, f"{where}.{key}")
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise JaxherdError(f"{where} is not a valid {name}: {error}.") from error


def _value(annotation: Any, value: Any, allowed: Mapping[str, type], where: str) -> Any:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _one_of(arguments, value, allowed, where)
    if origin is typing.Literal:
        if value in arguments:
            return value
        raise JaxherdError(f"{where} is {value!r}: " + nearest(str(value), map(str, arguments)))
    if origin is tuple and isinstance(value, list):
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            kinds = (arguments[0],) * len(value)
        else:
            kinds = arguments
        if len(kinds) == len(value):
            items = enumerate(zip(kinds, value))
            return tuple(_value(k, v, allowed, f"{where}[{i}]") for i, (k, v) in items)
    elif dataclasses.is_dataclass(annotation):
        built = _build(value, allowed, where)
        if isinstance(built, typing.cast(type, annotation)):
            return built
    elif annotation is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif (
        isinstance(annotation, type)
        and isinstance(value, annotation)
        and (annotation is bool or not isinstance(value, bool))
    ):
        return value
    raise JaxherdError(
        f"{where} is {value!r}, which is no {getattr(annotation, '__name__', annotation)}."
    )


def _one_of(options: tuple, value: Any, allowed: Mapping[str, type], where: str) -> Any:
    if value is None and type(None) in options:
        return None
    failure = None
    for option in options:
        if option is type(None):
            continue
        try:
            return _value(option, value, allowed, where)
        except JaxherdError as error:
            failure = error
    raise failure or JaxherdError(f"{where} cannot be {value!r}.")
