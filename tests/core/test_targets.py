"""Names of machines, what they stand for, and how wrong ones are answered."""

import math

import pytest

from jaxherd.core.errors import JaxherdError
from jaxherd.core.targets import CHIPS, abstract_devices, known_targets, parse_target


@pytest.mark.parametrize(
    ("text", "name", "chips", "devices", "hosts"),
    [
        ("cpu", "cpu", 1, 1, 1),
        ("cpu:8", "cpu:8", 8, 8, 1),
        ("gpu", "gpu", 1, 1, 1),
        ("gpu:8", "gpu:8", 8, 8, 1),
        ("H100:16", "h100:16", 16, 16, 2),
        ("v5e:1x1", "v5e:1x1", 1, 1, 1),
        ("v5e:2x4", "v5e:2x4", 8, 8, 1),
        ("v5e:4x4", "v5e:4x4", 16, 16, 4),
        ("v5e:4x4x1", "v5e:4x4", 16, 16, 4),
        ("v5litepod-16", "v5e:4x4", 16, 16, 4),
        ("v5litepod-256", "v5e:16x16", 256, 256, 64),
        ("v6e-256", "v6e:16x16", 256, 256, 64),
        ("v6e-8", "v6e:2x4", 8, 8, 1),
        ("v5p-8", "v5p:2x2x1", 4, 4, 1),
        ("v5p-1024", "v5p:8x8x8", 512, 512, 128),
        ("v5p-256", "v5p:4x4x8", 128, 128, 32),
        ("v5p-1536", "v5p:8x8x12", 768, 768, 192),
        ("v5p-12288", "v5p:16x16x24", 6144, 6144, 1536),
        ("tpu7x:4x4x4", "tpu7x:4x4x4", 64, 128, 16),
        ("tpu7x-128", "tpu7x:4x4x4", 64, 128, 16),
        ("2*v5p:4x4x4", "2*v5p:4x4x4", 128, 128, 32),
        ("v5p:4x4x4@2", "2*v5p:4x4x4", 128, 128, 32),
        ("4*v5p-128", "4*v5p:4x4x4", 256, 256, 64),
        ("1*v5e:2x2", "v5e:2x2", 4, 4, 1),
    ],
)
def test_names(text, name, chips, devices, hosts):
    target = parse_target(text)
    assert (target.name, target.chips, target.devices, target.hosts) == (
        name,
        chips,
        devices,
        hosts,
    )
    assert parse_target(target.name) == target


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("v5e:4x3", "v5e:4x4"),
        ("v5e:4x2", "v5e:2x4"),
        ("v6e:32x32", "v6e:16x16"),
        ("v5p:8x4x4", "v5p:4x4x8"),
        ("v5p:4x4", "v5p:2x4x4"),
        ("v5p-1000", "v5p-1024"),
        ("v5p-7", "v5p-8"),
        ("v5litepod-17", "v5litepod-16"),
        ("v5p", "v5p:2x2x4"),
        ("v5q:4x4x4", "v5"),
        ("h200:8", "h100"),
        ("gpu:12", "gpu:16"),
        ("cpu:0", "between 1 and"),
        ("0*v5p:4x4x4", "between 1 and"),
        ("2*cpu:8", "cpu:8"),
        ("", "Examples"),
        ("v5p:99999x4x4", "topology"),
    ],
)
def test_wrong_names_are_answered_in_one_sentence(text, hint):
    with pytest.raises(JaxherdError) as error:
        parse_target(text)
    assert hint in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("family", ["v5e", "v5p", "v6e", "tpu7x"])
def test_every_known_target_round_trips_by_both_names(family):
    for name in known_targets(family):
        target = parse_target(name)
        assert target.name == name
        assert target.chips == math.prod(target.topology)
        by_type = parse_target(target.accelerator_type)
        assert by_type.chips == target.chips
        assert (by_type == target) == target.default_topology


def test_accelerator_type_needs_a_tpu():
    with pytest.raises(JaxherdError, match="not a TPU slice"):
        _ = parse_target("cpu:8").accelerator_type


def test_chip_table_is_consistent():
    for name, chip in CHIPS.items():
        assert chip.name == name
        assert set(chip.peak_flops) == {"bf16", "int8", "fp8", "f32"}
        assert chip.hbm_gib <= chip.nominal_hbm_gib + 1.0
    # 400 and 1200 GB/s bidirectional on the published tables.
    assert 2 * CHIPS["v5e"].ici_bytes_per_s == pytest.approx(400e9)
    assert 2 * CHIPS["v5p"].ici_bytes_per_s == pytest.approx(1200e9)
    assert CHIPS["tpu7x"].hbm_gib_per_device == pytest.approx(94.75)


@pytest.mark.parametrize(
    "name", ["v5e:1x1", "v5e:2x4", "v5p:2x2x1", "v6e:4x4", "tpu7x:2x2x1", "2*v5e:2x2"]
)
def test_abstract_tpu_devices(name):
    pytest.importorskip("libtpu")
    target = parse_target(name)
    devices = abstract_devices(target)
    assert len(devices) == target.devices
    assert {device.device_kind for device in devices} == {target.chip.device_kind}
    assert len({device.process_index for device in devices}) == target.hosts
    assert len({getattr(device, "slice_index", None) or 0 for device in devices}) == (
        target.num_slices
    )


def test_too_few_cpu_devices_names_the_flag():
    with pytest.raises(JaxherdError, match="xla_force_host_platform_device_count=4096"):
        abstract_devices(parse_target("cpu:4096"))


def test_missing_compilers_name_the_extra(monkeypatch):
    from jaxherd.core import targets

    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: None)
    targets._tpu_devices.cache_clear()
    with pytest.raises(JaxherdError, match=r"jaxherd\[tpu\]"):
        abstract_devices(parse_target("v5e:8x8"))
    with pytest.raises(JaxherdError, match=r"jaxherd\[cuda\]"):
        abstract_devices(parse_target("h100:4"))
