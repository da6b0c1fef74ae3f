"""Run tiny random codecs in torch and write what they compute.

    python tests/golden/make_codec_goldens.py                 the committed goldens
    python tests/golden/make_codec_goldens.py --live FOLDER   every case

Needs torch and transformers (torch 2.13, transformers 5.24 made the committed files).  "encodec"
cases are `transformers.EncodecModel`; "seanet" cases are modules written here from the description
of the architecture (melodyflow.md 2.1), since no package has the snake variant; so is the
discriminator.  Weights follow from the tensors' names, see `random_weights.py`.
"""

import argparse
import json
import math
import pathlib
import sys

import numpy as np
import torch
import transformers
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE))
from random_weights import codec_tensor, random_wave  # noqa: E402

DEFAULTS = {
    "n_residual_layers": 1,
    "kernel_size": 7,
    "last_kernel_size": 7,
    "residual_kernel_size": 3,
    "dilation_base": 2,
    "compress": 2,
    "lstm": 2,
    "causal": False,
    "pad_mode": "constant",
    "true_skip": True,
    "activation": "snake",
    "norm": "weight_norm",
    "trim_right_ratio": 1.0,
    "final_activation": None,
}


class Holder(nn.Module):
    """Gives a module the nested name that checkpoints have."""

    def __init__(self, name, module):
        super().__init__()
        self.add_module(name, module)


class Conv(nn.Module):
    def __init__(self, c, inputs, outputs, kernel, stride=1, dilation=1):
        super().__init__()
        conv = nn.Conv1d(inputs, outputs, kernel, stride, dilation=dilation)
        self.conv = Holder("conv", weight_norm(conv) if c["norm"] == "weight_norm" else conv)
        self.c, self.stride, self.span = c, stride, (kernel - 1) * dilation + 1

    def forward(self, x):
        length, total = x.shape[-1], self.span - self.stride
        extra = math.ceil(length / self.stride) * self.stride - length
        right = 0 if self.c["causal"] else total // 2
        left, right = total - right, right + extra
        cut = 0
        if self.c["pad_mode"] == "reflect" and length <= max(left, right):
            cut = max(left, right) - length + 1
            x = F.pad(x, (0, cut))
        x = F.pad(x, (left, right), mode=self.c["pad_mode"])
        return self.conv.conv(x[..., : x.shape[-1] - cut])


class Transposed(nn.Module):
    def __init__(self, c, inputs, outputs, kernel, stride):
        super().__init__()
        conv = nn.ConvTranspose1d(inputs, outputs, kernel, stride)
        self.convtr = Holder("convtr", weight_norm(conv) if c["norm"] == "weight_norm" else conv)
        surplus = kernel - stride
        cut = math.ceil(surplus * c["trim_right_ratio"]) if c["causal"] else surplus // 2
        self.left, self.right = surplus - cut, cut

    def forward(self, x):
        y = self.convtr.convtr(x)
        return y[..., self.left : y.shape[-1] - self.right]


class Snake1d(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, channels, 1))

    def forward(self, x):
        return x + torch.sin(self.alpha * x) ** 2 / (self.alpha + 1e-9)


class Recurrent(nn.Module):
    def __init__(self, width, layers):
        super().__init__()
        self.lstm = nn.LSTM(width, width, layers)

    def forward(self, x):
        y = x.permute(2, 0, 1)
        return (self.lstm(y)[0] + y).permute(1, 2, 0)


class Block(nn.Module):
    def __init__(self, c, width, dilation):
        super().__init__()
        hidden = width // c["compress"]
        self.block = nn.Sequential(
            activation(c, width),
            Conv(c, width, hidden, c["residual_kernel_size"], dilation=dilation),
            activation(c, hidden),
            Conv(c, hidden, width, 1),
        )
        self.shortcut = nn.Identity() if c["true_skip"] else Conv(c, width, width, 1)

    def forward(self, x):
        return self.shortcut(x) + self.block(x)


def activation(c, channels):
    return Snake1d(channels) if c["activation"] == "snake" else nn.ELU()


def blocks(c, width):
    return [Block(c, width, c["dilation_base"] ** j) for j in range(c["n_residual_layers"])]


