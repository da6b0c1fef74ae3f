"""Targets on this machine: one spelling, a lone TPU, and slices that are not what was named."""

import dataclasses

import jax
import pytest

from jaxherd.cli import common
from jaxherd.core.errors import JaxherdError


@pytest.mark.parametrize(
    ("on", "scale"),
    [("CPU", "cpu"), (" cpu:2", "cpu"), ("GPU:8", "gpu"), ("H100", "gpu"), ("TPU", "full"),
     ("V5P:4x4x8", "full"), ("2*v5e:4x4", "full")],
)  # fmt: skip
def test_scale_follows_from_any_spelling(on, scale):
    assert common.scale_for(on, None) == scale
    assert common.scale_for(on, "cpu") == "cpu"


def test_capitals_are_no_other_platform():
    assert [d.platform for d in common.local_devices("CPU:2")] == ["cpu", "cpu"]
    with pytest.raises(JaxherdError, match="between 1 and 4096"):
        common.local_devices("cpu:0")


@dataclasses.dataclass(frozen=True)
class Device:
    id: int
    device_kind: str = "TPU v5 lite"
    platform: str = "tpu"


@pytest.fixture
def tpus(monkeypatch):
    """Return a function that shows so many TPUs; no workers can be joined unless it says so."""

    def install(count: int, *, joins: bool = False, workers: int = 1, local: int | None = None):
        devices = [Device(i) for i in range(count)]

        def initialize():
            if not joins:
                raise ValueError("coordinator_address should be defined.")

        def found(backend=None):
            if not devices:
                raise RuntimeError("Unknown backend tpu")
            return devices

        monkeypatch.delenv("JAXHERD_COORDINATOR", raising=False)
        monkeypatch.setattr(jax.distributed, "initialize", initialize)
        monkeypatch.setattr(jax, "devices", found)
        monkeypatch.setattr(jax, "local_devices", lambda backend=None: devices[:local])
        monkeypatch.setattr(jax, "process_count", lambda: workers)
        return tuple(devices)

    return install


def test_a_lone_tpu_needs_no_cluster(tpus):
    devices = tpus(8)
    assert common.local_devices("tpu") == common.local_devices("TPU") == devices
    assert common.local_devices("v5e:2x4") == common.local_devices("v5litepod-8") == devices


def test_workers_that_join(tpus):
    devices = tpus(16, joins=True, workers=4, local=4)
    assert common.local_devices("v5e:4x4") == devices


def test_a_worker_that_could_not_join(tpus):
    tpus(16, workers=4, local=4)
    with pytest.raises(JaxherdError, match="one of 4 workers .* could not join"):
        common.local_devices("tpu")


def test_no_tpu(tpus):
    tpus(0)
    with pytest.raises(JaxherdError, match="no TPU on this machine for --on v5e:4x4") as error:
        common.local_devices("v5e:4x4")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("on", ["v5e:4x4", "2*v5e:2x4", "v6e:2x4", "v5p-16"])
def test_another_slice_than_was_named(tpus, on):
    tpus(8, joins=True)
    with pytest.raises(JaxherdError, match=r"here are 8 of 'TPU v5 lite'.*--on tpu") as error:
        common.local_devices(on)
    assert "\n" not in str(error.value)
