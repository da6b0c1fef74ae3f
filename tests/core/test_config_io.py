import dataclasses
import json
from typing import Literal

import pytest

from jaxherd.core.config_io import from_dict, to_dict
from jaxherd.core.errors import JaxherdError


@dataclasses.dataclass(frozen=True)
class Part:
    size: int = 3
    rate: float = 0.5
    kind: Literal["a", "b"] = "a"


@dataclasses.dataclass(frozen=True)
class Whole:
    parts: tuple[Part, ...]
    other: Part | None = None
    pair: tuple[int, str] = (1, "x")
    flag: bool = False

    def __post_init__(self):
        if not self.parts:
            raise ValueError("no parts")


def test_round_trip_through_json():
    whole = Whole((Part(), Part(7, 1.0, "b")), Part(2), (4, "y"), True)
    assert from_dict(json.loads(json.dumps(to_dict(whole))), [Whole, Part]) == whole


@pytest.mark.parametrize(
    "change, message",
    [
        ({"class": "Hole"}, "did you mean 'Whole'"),
        ({"flagg": True}, "did you mean 'flag'"),
        ({"flag": 1}, "no bool"),
        ({"parts": []}, "no parts"),
        ({"parts": "abc"}, "parts"),
        ({"other": {"class": "Part", "size": "3"}}, "config.other.size"),
        ({"other": {"class": "Part", "size": True}}, "config.other.size"),
        ({"other": {"class": "Part", "kind": "c"}}, "Choices: a, b"),
        ({"other": {"class": "Whole", "parts": [{"class": "Part"}]}}, "config.other"),
        ({"pair": [1]}, "config.pair"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    data = {**to_dict(Whole((Part(),))), **change}
    with pytest.raises(JaxherdError, match=message):
        from_dict(data, [Whole, Part])


def test_only_listed_classes_are_built():
    with pytest.raises(JaxherdError, match="Part"):
        from_dict(to_dict(Whole((Part(),))), [Whole])


def test_other_values_are_refused():
    with pytest.raises(JaxherdError, match="object"):
        to_dict(object())