class Seanet(nn.Module):
    """Encoder with `dimension` outputs and decoder, each below `.model`."""

    def __init__(self, c):
        super().__init__()
        width = c["n_filters"]
        down = [Conv(c, c["channels"], width, c["kernel_size"])]
        for ratio in reversed(c["ratios"]):
            down += blocks(c, width)
            down += [activation(c, width), Conv(c, width, 2 * width, 2 * ratio, ratio)]
            width *= 2
        up = [Conv(c, c["dimension"], width, c["kernel_size"])]
        if c["lstm"]:
            down.append(Recurrent(width, c["lstm"]))
            up.append(Recurrent(width, c["lstm"]))
        down += [activation(c, width), Conv(c, width, c["dimension"], c["last_kernel_size"])]
        for ratio in c["ratios"]:
            up += [activation(c, width), Transposed(c, width, width // 2, 2 * ratio, ratio)]
            width //= 2
            up += blocks(c, width)
        up += [activation(c, width), Conv(c, width, c["channels"], c["last_kernel_size"])]
        if c["final_activation"] == "tanh":
            up.append(nn.Tanh())
        self.encoder = Holder("model", nn.Sequential(*down))
        self.decoder = Holder("model", nn.Sequential(*up))

    def encode(self, x):
        return self.encoder.model(x)

    def decode(self, z):
        return self.decoder.model(z)


class Encodec(nn.Module):
    def __init__(self, c):
        super().__init__()
        config = transformers.EncodecConfig(
            audio_channels=c["channels"],
            hidden_size=c["dimension"],
            num_filters=c["n_filters"],
            upsampling_ratios=c["ratios"],
            num_residual_layers=c["n_residual_layers"],
            kernel_size=c["kernel_size"],
            last_kernel_size=c["last_kernel_size"],
            residual_kernel_size=c["residual_kernel_size"],
            dilation_growth_rate=c["dilation_base"],
            compress=c["compress"],
            num_lstm_layers=c["lstm"],
            use_causal_conv=c["causal"],
            pad_mode=c["pad_mode"],
            use_conv_shortcut=not c["true_skip"],
            trim_right_ratio=c["trim_right_ratio"],
            norm_type=c["norm"],
            codebook_size=4,
            codebook_dim=c["dimension"],
        )
        model = transformers.EncodecModel(config)
        self.encoder, self.decoder = model.encoder, model.decoder

    def encode(self, x):
        return self.encoder(x)

    def decode(self, z):
        return self.decoder(z)


class Scale(nn.Module):
    def __init__(self, n_fft, filters):
        super().__init__()
        self.n_fft = n_fft

        def conv(inputs, outputs, kernel, stride=1, dilation=1, norm=True):
            padding = ((kernel[0] - 1) * dilation // 2, (kernel[1] - 1) // 2)
            layer = nn.Conv2d(inputs, outputs, kernel, (1, stride), padding, dilation=(dilation, 1))
            return Holder("conv", weight_norm(layer) if norm else layer)

        self.convs = nn.ModuleList([conv(2, filters, (3, 9), norm=False)])
        for dilation in (1, 2, 4):
            self.convs.append(conv(filters, filters, (3, 9), 2, dilation))
        self.convs.append(conv(filters, filters, (3, 3)))
        self.conv_post = conv(filters, 1, (3, 3))

    def forward(self, x):
        window = torch.hann_window(self.n_fft)
        z = torch.stft(
            x, self.n_fft, self.n_fft // 4, window=window, center=False, return_complex=True
        )
        z = z / window.pow(2).sum().sqrt()
        z = torch.stack([z.real, z.imag], 1).transpose(2, 3)
        maps = []
        for layer in self.convs:
            z = F.leaky_relu(layer.conv(z), 0.3)
            maps.append(z)
        return self.conv_post.conv(z), maps


class Discriminator(nn.Module):
    def __init__(self, n_ffts, filters):
        super().__init__()
        self.discriminators = nn.ModuleList([Scale(n, filters) for n in n_ffts])


def fill(model):
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            tensor.copy_(torch.from_numpy(codec_tensor(name, tuple(tensor.shape))))
    return model.float().eval()


def run(case):
    """Return arrays: inputs, outputs, small gradients, and the shapes of all tensors."""
    c = {**DEFAULTS, **case.get("config", {})}
    if case["kind"] == "discriminator":
        return run_discriminator(case)
    if case["kind"] == "layers":
        return run_layers(case)
    model = fill(Encodec(c) if case["kind"] == "encodec" else Seanet(c))
    wave = torch.from_numpy(random_wave(2, case["length"], c["channels"])).transpose(1, 2)
    latents = model.encode(wave)
    output = model.decode(latents)
    loss = (output**2).mean() + (latents**2).mean()
    loss.backward()
    out = {
        "latents": latents.detach().transpose(1, 2).numpy(),
        "output": output.detach().transpose(1, 2).numpy(),
        "loss": loss.detach().numpy(),
    }
    return model, out


class Layers(nn.Module):
    """Single layers with 3 channels in and 4 out."""

    def __init__(self, case):
        super().__init__()
        self.conv, self.transposed = nn.ModuleList(), nn.ModuleList()
        for kernel, stride, dilation, causal, mode in case["conv"]:
            c = {"norm": "weight_norm", "causal": causal, "pad_mode": mode}
            self.conv.append(Conv(c, 3, 4, kernel, stride, dilation))
        for kernel, stride, causal, ratio in case["transposed"]:
            c = {"norm": "weight_norm", "causal": causal, "trim_right_ratio": ratio}
            self.transposed.append(Transposed(c, 3, 4, kernel, stride))
        self.snake = Snake1d(3)
        self.recurrent = Recurrent(3, 2)


def run_layers(case):
    """Return every layer's output; the loss is the sum of their mean squares."""
    model = fill(Layers(case))
    wave = torch.from_numpy(random_wave(2, case["length"], 3)).transpose(1, 2)
    outputs = {f"conv/{i}": layer(wave) for i, layer in enumerate(model.conv)}
    outputs |= {f"transposed/{i}": layer(wave) for i, layer in enumerate(model.transposed)}
    outputs |= {"snake": model.snake(wave), "recurrent": model.recurrent(wave)}
    loss = sum((y**2).mean() for y in outputs.values())
    loss.backward()
    out = {name: y.detach().transpose(1, 2).numpy() for name, y in outputs.items()}
    _, (hidden, cell) = model.recurrent.lstm(wave.permute(2, 0, 1))
    out |= {"hidden": hidden.detach().numpy(), "cell": cell.detach().numpy()}
    return model, {**out, "loss": loss.detach().numpy()}


def run_discriminator(case):
    model = fill(Discriminator(case["config"]["n_ffts"], case["config"]["filters"]))
    wave = torch.from_numpy(random_wave(2, case["length"], 2))
    left, right = wave[..., 0], wave[..., 1]
    views = torch.stack([left, right, (left + right) / 2, (left - right) / 2], 1).flatten(0, 1)
    out, loss = {}, 0.0
    for i, scale in enumerate(model.discriminators):
        logits, maps = scale(views)
        loss = loss + (logits**2).mean()
        out[f"logits/{i}"] = logits.detach().permute(0, 2, 3, 1).numpy()
        for k, m in enumerate(maps):
            out[f"features/{i}/{k}"] = m.detach().permute(0, 2, 3, 1)[::4].numpy()
    loss.backward()
    return model, {**out, "loss": loss.detach().numpy()}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--live", type=pathlib.Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder = arguments.live or HERE / "codec"
    folder.mkdir(exist_ok=True)
    for name, case in json.loads((HERE / "codec_cases.json").read_text()).items():
        if arguments.live is None and not case.get("golden"):
            continue
        model, out = run(case)
        shapes = {n: list(t.shape) for n, t in model.named_parameters()}
        # Of large gradients the norm is enough to tell a wrong one.
        for n, t in model.named_parameters():
            grad = t.grad.numpy()
            out[f"grad/{n}"] = grad if grad.size <= 64 else np.linalg.norm(grad)
        out["shapes"] = np.array(json.dumps(shapes))
        np.savez_compressed(folder / f"{name}.npz", **out)
        print(name, float(out["loss"]), (folder / f"{name}.npz").stat().st_size)


if __name__ == "__main__":
    main()
