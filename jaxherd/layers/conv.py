"""One-dimensional convolutions over [batch, time, channels], padded as EnCodec pads them.

The kernel may be weight-normalised: w = g v / ||v||, with one norm for each index of torch's
dimension 0.  That is the output channel of a convolution and the *input* channel of a transposed
one.  Source: melodyflow.md 2.1 and 9.

Axis letters: B batch, T time, K taps, I channels in, O channels out.
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxherd.core.modules import Module, parameter

Norm = Literal["weight_norm", "none"]
PadMode = Literal["constant", "reflect"]


def uniform(key: jax.Array, shape: tuple[int, ...], fan_in: int) -> jax.Array:
    """Return U(-b, b) with b = fan_in**-0.5: torch's default for convolutions and their biases."""
    bound = fan_in**-0.5
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def weight_norm(g: jax.Array, v: jax.Array, kept: int) -> jax.Array:
    """Return g v / ||v|| with one norm for each index of axis `kept`; float32, cast back."""
    v32 = v.astype(jnp.float32)
    axes = tuple(axis for axis in range(v.ndim) if axis != kept)
    shape = tuple(-1 if axis == kept else 1 for axis in range(v.ndim))
    norm = jnp.sqrt(jnp.sum(v32 * v32, axis=axes, keepdims=True))
    return (v32 * (g.astype(jnp.float32).reshape(shape) / norm)).astype(v.dtype)


def kernel_norms(v: jax.Array, kept: int) -> jax.Array:
    """Return ||v|| for each index of axis `kept`: the g with which w = v."""
    axes = tuple(axis for axis in range(v.ndim) if axis != kept)
    return jnp.sqrt(jnp.sum(v * v, axis=axes))


def pad_time(
    x_BTI: Float[Array, "B T I"], left: int, right: int, mode: PadMode
) -> Float[Array, "B P I"]:
    """Pad in time with zeros or by reflection.

    An input too short to reflect gets zeros on its right first; what they add at the end is cut
    off again, as EnCodec does.
    """
    if mode == "constant":
        return jnp.pad(x_BTI, ((0, 0), (left, right), (0, 0)))
    short = max(0, max(left, right) - x_BTI.shape[1] + 1)
    x_BTI = jnp.pad(x_BTI, ((0, 0), (0, short), (0, 0)))
    padded = jnp.pad(x_BTI, ((0, 0), (left, right), (0, 0)), mode="reflect")
    return padded[:, : padded.shape[1] - short]


