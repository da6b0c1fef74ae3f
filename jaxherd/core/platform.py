"""Which platform a program is being traced for.

Never ask `jax.default_backend()` while tracing: a program compiled ahead of time for a TPU is
traced on a machine whose default backend is the CPU.
"""

import jax

from jaxherd.core import sharding
from jaxherd.core.chips import CHIPS


def platform() -> str:
    """Return "cpu", "gpu" or "tpu": of the active mesh, or else of the default backend."""
    partitioner = sharding.active()
    if partitioner is not None:
        name = partitioner.mesh.devices.flat[0].platform
    else:
        name = jax.default_backend()
    return "gpu" if name in ("cuda", "rocm") else name


def chip() -> str | None:
    """Return the chip's name in `core.chips.CHIPS` ("v5p"), or None if it is not there."""
    partitioner = sharding.active()
    device = partitioner.mesh.devices.flat[0] if partitioner is not None else jax.devices()[0]
    for name, entry in CHIPS.items():
        if entry.device_kind == device.device_kind:
            return name
    return None
