"""Cycle estimates: their files, and one tiny program in a child process."""

import pytest

from jaxherd.core.errors import JaxherdError
from jaxherd.planning import cycles

pytest.importorskip("libtpu", reason="needs the TPU compiler: pip install 'jaxherd[tpu]'")


def case(size):
    import jax.numpy as jnp

    def product(x, y):
        return jnp.dot(x, y, preferred_element_type=jnp.float32)

    return product, [((size, size), "bfloat16")] * 2


def test_a_product_is_priced_by_compute_and_bytes():
    found = cycles.estimate("v5e", f"{__file__}:case", {"size": 1024})
    assert found.bytes == 1024**2 * (2 + 2 + 4)
    assert found.floor == pytest.approx(found.bytes / 819e9 * 1.5e9)
    # 2 n^3 over 197 TFLOP/s at 1.5 GHz, reached to between a half and the whole.
    peak = 2 * 1024**3 / 197e12 * 1.5e9
    assert peak <= found.compute <= 2 * peak
    assert found.cycles == max(found.compute, found.floor)
    given = cycles.estimate("v5e", f"{__file__}:case", {"size": 1024}, moved=1e9)
    assert given.cycles == given.floor > given.compute


def test_files(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "dot.1_static_llo_profile.textproto").write_text("x { estimated_cycles: 12 }")
    (tmp_path / "a" / "b" / "add_static_llo_profile.textproto").write_text("nothing")
    assert cycles.read_profiles(tmp_path) == {"dot.1": 12}


def test_what_is_wrong_is_told():
    with pytest.raises(JaxherdError, match="No TPU compiler for 'v9'"):
        cycles.estimate("v9", f"{__file__}:case")
