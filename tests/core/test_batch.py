import jax
import numpy as np
import pytest

from jaxherd.core.batch import BatchField, abstract, check, to_global
from jaxherd.core.errors import JaxherdError

SPEC = {
    "audio": BatchField((4, 80, 7), "float32", ("batch", "time", None)),
    "label": BatchField((4,), np.int32, ("batch",)),
}


def _batch(rows=4):
    return {"audio": np.ones((rows, 80, 7), np.float32), "label": np.arange(rows, dtype=np.int32)}


def test_abstract_and_global():
    mesh = jax.make_mesh((1,), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.P("data"))
    shapes = abstract(SPEC, {"audio": sharding, "label": sharding})
    arrays = to_global(_batch(), sharding)
    for name, shape in shapes.items():
        assert (arrays[name].shape, arrays[name].dtype) == (shape.shape, shape.dtype)
        assert arrays[name].sharding == shape.sharding == sharding
    assert abstract(SPEC)["audio"].sharding is None


def test_check():
    check(_batch(), SPEC)
    check(_batch(2), SPEC, process_count=2)
    for change, words in [
        ({"label": None}, "no field 'label'"),
        ({"audoi": np.zeros(1)}, "did you mean 'audio'"),
        ({"label": np.zeros((3,), np.int32)}, r"shape \(3,\), expected \(4,\)"),
        ({"label": np.zeros((4,), np.int64)}, "dtype int64, expected int32"),
    ]:
        batch = {k: v for k, v in {**_batch(), **change}.items() if v is not None}
        with pytest.raises(JaxherdError, match=words):
            check(batch, SPEC)


def test_axes_must_match():
    with pytest.raises(JaxherdError, match="needs 2 axis names"):
        BatchField((1, 2), "int32", ("batch",))


def test_sharding_must_be_there():
    with pytest.raises(JaxherdError, match="'label'"):
        abstract(SPEC, {"audio": None})
