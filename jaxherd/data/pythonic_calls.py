"""Tool calls written as a Python list of calls, `[weather(city="Oslo"), now()]` (llama4.md 5).

Reading them runs nothing: the text is parsed, and only literals are taken as values.
"""

import ast
import dataclasses
import json
import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from jaxherd.core.errors import JaxherdError

_LONGEST = 100_000


@dataclasses.dataclass(frozen=True)
class ToolCall:
    """A call of a tool by name; the values of `arguments` are those that JSON has."""

    name: str
    arguments: Mapping[str, Any]


def parse_tool_calls(text: str) -> list[ToolCall]:
    """Return the calls of a text; names may have dots, arguments have names.

    Raises:
      JaxherdError: it is no such list, or says which call has what that is no literal.
    """
    if len(text) > _LONGEST:
        raise JaxherdError(f"tool calls of more than {_LONGEST} characters are not read.")
    try:
        with warnings.catch_warnings():
            # Such as for "\d" in a string, which stays as it is.
            warnings.simplefilter("ignore")
            tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        reason = getattr(error, "msg", None) or type(error).__name__
        raise JaxherdError(
            f"no list of tool calls ({reason}): expected [name(argument=value), ...]."
        ) from None
    if not isinstance(tree.body, ast.List) or not tree.body.elts:
        raise JaxherdError("no list of tool calls: expected [name(argument=value), ...].")
    return [_call(node, number) for number, node in enumerate(tree.body.elts, 1)]


def format_tool_calls(calls: Iterable[ToolCall]) -> str:
    """Return the text of calls, which `parse_tool_calls` reads back.

    Raises:
      JaxherdError: a name that is no Python name, or a value that is no literal.
    """
    written = []
    for call in calls:
        for name in (*call.name.split("."), *call.arguments):
            if not str(name).isidentifier():
                raise JaxherdError(f"{name!r} of the tool call {call.name!r} is no Python name.")
        arguments = (f"{name}={_literal(value)}" for name, value in call.arguments.items())
        written.append(f"{call.name}({', '.join(arguments)})")
    return f"[{', '.join(written)}]"


def _call(node: ast.expr, number: int) -> ToolCall:
    if not isinstance(node, ast.Call):
        raise JaxherdError(f"item {number} is no call: expected name(argument=value).")
    name = _dotted(node.func)
    if name is None:
        raise JaxherdError(f"call {number} has no plain name.")
    if node.args:
        raise JaxherdError(f"call {number}, {name}, has an argument without a name.")
    arguments: dict[str, Any] = {}
    for keyword in node.keywords:
        if keyword.arg is None or keyword.arg in arguments:
            what = "**" if keyword.arg is None else f"{keyword.arg!r} twice"
            raise JaxherdError(f"call {number}, {name}, has {what} among its arguments.")
        try:
            arguments[keyword.arg] = _plain(ast.literal_eval(keyword.value))
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            raise JaxherdError(
                f"call {number}, {name}: the value of {keyword.arg!r} is no literal (a text, a "
                "number, True, False, None, or a list or dict of these)."
            ) from None
    return ToolCall(name, arguments)


def _dotted(node: ast.expr) -> str | None:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        before = _dotted(node.value)
        return None if before is None else f"{before}.{node.attr}"
    return None


def _plain(value: Any) -> Any:
    """Return a literal with values that JSON has: tuples as lists.

    Raises:
      ValueError: bytes, sets, complex numbers, infinity, keys that are no texts.
    """
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _plain(item) for key, item in value.items()}
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    raise ValueError(f"{type(value).__name__} has no JSON")


def _literal(value: Any) -> str:
    if isinstance(value, str):
        # What JSON escapes, Python reads.
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_literal, value))}]"
    if isinstance(value, Mapping):
        pairs = (f"{_literal(str(key))}: {_literal(item)}" for key, item in value.items())
        return f"{{{', '.join(pairs)}}}"
    if value is None or isinstance(value, bool | int):
        return str(value)
    if isinstance(value, float) and math.isfinite(value):
        return str(value)
    raise JaxherdError(f"{value!r} cannot be an argument of a tool call: it is no literal.")
