"""A trained model whole on one device of each process, for passes that processes share out."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxherd.training.stage import load_model


def own_sharding() -> jax.sharding.Sharding:
    """Return the sharding of an array that the first device of every process holds whole."""
    if jax.process_count() == 1:
        return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    firsts: dict[int, Any] = {}
    for device in jax.devices():
        firsts.setdefault(device.process_index, device)
    mesh = jax.sharding.Mesh(np.array([firsts[i] for i in sorted(firsts)]), ("process",))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def load_replica(folder: Path, params: Any, buffers: Any) -> tuple[Any, Any]:
    """Return (parameters, buffers) of a stage's last checkpoint on this process's first device.

    All processes must call it together.

    Args:
      folder: of the stage.
      params, buffers: shapes and dtypes.
    Raises:
      JaxherdError: as `load_model` does.
    """
    where = own_sharding()
    wanted = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        (params, buffers),
    )
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), load_model(folder, *wanted))
