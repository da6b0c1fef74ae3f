"""Rows by group: the order, its inverse and the sizes against NumPy's stable sort."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxherd.layers.permute import by_group, permute


@pytest.mark.parametrize(
    "groups_of_rows",
    [[0], [2, 0, 1, 0, 2, 2, 5], [3] * 9, list(range(6)) * 7, [5, 4, 3, 2, 1, 0]],
    ids=["one", "gaps", "all in one", "in turn", "backwards"],
)
def test_rows_come_in_the_order_of_a_stable_sort(groups_of_rows):
    group_R = np.asarray(groups_of_rows, np.int32)
    order_R, inverse_R, sizes_G = jax.jit(by_group, static_argnums=1)(group_R, 6)
    np.testing.assert_array_equal(order_R, np.argsort(group_R, kind="stable"))
    np.testing.assert_array_equal(inverse_R, np.argsort(order_R))
    np.testing.assert_array_equal(sizes_G, np.bincount(group_R, minlength=6))


def test_permuting_back_gives_the_rows():
    rows = jnp.arange(24.0).reshape(8, 3)
    order_R, inverse_R, _ = by_group(jnp.asarray([1, 0, 1, 1, 0, 2, 0, 1]), 3)
    chex.assert_trees_all_equal(
        permute(permute(rows, order_R, inverse_R), inverse_R, order_R), rows
    )


def test_keys_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="32-bit"):
        by_group(jnp.zeros(1 << 20, jnp.int32), 1 << 12)
