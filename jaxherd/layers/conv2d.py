"""Two-dimensional convolutions over [batch, height, width, channels], kernels weight-normalised.

Axis letters: B batch, H height, W width, I channels in, O channels out.
"""

import dataclasses

import jax
from jaxtyping import Array, Float

from jaxherd.core.modules import Module, parameter
from jaxherd.layers.conv import Norm, kernel_norms, uniform, weight_norm

Pair = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Conv2dConfig:
    """A convolution with zeros around it, (k - 1) d / 2 rounded down on every side.

    Attributes:
      kernel_size, stride, dilation: (height, width).
      few_outputs: the output channels are too few to be split over devices.
    """

    in_channels: int
    out_channels: int
    kernel_size: Pair
    stride: Pair = (1, 1)
    dilation: Pair = (1, 1)
    norm: Norm = "weight_norm"
    few_outputs: bool = False

    def build(self, key: jax.Array) -> "Conv2d":
        """Return the layer with freshly drawn parameters."""
        return Conv2d(self, key=key)

    @property
    def padding(self) -> Pair:
        """Zeros on either side of height and of width."""
        (kh, kw), (dh, dw) = self.kernel_size, self.dilation
        return (kh - 1) * dh // 2, (kw - 1) * dw // 2

    def size(self, height: int, width: int) -> Pair:
        """Return (height, width) of the output."""
        found = [
            (n + 2 * p - (k - 1) * d - 1) // s + 1
            for n, p, k, d, s in zip(
                (height, width), self.padding, self.kernel_size, self.dilation, self.stride
            )
        ]
        return found[0], found[1]

    def num_params(self) -> int:
        """Return the number of parameters."""
        kernel = self.kernel_size[0] * self.kernel_size[1] * self.in_channels * self.out_channels
        return kernel + self.out_channels * (1 + (self.norm == "weight_norm"))

    def flops(self, height: int, width: int) -> float:
        """Return forward FLOPs of one image: every tap of every window, padding included."""
        rows, columns = self.size(height, width)
        taps = self.kernel_size[0] * self.kernel_size[1] * self.in_channels * self.out_channels
        return 2.0 * rows * columns * taps


class Conv2d(Module):
    """y = pad(x) * w + b.  The kernel is [height, width, in, out]."""

    def __init__(self, config: Conv2dConfig, *, key: jax.Array):
        c = config
        w, b = jax.random.split(key)
        fan_in = c.kernel_size[0] * c.kernel_size[1] * c.in_channels
        kernel = uniform(w, (*c.kernel_size, c.in_channels, c.out_channels), fan_in)
        out = "input_channels" if c.few_outputs else "channels"
        axes = ("conv", "conv", "input_channels", out)
        self.config = config
        if c.norm == "weight_norm":
            self.g = parameter(kernel_norms(kernel, 3), (out,))
            self.v = parameter(kernel, axes)
        else:
            self.kernel = parameter(kernel, axes)
        self.bias = parameter(uniform(b, (c.out_channels,), fan_in), (out,))

    def weight(self) -> Float[Array, "KH KW I O"]:
        """Return the kernel that is applied."""
        if self.config.norm == "weight_norm":
            return weight_norm(self.g[...], self.v[...], 3)
        return self.kernel[...]

    def __call__(self, x_BHWI: Float[Array, "B H W I"]) -> Float[Array, "B H2 W2 O"]:
        """Return the convolved image."""
        c = self.config
        high, wide = c.padding
        y = jax.lax.conv_general_dilated(
            x_BHWI,
            self.weight(),
            window_strides=c.stride,
            padding=((high, high), (wide, wide)),
            rhs_dilation=c.dilation,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return y + self.bias[...]
