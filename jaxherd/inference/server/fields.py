"""Reading fields of a JSON request, each with the sentence that says what is wrong with it."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from jaxherd.core.errors import nearest
from jaxherd.inference.server.errors import bad_request


def parse_json(body: bytes) -> dict[str, Any]:
    """Return a request's object.

    Raises:
      ApiError: the body is no UTF-8, no JSON (NaN and infinity are none), or no object; a text in
        it is no Unicode (half a surrogate pair).
    """

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is no JSON")

    try:
        data = json.loads(body.decode("utf-8"), parse_constant=refuse)
        json.dumps(data, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError:
        raise bad_request("the body is not UTF-8.") from None
    except UnicodeEncodeError:
        raise bad_request("a text of the body has half a surrogate pair.") from None
    except RecursionError:
        raise bad_request("the body is nested too deeply.") from None
    except ValueError as error:
        raise bad_request(f"the body is not JSON: {str(error)[:200]}.") from None
    if not isinstance(data, dict):
        raise bad_request("the body must be a JSON object.")
    return data


def check_names(data: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    """Raise ApiError for a field that is not known, as OpenAI does, with the nearest name."""
    for name in data:
        if name not in known:
            raise bad_request(
                f"{where} has no field {name[:60]!r}: {nearest(name[:60], known)}", param=name[:60]
            )


def boolean(data: Mapping[str, Any], name: str, default: bool = False) -> bool:
    """Return a true or false."""
    value = data.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise bad_request(f"{name} must be true or false, not {shown(value)}.", param=name)
    return value


def integer(
    data: Mapping[str, Any],
    name: str,
    default: int | None = None,
    *,
    least: int,
    most: int,
) -> int | None:
    """Return a whole number from `least` to `most`."""
    value = data.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int):
        raise bad_request(f"{name} must be a whole number, not {shown(value)}.", param=name)
    if not least <= value <= most:
        raise bad_request(f"{name} must be from {least} to {most}, not {shown(value)}.", param=name)
    return value


def number(
    data: Mapping[str, Any],
    name: str,
    default: float | None = None,
    *,
    least: float,
    most: float,
    above: bool = False,
) -> float | None:
    """Return a number from `least` to `most`; `above` leaves `least` itself out."""
    value = data.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise bad_request(f"{name} must be a number, not {shown(value)}.", param=name)
    if not least <= value <= most or (above and value == least) or not math.isfinite(value):
        low = f"above {least:g}" if above else f"at least {least:g}"
        raise bad_request(
            f"{name} must be {low} and at most {most:g}, not {shown(value)}.", param=name
        )
    return float(value)


def text(data: Mapping[str, Any], name: str) -> str:
    """Return a text that must be there."""
    value = data.get(name)
    if not isinstance(value, str):
        raise bad_request(f"{name} must be a text, not {shown(value)}.", param=name)
    return value


def neutral(data: Mapping[str, Any], allowed: Mapping[str, Sequence[Any]], where: str) -> None:
    """Raise ApiError if a field that is not served has a value which would change the answer.

    Args:
      allowed: field -> the values that change nothing; null always does not.
      where: as in "chat completions".
    """
    for name, values in allowed.items():
        value = data.get(name)
        # 0 == False: a type of its own decides.
        if value is None or any(value == v and type(value) is type(v) for v in values):
            continue
        if isinstance(value, float) and value == 0 and 0 in values:
            continue
        raise bad_request(
            f"{name} is not served: leave it out of {where} on this server.",
            param=name,
            code="unsupported_parameter",
        )


def shown(value: Any) -> str:
    """Return a short form of a value for a message."""
    form = json.dumps(value, ensure_ascii=True)
    return form if len(form) <= 60 else form[:57] + "..."
