"""Wilson's interval against figures worked out elsewhere, and its ends."""

import pytest

from jaxherd.methods.intervals import wilson


@pytest.mark.parametrize(
    "hits, trials, low, high",
    # The first is Newcombe's (1998) table I, method 3; the ends follow from the formula by hand.
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (29, 29, 0.8830, 1.0),
    ],
)
def test_known_intervals(hits, trials, low, high):
    found = wilson(hits, trials)
    assert found == pytest.approx((low, high), abs=6e-5)


def test_nothing_tried_tells_nothing():
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(5, 10, z=0.0) == (0.5, 0.5)
