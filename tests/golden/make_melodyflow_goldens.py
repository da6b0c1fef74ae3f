"""A velocity network in plain torch, tiny T5 encoders, and a small torch zip file: what they give.

    python tests/golden/make_melodyflow_goldens.py                 the committed goldens
    python tests/golden/make_melodyflow_goldens.py --live FOLDER   the same cases elsewhere, with the
                                                                   T5 folders that transformers wrote

Needs torch and transformers (2.13 and 5.24 made the committed files).  Weights are not stored: see
`random_weights.py` beside it.  The network is written from melodyflow.md 3.2 and 3.5; attention
without RoPE and query norms is torch's own `nn.MultiheadAttention`, so that names come with the
`mha.` prefix there.
"""

import argparse
import collections
import json
import math
import pathlib
import sys

import numpy as np
import torch
import transformers
from torch import nn

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE))
from random_weights import random_tensor, random_tokens  # noqa: E402

LATENT, WIDTH, HEADS, TEXT, FRAMES, TOKENS = 6, 16, 2, 10, 9, 5
T5 = {"vocab_size": 40, "d_model": 24, "d_kv": 5, "d_ff": 20, "num_heads": 4, "num_layers": 2}


class Rotation:
    """Neighbouring numbers of a head are a complex one that turns with the position."""

    def __init__(self, scale: float):
        self.scale = scale
        size = WIDTH // HEADS
        self.frequencies = 10000.0 ** (-torch.arange(0, size, 2).float() / size)

    def __call__(self, x_BTNH):
        angle = torch.arange(x_BTNH.shape[1]).float()[:, None] * self.frequencies
        turn = torch.polar(torch.ones_like(angle), angle) * self.scale + (1 - self.scale)
        pairs = torch.view_as_complex(x_BTNH.reshape(*x_BTNH.shape[:-1], -1, 2).contiguous())
        return torch.view_as_real(pairs * turn[None, :, None]).flatten(-2)


class OwnAttention(nn.Module):
    """For RoPE and norms of queries and keys over the full width."""

    def __init__(self, case, norm: bool, rotation):
        super().__init__()
        bias = case.get("bias_attn", False)
        self.in_proj_weight = nn.Parameter(torch.empty(3 * WIDTH, WIDTH))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * WIDTH)) if bias else None
        self.out_proj = nn.Linear(WIDTH, WIDTH, bias=bias)
        if norm:
            self.q_layer_norm, self.k_layer_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.norm, self.rotation, self.zero = norm, rotation, case.get("add_zero_attn", True)

    def forward(self, x, states, mask):
        bias = self.in_proj_bias
        thirds = [slice(i * WIDTH, (i + 1) * WIDTH) for i in range(3)]
        q, k, v = (
            nn.functional.linear(s, self.in_proj_weight[t], None if bias is None else bias[t])
            for s, t in zip((x, states, states), thirds)
        )
        if self.norm:
            q, k = self.q_layer_norm(q), self.k_layer_norm(k)
        q, k, v = (y.unflatten(-1, (HEADS, -1)) for y in (q, k, v))
        if self.rotation is not None:
            q, k = self.rotation(q), self.rotation(k)
        if self.zero:
            k, v = (nn.functional.pad(y, (0, 0, 0, 0, 1, 0)) for y in (k, v))
            mask = None if mask is None else nn.functional.pad(mask, (1, 0))
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class TorchAttention(nn.Module):
    def __init__(self, case):
        super().__init__()
        self.mha = nn.MultiheadAttention(
            WIDTH,
            HEADS,
            bias=case.get("bias_attn", False),
            batch_first=True,
            add_zero_attn=case.get("add_zero_attn", True),
        )

    def forward(self, x, states, mask):
        if mask is not None:
            mask = mask.expand(-1, HEADS, x.shape[1], -1).flatten(0, 1)
        return self.mha(x, states, states, attn_mask=mask, need_weights=False)[0]


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.empty(WIDTH))

    def forward(self, x):
        return self.scale * x


