"""Means of sums and weights: what was not counted is absent, what is no number stays one."""

import json

import jax.numpy as jnp
import numpy as np

from jaxherd.training.loggers import JsonLines
from jaxherd.training.metrics import add, means, pair
from jaxherd.training.report import _table


def test_what_was_not_counted_is_left_out():
    found = means(
        {
            "loss": pair(6.0, 3.0),
            "zero": pair(0.0, 2.0),
            "absent": pair(0.0, 0.0),
            "all_absent": pair(jnp.zeros(2), jnp.zeros(2)),
            "some": pair(jnp.array([0.0, 4.0]), jnp.array([0.0, 2.0])),
        }
    )
    assert found.keys() == {"loss", "zero", "some"}
    assert found["loss"] == 2.0 and found["zero"] == 0.0
    np.testing.assert_array_equal(found["some"], [np.nan, 2.0])
    # In another batch it was: together it is there.
    assert means(add({"x": pair(0.0, 0.0)}, {"x": pair(3.0, 1.0)})) == {"x": 3.0}


def test_a_sum_that_is_no_number_is_told_whatever_its_weight():
    found = means({"a": pair(np.nan, 2.0), "b": pair(np.nan, 0.0), "c": pair(1.0, 0.0)})
    assert np.isnan(found["a"]) and np.isnan(found["b"]) and np.isinf(found["c"])


def test_the_log_has_no_nan(tmp_path):
    log = JsonLines(tmp_path / "metrics.jsonl")
    log.write("train", 1, means({"loss": pair(np.nan, 1.0), "loss_at/0.1": pair(0.0, 0.0)}))
    log.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text) == {"kind": "train", "step": 1, "loss": None} and "NaN" not in text


def test_the_report_takes_each_metric_where_it_was_counted():
    train = [
        {"kind": "train", "step": 1, "loss": 3.0},
        {"kind": "train", "step": 2, "loss": 2.0, "loss_at/0.1": 5.0},
        {"kind": "train", "step": 3, "loss": 1.0, "loss_at/0.1": 4.0},
        {"kind": "train", "step": 4, "loss": 0.5},
    ]
    rows = _table(train, [])
    assert "| loss | 3 | 0.5 |" in rows and "| loss_at/0.1 | 5 | 4 |" in rows
