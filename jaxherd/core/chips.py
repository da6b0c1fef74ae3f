"""What one chip of each kind can do: memory, peak arithmetic, bandwidths, with sources.

All figures are per chip unless the field says otherwise.  Sources, by tag:

- [v5e] cloud.google.com/tpu/docs/v5e, [v5p] .../v5p, [v6e] .../v6e, [7x] .../tpu7x: the "key
  specifications" tables of Google Cloud.  Their ICI figure is bidirectional and summed over a
  chip's links, so one link in one direction is that figure / links / 2.
- [info] `jax.experimental.pallas.tpu.TpuInfo` of jax 0.10.2: int8 and VMEM figures.
- [aot] measured with the TPU compiler (libtpu 0.0.42.1): the HBM limit in its out-of-memory errors
  and the clock at which its cycle estimates give the peak arithmetic rate.
- [H100], [A100] NVIDIA data sheets of the SXM 80 GB parts, dense (not sparse) rates.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType


@dataclass(frozen=True)
class Chip:
    """One kind of accelerator chip; bytes and FLOPs are decimal, GiB are binary."""

    name: str
    kind: str
    """`tpu`, `gpu` or `cpu`."""
    device_kind: str
    """What `jax.Device.device_kind` says."""
    hbm_gib: float
    """GiB of memory a program may use, as the compiler (GPU: JAX's allocator) enforces it."""
    nominal_hbm_gib: float
    """GiB of memory on the data sheet."""
    peak_flops: Mapping[str, float] = field(hash=False)
    """FLOP/s of dense matmuls by operand type: `bf16`, `int8`, `fp8`, `f32`."""
    hbm_bytes_per_s: float
    ici_bytes_per_s_per_link: float
    """Bytes/s of one interconnect link in one direction."""
    ici_links: int
    clock_hz: float
    """Cycles/s by which the compiler's `estimated_cycles` turn into seconds."""
    tensor_cores: int
    devices_per_chip: int
    """JAX devices per chip: 2 on tpu7x (one per TensorCore), else 1."""
    sparse_cores: int
    vmem_mib_per_core: float
    dcn_bytes_per_s: float
    """Bytes/s per chip, one direction, between slices (GPU: between hosts)."""
    chips_per_host: int
    source: str

    @property
    def hbm_gib_per_device(self) -> float:
        """GiB that one JAX device may use."""
        return self.hbm_gib / self.devices_per_chip

    @property
    def dcn_bytes_per_s_per_host(self) -> float:
        """Bytes/s of one host's network, one direction."""
        return self.dcn_bytes_per_s * self.chips_per_host

    @property
    def ici_bytes_per_s(self) -> float:
        """Bytes/s out of one chip over all its links, one direction."""
        return self.ici_bytes_per_s_per_link * self.ici_links

    def peak(self, dtype: str = "bf16") -> float:
        """Return the peak FLOP/s of one chip for matmul operands of `dtype`."""
        return self.peak_flops[dtype]


def _flops(
    bf16: float | int, int8: float | int, fp8: float | int, f32: float | int
) -> Mapping[str, float]:
    return MappingProxyType(
        {"bf16": bf16 * 1e12, "int8": int8 * 1e12, "fp8": fp8 * 1e12, "f32": f32 * 1e12}
    )


# TPU float32 matmuls at HIGHEST precision take six bfloat16 passes, hence f32 = bf16 / 6.
# Where a generation has no faster path for int8 or fp8 the bf16 rate stands in its place.
CHIPS: Mapping[str, Chip] = MappingProxyType(
    {
        "v5e": Chip(
            name="v5e",
            kind="tpu",
            device_kind="TPU v5 lite",
            hbm_gib=15.75,  # [aot]
            nominal_hbm_gib=16.0,  # [v5e]
            peak_flops=_flops(bf16=197, int8=393, fp8=197, f32=197 / 6),  # [v5e]
            hbm_bytes_per_s=819e9,  # [v5e]
            ici_bytes_per_s_per_link=50e9,  # [v5e] 400 GB/s bidirectional, 4 links
            ici_links=4,
            clock_hz=1.5e9,  # [aot]
            tensor_cores=1,
            devices_per_chip=1,
            sparse_cores=0,
            vmem_mib_per_core=128.0,  # [info]
            dcn_bytes_per_s=25e9 / 8,  # [v5e] 6.4 Tb/s per pod of 256 chips
            chips_per_host=4,
            source="[v5e] [aot] [info]",
        ),
        "v5p": Chip(
            name="v5p",
            kind="tpu",
            device_kind="TPU v5",
            hbm_gib=95.74,  # [aot]
            nominal_hbm_gib=95.0,  # [v5p], which rounds down
            peak_flops=_flops(bf16=459, int8=918, fp8=459, f32=459 / 6),  # [v5p] [info]
            hbm_bytes_per_s=2765e9,  # [v5p]
            ici_bytes_per_s_per_link=100e9,  # [v5p] 1200 GB/s bidirectional, 6 links
            ici_links=6,
            clock_hz=1.75e9,  # [aot]
            tensor_cores=2,
            devices_per_chip=1,
            sparse_cores=4,
            vmem_mib_per_core=64.0,  # [info]
            dcn_bytes_per_s=50e9 / 8,  # [v5p]
            chips_per_host=4,
            source="[v5p] [aot] [info]",
        ),
        "v6e": Chip(
            name="v6e",
            kind="tpu",
            device_kind="TPU v6 lite",
            hbm_gib=31.25,  # [aot]
            nominal_hbm_gib=32.0,  # [v6e]
            peak_flops=_flops(bf16=918, int8=1836, fp8=918, f32=918 / 6),  # [v6e] [7x]
            hbm_bytes_per_s=1638e9,  # [7x]; [v6e] rounds to 1640
            ici_bytes_per_s_per_link=100e9,  # [7x] 800 GB/s bidirectional, 4 links
            ici_links=4,
            clock_hz=1.75e9,  # [aot]
            tensor_cores=1,
            devices_per_chip=1,
            sparse_cores=2,
            vmem_mib_per_core=128.0,  # [info]
            dcn_bytes_per_s=100e9 / 8,  # [7x]
            chips_per_host=4,
            source="[v6e] [7x] [aot] [info]",
        ),
        "tpu7x": Chip(
            name="tpu7x",
            kind="tpu",
            device_kind="TPU7x",
            hbm_gib=2 * 94.75,  # [aot], two devices
            nominal_hbm_gib=192.0,  # [7x]
            peak_flops=_flops(bf16=2307, int8=2307, fp8=4614, f32=2307 / 6),  # [7x] [aot]
            hbm_bytes_per_s=7380e9,  # [7x]
            ici_bytes_per_s_per_link=100e9,  # [7x] 1200 GB/s bidirectional, 6 links
            ici_links=6,
            clock_hz=2.2e9,  # [aot]
            tensor_cores=2,
            devices_per_chip=2,
            sparse_cores=4,
            vmem_mib_per_core=64.0,  # [info]
            dcn_bytes_per_s=100e9 / 8,  # [7x]
            chips_per_host=4,
            source="[7x] [aot] [info]",
        ),
        "h100": Chip(
            name="h100",
            kind="gpu",
            device_kind="NVIDIA H100 80GB HBM3",
            hbm_gib=0.75 * 79.6,  # JAX's allocator takes 75% of the memory unless told otherwise
            nominal_hbm_gib=79.6,
            peak_flops=_flops(bf16=989.4, int8=1978.9, fp8=1978.9, f32=66.9),  # [H100]
            hbm_bytes_per_s=3350e9,  # [H100]
            ici_bytes_per_s_per_link=25e9,  # [H100] NVLink 4: 900 GB/s bidirectional, 18 links
            ici_links=18,
            clock_hz=1.83e9,  # 132 SMs * 4096 FLOP/cycle gives the bf16 rate here
            tensor_cores=528,
            devices_per_chip=1,
            sparse_cores=0,
            vmem_mib_per_core=0.0,
            dcn_bytes_per_s=400e9 / 8,  # one 400 Gb/s adapter per GPU, as in DGX H100
            chips_per_host=8,
            source="[H100]",
        ),
        "a100": Chip(
            name="a100",
            kind="gpu",
            device_kind="NVIDIA A100-SXM4-80GB",
            hbm_gib=0.75 * 80.0,
            nominal_hbm_gib=80.0,
            peak_flops=_flops(bf16=312, int8=624, fp8=312, f32=19.5),  # [A100]
            hbm_bytes_per_s=2039e9,  # [A100]
            ici_bytes_per_s_per_link=25e9,  # [A100] NVLink 3: 600 GB/s bidirectional, 12 links
            ici_links=12,
            clock_hz=1.41e9,
            tensor_cores=432,
            devices_per_chip=1,
            sparse_cores=0,
            vmem_mib_per_core=0.0,
            dcn_bytes_per_s=200e9 / 8,  # one 200 Gb/s adapter per GPU, as in DGX A100
            chips_per_host=8,
            source="[A100]",
        ),
        # An order of magnitude for one laptop core (32 f32 FLOP a cycle at 3 GHz), so that the
        # same arithmetic works everywhere; nothing is promised from it.
        "cpu": Chip(
            name="cpu",
            kind="cpu",
            device_kind="cpu",
            hbm_gib=8.0,
            nominal_hbm_gib=8.0,
            peak_flops=_flops(bf16=0.096, int8=0.096, fp8=0.096, f32=0.096),
            hbm_bytes_per_s=20e9,
            ici_bytes_per_s_per_link=20e9,
            ici_links=1,
            clock_hz=3e9,
            tensor_cores=1,
            devices_per_chip=1,
            sparse_cores=0,
            vmem_mib_per_core=0.0,
            dcn_bytes_per_s=1e9 / 8,
            chips_per_host=1,
            source="order of magnitude for one laptop core",
        ),
    }
)