class Layer(nn.Module):
    def __init__(self, case, rotation):
        super().__init__()
        own = rotation is not None or case.get("qk_norm", False)
        make_scale = Scale if case.get("layer_scale") else nn.Identity
        self.self_attn = (
            OwnAttention(case, case.get("qk_norm", False), rotation)
            if own
            else TorchAttention(case)
        )
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.layer_scale_1, self.layer_scale_2 = make_scale(), make_scale()
        bias = case.get("bias_ff", False)
        self.linear1 = nn.Linear(WIDTH, 4 * WIDTH, bias=bias)
        self.linear2 = nn.Linear(4 * WIDTH, WIDTH, bias=bias)
        if case.get("cross", True):
            norm = case.get("qk_norm_cross", False)
            self.cross_attention = OwnAttention(case, norm, None) if own else TorchAttention(case)
            self.norm_cross, self.layer_scale_cross = nn.LayerNorm(WIDTH), make_scale()
        self.first, self.cross = case.get("norm_first", True), case.get("cross", True)

    def feed(self, x):
        return self.layer_scale_2(self.linear2(nn.functional.gelu(self.linear1(x))))

    def forward(self, x, time, states, mask):
        if self.first:
            y = self.norm1(x) + time
            x = x + self.layer_scale_1(self.self_attn(y, y, None))
            if self.cross:
                y = self.norm_cross(x) + time
                x = x + self.layer_scale_cross(self.cross_attention(y, states, mask))
            return x + self.feed(self.norm2(x))
        source = x + time
        x = self.norm1(x + self.layer_scale_1(self.self_attn(source, source, None)))
        if self.cross:
            y = self.layer_scale_cross(self.cross_attention(source, states, mask))
            x = self.norm_cross(x + y)
        return self.norm2(x + self.feed(x))


