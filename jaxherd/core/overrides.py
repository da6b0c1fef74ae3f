"""Typed overrides of nested frozen dataclasses: `path.to.field=value`.

Values are read by the field's annotation, never evaluated.  A wrong name is answered with the
nearest right one; a wrong value with the type that was wanted.
"""

import dataclasses
import enum
import json
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from jaxherd.core.errors import JaxherdError, nearest

T = TypeVar("T")


def parse_assignment(text: str) -> tuple[tuple[str, ...], str]:
    """Split `a.b=value` into (("a", "b"), "value").

    Raises:
      JaxherdError: there is no `=` or the path is empty.
    """
    path, equals, value = text.partition("=")
    if not equals or not path.strip():
        raise JaxherdError(f"--set {text!r}: write path.to.field=value.")
    return tuple(part.strip() for part in path.split(".")), value.strip()


def replace_at(config: T, path: Sequence[str], value: str, *, shown: str = "") -> T:
    """Return `config` with the field at `path` set to the parsed `value`.

    Args:
      config: a (frozen) dataclass, possibly nested; tuples are indexed by number.
      path: field names from the outside in.
      value: text, read by the annotation of the last field.
    Raises:
      JaxherdError: a name that does not exist or a value of the wrong type.
    """
    shown = shown or ".".join(path)
    head, *rest = path
    if isinstance(config, tuple) and not hasattr(config, "_fields"):
        index = _index(head, len(config), shown)
        item = config[index]
        new = (
            replace_at(item, rest, value, shown=shown) if rest else _parse(type(item), value, shown)
        )
        return typing.cast(T, config[:index] + (new,) + config[index + 1 :])
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        raise JaxherdError(
            f"--set {shown}: {head!r} has no place inside a value of type {type(config).__name__}."
        )
    names = [field.name for field in dataclasses.fields(config) if field.init]
    if head not in names:
        raise JaxherdError(
            f"--set {shown}: {type(config).__name__} has no field {head!r}; " + nearest(head, names)
        )
    if rest:
        new = replace_at(getattr(config, head), rest, value, shown=shown)
    else:
        annotation = typing.get_type_hints(type(config)).get(head, Any)
        new = _parse(annotation, value, shown)
    try:
        return dataclasses.replace(config, **{head: new})
    except (TypeError, ValueError) as error:
        if isinstance(error, JaxherdError):
            raise
        raise JaxherdError(f"--set {shown}={value}: {error}") from error


def has_path(config: Any, path: Sequence[str]) -> bool:
    """Return whether the first name of `path` is a field of `config`."""
    return dataclasses.is_dataclass(config) and path[0] in {
        f.name for f in dataclasses.fields(config)
    }


def from_the_front(config: Any, path: Sequence[str]) -> tuple[str, ...]:
    """Return the path with indices of tuples counted from the front, as far as it leads."""
    found = []
    for name in path:
        if isinstance(config, tuple):
            try:
                name = str(_index(name, len(config), ""))
            except JaxherdError:
                break
            config = config[int(name)]
        else:
            config = getattr(config, name, None)
        found.append(name)
    return (*found, *path[len(found) :])


def fields(config: Any) -> Iterator[tuple[str, str]]:
    """Yield (path, value as text) of every field that `replace_at` can set.

    The text is one that sets the field to the value that it has.  What text cannot give (a function,
    a mapping, a config where there is none) is left out.
    """
    if isinstance(config, tuple):
        named = [(str(index), item, type(item)) for index, item in enumerate(config)]
    else:
        hints = typing.get_type_hints(type(config))
        named = [
            (f.name, getattr(config, f.name), hints.get(f.name, Any))
            for f in dataclasses.fields(config)
            if f.init
        ]
    for name, value, annotation in named:
        text = _text(annotation, value)
        if text is not None:
            yield name, text
        elif isinstance(value, tuple) or (
            dataclasses.is_dataclass(value) and not isinstance(value, type)
        ):
            yield from ((f"{name}.{path}", inner) for path, inner in fields(value))


def _text(annotation: Any, value: Any) -> str | None:
    """Return what `_parse` reads as the value, or None."""
    if value is None:
        text = "none"
    elif isinstance(value, bool):
        text = str(value).lower()
    elif isinstance(value, enum.Enum):
        text = value.name
    elif value == () and typing.get_args(annotation)[:1] not in ((int,), (float,), (str,)):
        return None  # nothing could be put into it
    elif isinstance(value, tuple):
        parts = [_text(type(item), item) for item in value]
        if None in parts:
            return None
        text = ",".join(part for part in parts if part is not None)
    elif isinstance(value, int | float | str):
        text = str(value)
    else:
        return None
    if text != text.strip():  # an assignment's value is stripped
        return None
    try:
        read = _parse(annotation, text, "")
    except JaxherdError:
        return None
    return text if read == value and isinstance(read, bool) == isinstance(value, bool) else None


def _index(text: str, length: int, shown: str) -> int:
    try:
        index = int(text)
    except ValueError:
        index = length
    if not -length <= index < length:
        raise JaxherdError(f"--set {shown}: {text!r} is not an index below {length}.")
    return index % length


def _parse(annotation: Any, text: str, shown: str) -> Any:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        if type(None) in arguments and text.lower() in ("none", "null"):
            return None
        failures = []
        for option in arguments:
            if option is type(None):
                continue
            try:
                return _parse(option, text, shown)
            except JaxherdError as error:
                failures.append(error)
        raise failures[0]
    if origin is typing.Literal:
        for choice in arguments:
            if text == str(choice):
                return choice
        raise JaxherdError(
            f"--set {shown}={text}: not a choice; " + nearest(text, map(str, arguments))
        )
    if annotation is Any:
        return _json_or_text(text)
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        names = [member.name for member in annotation]
        if text in names:
            return annotation[text]
        raise JaxherdError(f"--set {shown}={text}: not a choice; " + nearest(text, names))
    if annotation is bool:
        if text.lower() in ("true", "1", "yes"):
            return True
        if text.lower() in ("false", "0", "no"):
            return False
        raise JaxherdError(f"--set {shown}={text}: wants true or false.")
    if annotation in (int, float):
        try:
            number = float(text.replace("_", ""))
            if annotation is int:
                if number != int(number):
                    raise ValueError
                return (
                    int(text.replace("_", ""))
                    if text.lstrip("+-").replace("_", "").isdigit()
                    else int(number)
                )
            return number
        except (ValueError, OverflowError):
            raise JaxherdError(f"--set {shown}={text}: wants {_article(annotation)}.") from None
    if annotation is str:
        return text
    if origin is tuple or annotation is tuple:
        return _parse_tuple(arguments, text, shown)
    raise JaxherdError(
        f"--set {shown}: a {getattr(annotation, '__name__', annotation)} cannot be given as text; "
        "set one of its fields."
    )


def _parse_tuple(arguments: tuple, text: str, shown: str) -> tuple:
    inner = text.strip().removeprefix("(").removeprefix("[").removesuffix(")").removesuffix("]")
    parts = [part.strip() for part in inner.split(",") if part.strip()]
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return tuple(_parse(arguments[0], part, shown) for part in parts)
    if arguments and len(arguments) != len(parts):
        raise JaxherdError(
            f"--set {shown}={text}: wants {len(arguments)} values, got {len(parts)}."
        )
    kinds = arguments or (Any,) * len(parts)
    return tuple(_parse(kind, part, shown) for kind, part in zip(kinds, parts))


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _article(annotation: type) -> str:
    return "a whole number" if annotation is int else "a number"