@dataclasses.dataclass(frozen=True)
class ConvConfig:
    """A convolution whose output has ceil(T / stride) positions.

    Attributes:
      in_channels, out_channels, kernel_size, stride, dilation: as usual.
      causal: all fixed padding goes to the left.  Otherwise the left gets the larger half.  What
        the last window lacks is padded on the right in either case.
      pad_mode: zeros or reflection.
      norm: of the kernel.
      few_outputs: the output channels are too few to be split over devices (a waveform's).
    """

    in_channels: int
    out_channels: int
    kernel_size: int
    stride: int = 1
    dilation: int = 1
    causal: bool = False
    pad_mode: PadMode = "constant"
    norm: Norm = "weight_norm"
    bias: bool = True
    few_outputs: bool = False

    def __post_init__(self):
        if self.span < self.stride:
            raise ValueError(
                f"stride {self.stride} skips inputs of a kernel that spans {self.span}"
            )

    def build(self, key: jax.Array) -> "Conv1d":
        """Return the layer with freshly drawn parameters."""
        return Conv1d(self, key=key)

    @property
    def span(self) -> int:
        """Inputs from the first to the last tap."""
        return (self.kernel_size - 1) * self.dilation + 1

    @property
    def padding(self) -> tuple[int, int]:
        """Fixed padding on the left and right."""
        total = self.span - self.stride
        right = 0 if self.causal else total // 2
        return total - right, right

    @property
    def reach(self) -> tuple[int, int]:
        """Inputs before and after position j stride that output j sees."""
        left = self.padding[0]
        return left, self.span - 1 - left

    def length(self, inputs: int) -> int:
        """Return the number of output positions."""
        return -(-inputs // self.stride)

    def num_params(self) -> int:
        """Return the number of parameters."""
        kernel = self.kernel_size * self.in_channels * self.out_channels
        return kernel + self.out_channels * ((self.norm == "weight_norm") + self.bias)

    def flops(self, inputs: int) -> float:
        """Return forward FLOPs of one sequence: every tap of every window, padding included."""
        taps = self.kernel_size * self.in_channels * self.out_channels
        return 2.0 * self.length(inputs) * taps


class Conv1d(Module):
    """y = pad(x) * w + b.  The kernel is [tap, in, out]."""

    def __init__(self, config: ConvConfig, *, key: jax.Array):
        c = config
        w, b = jax.random.split(key)
        fan_in = c.kernel_size * c.in_channels
        kernel = uniform(w, (c.kernel_size, c.in_channels, c.out_channels), fan_in)
        out = "input_channels" if c.few_outputs else "channels"
        axes = ("conv", "input_channels", out)
        self.config = config
        if c.norm == "weight_norm":
            self.g = parameter(kernel_norms(kernel, 2), (out,))
            self.v = parameter(kernel, axes)
        else:
            self.kernel = parameter(kernel, axes)
        self.bias = parameter(uniform(b, (c.out_channels,), fan_in), (out,)) if c.bias else None

    def weight(self) -> Float[Array, "K I O"]:
        """Return the kernel that is applied."""
        if self.config.norm == "weight_norm":
            return weight_norm(self.g[...], self.v[...], 2)
        return self.kernel[...]

    def __call__(self, x_BTI: Float[Array, "B T I"]) -> Float[Array, "B S O"]:
        """Return ceil(T / stride) positions."""
        c = self.config
        left, right = c.padding
        extra = c.length(x_BTI.shape[1]) * c.stride - x_BTI.shape[1]
        y = convolve(
            pad_time(x_BTI, left, right + extra, c.pad_mode), self.weight(), c.stride, c.dilation
        )
        return y if self.bias is None else y + self.bias[...]


def convolve(
    x_BTI: Float[Array, "B T I"], w_KIO: Float[Array, "K I O"], stride: int, dilation: int
) -> Float[Array, "B S O"]:
    """Return the convolution without padding.

    A stride that divides the kernel becomes a stride of one over blocks of `stride` inputs, so
    that neither this nor its gradient meets a dilated operand; one tap is a matrix product.
    """
    taps, inputs, outputs = w_KIO.shape
    if stride > 1 and dilation == 1 and taps % stride == 0:
        batch, length, _ = x_BTI.shape
        blocks = length // stride
        x_BTI = x_BTI[:, : blocks * stride].reshape(batch, blocks, stride * inputs)
        w_KIO = w_KIO.reshape(taps // stride, stride * inputs, outputs)
        taps, stride = taps // stride, 1
    if taps == 1 and stride == 1:
        return jnp.einsum("BTI,IO->BTO", x_BTI, w_KIO[0])
    return jax.lax.conv_general_dilated(
        x_BTI,
        w_KIO,
        window_strides=(stride,),
        padding="VALID",
        rhs_dilation=(dilation,),
        dimension_numbers=("NWC", "WIO", "NWC"),
    )


@dataclasses.dataclass(frozen=True)
class TransposedConvConfig:
    """A transposed convolution that is trimmed to exactly T stride positions.

    Attributes:
      in_channels, out_channels, kernel_size, stride: as usual.
      causal: trims `trim_right_ratio` of the surplus on the right; otherwise half, rounded down.
      norm: of the kernel; one norm for each *input* channel.
    """

    in_channels: int
    out_channels: int
    kernel_size: int
    stride: int
    causal: bool = False
    trim_right_ratio: float = 1.0
    norm: Norm = "weight_norm"

    def __post_init__(self):
        if self.kernel_size < self.stride:
            raise ValueError(f"kernel {self.kernel_size} leaves gaps at stride {self.stride}")
        if not 0.0 <= self.trim_right_ratio <= 1.0:
            raise ValueError(f"trim_right_ratio {self.trim_right_ratio} is no share")
        if not self.causal and self.trim_right_ratio != 1.0:
            raise ValueError("trim_right_ratio is for causal convolutions")

    def build(self, key: jax.Array) -> "TransposedConv1d":
        """Return the layer with freshly drawn parameters."""
        return TransposedConv1d(self, key=key)

    @property
    def trim(self) -> tuple[int, int]:
        """Outputs cut off on the left and right."""
        total = self.kernel_size - self.stride
        right = math.ceil(total * self.trim_right_ratio) if self.causal else total // 2
        return total - right, right

    @property
    def reach(self) -> tuple[int, int]:
        """Inputs before and after input i that its `stride` outputs see."""
        left = self.trim[0]
        before = -(-(self.kernel_size - 1 - left) // self.stride)
        return before, (self.stride - 1 + left) // self.stride

    def length(self, inputs: int) -> int:
        """Return the number of output positions."""
        return inputs * self.stride

    def num_params(self) -> int:
        """Return the number of parameters."""
        kernel = self.kernel_size * self.in_channels * self.out_channels
        return kernel + self.in_channels * (self.norm == "weight_norm") + self.out_channels

    def flops(self, inputs: int) -> float:
        """Return forward FLOPs of one sequence: every input meets every tap."""
        return 2.0 * inputs * self.kernel_size * self.in_channels * self.out_channels


class TransposedConv1d(Module):
    """y[s t + k] += x[t] w[k], trimmed, plus b.  The kernel is [tap, in, out]."""

    def __init__(self, config: TransposedConvConfig, *, key: jax.Array):
        c = config
        w, b = jax.random.split(key)
        fan_in = c.kernel_size * c.out_channels  # torch counts its dimension 1 here
        kernel = uniform(w, (c.kernel_size, c.in_channels, c.out_channels), fan_in)
        axes = ("conv", "input_channels", "channels")
        self.config = config
        if c.norm == "weight_norm":
            self.g = parameter(kernel_norms(kernel, 1), ("input_channels",))
            self.v = parameter(kernel, axes)
        else:
            self.kernel = parameter(kernel, axes)
        self.bias = parameter(uniform(b, (c.out_channels,), fan_in), ("channels",))

    def weight(self) -> Float[Array, "K I O"]:
        """Return the kernel that is applied."""
        if self.config.norm == "weight_norm":
            return weight_norm(self.g[...], self.v[...], 1)
        return self.kernel[...]

    def __call__(self, x_BTI: Float[Array, "B T I"]) -> Float[Array, "B S O"]:
        """Return T stride positions.

        One matrix product gives all taps of all inputs; shifted blocks of `stride` outputs are
        then added up.  No operand is dilated with zeros.
        """
        c = self.config
        batch, length, _ = x_BTI.shape
        shifts = -(-c.kernel_size // c.stride)
        w_KIO = self.weight()
        w_KIO = jnp.pad(w_KIO, ((0, shifts * c.stride - c.kernel_size), (0, 0), (0, 0)))
        taps = jnp.einsum("BTI,KIO->BTKO", x_BTI, w_KIO)
        taps = taps.reshape(batch, length, shifts, c.stride, c.out_channels)
        total = jnp.zeros((), taps.dtype)
        for shift in range(shifts):
            around = ((0, 0), (shift, shifts - 1 - shift), (0, 0), (0, 0))
            total = total + jnp.pad(taps[:, :, shift], around)
        y = total.reshape(batch, (length + shifts - 1) * c.stride, c.out_channels)
        left = c.trim[0]
        return y[:, left : left + length * c.stride] + self.bias[...]