class Stack(nn.Module):
    def __init__(self, case):
        super().__init__()
        self.kind, self.scale = case.get("positional", "sin"), case.get("positional_scale", 1.0)
        rotation = Rotation(self.scale) if self.kind != "sin" else None
        count = case["layers"]
        self.layers = nn.ModuleList(Layer(case, rotation) for _ in range(count))
        if rotation is not None:
            self.rope = nn.Module()
            self.rope.register_buffer("frequencies", rotation.frequencies)
        self.skips = case.get("skips", True)
        if self.skips:
            self.skip_projections = nn.ModuleList(
                nn.Linear(2 * WIDTH, WIDTH, bias=case.get("bias_ff", False))
                for _ in range((count - 1) // 2)
            )

    def forward(self, x, time, states, mask):
        if self.kind != "rope":
            half = WIDTH // 2
            waves = 10000.0 ** (-torch.arange(half).float() / (half - 1))
            phase = torch.arange(x.shape[1]).float()[:, None] * waves
            x = x + self.scale * torch.cat([phase.cos(), phase.sin()], -1)
        count, pushed = len(self.layers), []
        for i, layer in enumerate(self.layers):
            if self.skips and i > count / 2:
                joined = torch.cat([x, pushed.pop()], -1)
                x = self.skip_projections[i % len(self.skip_projections)](joined)
            x = layer(x, time, states, mask)
            if self.skips and i < count / 2 - 1:
                pushed.append(x)
        return x


class Flow(nn.Module):
    def __init__(self, case):
        super().__init__()
        bias = case.get("bias_proj", False)
        self.timestep_embedder = nn.Module()
        self.timestep_embedder.mlp = nn.Sequential(
            nn.Linear(256, WIDTH, bias=bias), nn.SiLU(), nn.Linear(WIDTH, WIDTH, bias=bias)
        )
        self.in_proj = nn.Linear(LATENT, WIDTH, bias=bias)
        self.out_proj = nn.Linear(WIDTH, LATENT, bias=bias)
        self.out_norm = nn.LayerNorm(WIDTH)
        self.transformer = Stack(case)
        self.register_buffer("latent_mean", torch.zeros(1, LATENT, 1))
        self.register_buffer("latent_std", torch.zeros(1, LATENT, 1))
        self.cross = case.get("cross", True)
        if self.cross:
            self.condition_provider = nn.Module()
            self.condition_provider.conditioners = nn.ModuleDict({"description": nn.Module()})
            description = self.condition_provider.conditioners["description"]
            description.output_proj = nn.Linear(TEXT, WIDTH)

    def forward(self, z, t, text, text_mask):
        """z [B, C, T], t [B, 1], text [B, L, E], text_mask [B, L] of zeros and ones."""
        spread = (t**2 + (1 - t) ** 2).sqrt()[..., None]
        x = self.in_proj((z / spread).transpose(1, 2))
        waves = torch.exp(-math.log(10000.0) * torch.arange(128).float() / 128)
        time = self.timestep_embedder.mlp(torch.cat([(t * waves).cos(), (t * waves).sin()], -1))
        states = mask = None
        if self.cross:
            project = self.condition_provider.conditioners["description"].output_proj
            states = project(text) * text_mask[..., None]
            mask = text_mask.log()[:, None, None]
        x = self.transformer(x, time[:, None], states, mask)
        return self.out_proj(self.out_norm(x)).transpose(1, 2) * math.sqrt(2)


def flow(name: str, case: dict) -> dict[str, np.ndarray]:
    model = Flow(case).float()
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if not key.endswith("frequencies"):
                tensor.copy_(torch.from_numpy(random_tensor(key, tuple(tensor.shape))))
    random = np.random.RandomState(len(name))
    rows = 3
    z = random.normal(size=(rows, FRAMES, LATENT)).astype(np.float32)
    t = random.uniform(size=rows).astype(np.float32)
    text = random.normal(size=(rows, TOKENS, TEXT)).astype(np.float32)
    mask = np.ones((rows, TOKENS), np.float32)
    mask[0, 3:] = 0
    if case.get("add_zero_attn", True):
        mask[1] = 0  # the null condition
    z_t = torch.from_numpy(z).transpose(1, 2).requires_grad_()
    v = model(z_t, torch.from_numpy(t)[:, None], torch.from_numpy(text), torch.from_numpy(mask))
    v.square().mean().backward()
    shapes = {key: list(tensor.shape) for key, tensor in model.state_dict().items()}
    return {
        "z": z, "t": t, "text_states": text, "text_mask": mask,
        "v": v.detach().transpose(1, 2).numpy(),
        "grad_z": z_t.grad.transpose(1, 2).numpy(),
        "case": np.array(json.dumps(case)), "shapes": np.array(json.dumps(shapes)),
    }  # fmt: skip


def t5(name: str, case: dict, folder: pathlib.Path | None) -> dict[str, np.ndarray]:
    config = transformers.T5Config(**{**T5, **case["config"]})
    whole = case.get("whole", False)
    kind = transformers.T5ForConditionalGeneration if whole else transformers.T5EncoderModel
    model = kind._from_config(config).float().eval()
    with torch.no_grad():
        for key, tensor in model.named_parameters():
            tensor.copy_(torch.from_numpy(random_tensor(key, tuple(tensor.shape))))
    tokens = random_tokens(case["length"], T5["vocab_size"])
    mask = np.ones(tokens.shape, np.int64)
    mask[1, case["length"] // 2 :] = 0
    encoder = model.encoder if whole else model
    with torch.no_grad():
        out = encoder(torch.from_numpy(tokens), attention_mask=torch.from_numpy(mask))
    if folder is not None:
        model.save_pretrained(folder / name)
    shapes = {n: list(t.shape) for n, t in model.named_parameters()}
    config.architectures = [kind.__name__]
    return {
        "tokens": tokens, "mask": mask, "states": out.last_hidden_state.numpy(),
        "config": np.array(config.to_json_string(use_diff=False)),
        "shapes": np.array(json.dumps(shapes)),
    }  # fmt: skip


def torch_zip(path: pathlib.Path) -> None:
    """A file of the published form, with views, shared storage and every number type."""
    base = torch.from_numpy(random_tensor("base", (4, 6)))
    state = collections.OrderedDict(
        weight=base, transposed=base.t(), part=base[1:3, ::2], empty=torch.zeros(0, 3),
        half=base.half(), bfloat=base.bfloat16(), double=base.double(), scalar=torch.tensor(2.5),
        integers=torch.arange(5), parameter=nn.Parameter(base[0].clone()),
        flags=torch.tensor([True, False]),
    )  # fmt: skip
    state._metadata = collections.OrderedDict(version=1)
    package = {"xp.cfg": "transformer_lm:\n  dim: 16\n", "best_state": state}
    package |= {"version": 1, "list": [1, 2.5, None, True, -7, 2**40], "pair": (1, "a")}
    torch.save(package, path)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--live", type=pathlib.Path)
    live = parser.parse_args().live
    out = HERE / "melodyflow" if live is None else live
    out.mkdir(exist_ok=True, parents=True)
    cases = json.loads((HERE / "melodyflow_cases.json").read_text())
    torch.set_num_threads(1)
    for name, case in cases["flow"].items():
        arrays = flow(name, case)
        np.savez_compressed(out / f"{name}.npz", **arrays)
        print(name, float(np.abs(arrays["v"]).max()))
    for name, case in cases["t5"].items():
        arrays = t5(name, case, live)
        np.savez_compressed(out / f"{name}.npz", **arrays)
        print(name, float(np.abs(arrays["states"]).max()))
    torch_zip(out / "state_dict.bin")


if __name__ == "__main__":
    main()
