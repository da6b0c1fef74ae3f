"""A tiny music model in the form of the two published files, without torch."""

import pathlib
import zipfile

import jax
import numpy as np
import tiny_music
import yaml

from jaxherd.core.modules import flatten, split
from jaxherd.methods.music_model import MusicModel
from jaxherd.models.seanet import AudioAutoencoderConfig, SeanetConfig
from jaxherd.models.velocity_transformer import TextStates, VelocityTransformerConfig
from jaxherd.weights.melodyflow_codec import name_table
from jaxherd.weights.melodyflow_flow import FlowCheckpoint, write_flow_state

CODEC = AudioAutoencoderConfig(
    SeanetConfig(2, 4, 4, ratios=(4, 2), lstm=1, pad_mode="reflect", last_kernel_size=3),
    tiny_music.RATE,
)
FLOW = VelocityTransformerConfig(
    16, 3, 4, latent_dim=4, ff_multiple=2, conditioner=TextStates(6), rope_rounding="bfloat16"
)
# As hydra writes them: with references from one section to another.
FLOW_CONFIG = {
    "solver": "melodyflow",
    "sample_rate": tiny_music.RATE,
    "channels": 2,
    "width": 16,
    "dataset": {"segment_duration": 0.05},
    "classifier_free_guidance": {"training_dropout": 0.2, "inference_coef": 3.0},
    "transformer_lm": {
        "dim": "${width}", "num_heads": 4, "num_layers": 3, "hidden_scale": 2, "dropout": 0.0,
        "activation": "gelu", "norm_first": True, "bias_ff": False, "bias_attn": False,
        "bias_proj": False, "causal": False, "custom": False, "memory_efficient": True,
        "layer_scale": None, "positional_embedding": "rope", "xpos": False, "norm": "layer_norm",
        "add_zero_attn": True, "skip_connections": True, "qk_layer_norm": False, "kv_repeat": 1,
    },
    "conditioners": {"description": {"model": "t5", "t5": {"name": "t5-base", "finetune": False}}},
    "fuser": {"sum": [], "prepend": [], "cross": ["description"], "input_interpolate": []},
}  # fmt: skip
CODEC_CONFIG = {
    "sample_rate": tiny_music.RATE,
    "channels": 2,
    "encodec": {
        "autoencoder": "seanet", "quantizer": "no_quant", "sample_rate": "${sample_rate}",
        "channels": "${channels}", "causal": False, "renormalize": False,
    },
    "seanet": {
        "dimension": 4, "channels": "${channels}", "causal": "${encodec.causal}", "n_filters": 4,
        "n_residual_layers": 1, "ratios": [4, 2], "activation": "snake",
        "activation_params": {"alpha": 1.0}, "norm": "weight_norm", "norm_params": {},
        "kernel_size": 7, "residual_kernel_size": 3, "last_kernel_size": 3, "dilation_base": 2,
        "pad_mode": "reflect", "true_skip": True, "compress": 2, "lstm": 1,
        "disable_norm_outer_blocks": 0, "encoder": {"dimension": 8},
        "decoder": {"trim_right_ratio": 1.0, "final_activation": None},
    },
}  # fmt: skip


def music_model() -> MusicModel:
    """Return the model that the files hold."""
    build = jax.jit(lambda key: (CODEC.build(key), FLOW.build(jax.random.fold_in(key, 1))))
    autoencoder, velocity = build(jax.random.key(3))
    return MusicModel(
        autoencoder, velocity, tiny_music.MEAN, tiny_music.STD, tiny_music.RATE,
        text_encoder="hf://google-t5/t5-base", clip_seconds=0.05,
    )  # fmt: skip


def flow_state(model: MusicModel) -> dict[str, np.ndarray]:
    """Return the flow's `best_state`."""
    return write_flow_state(FlowCheckpoint(model.velocity, model.mean, model.std))


def codec_state(model: MusicModel) -> dict[str, np.ndarray]:
    """Return the codec's `best_state`."""
    params = flatten(split(model.autoencoder)[1])
    state = {}
    for entry in name_table(model.autoencoder.config):
        value, name = np.asarray(params[entry.ours]), entry.names[0]
        if entry.permutation is not None:
            value = value.transpose(np.argsort(entry.permutation))
        elif name.endswith("alpha"):
            value = value.reshape(1, -1, 1)
        elif name.endswith("original0"):
            value = value.reshape(-1, 1, 1)
        state[name] = value
    return state


def write(
    folder: pathlib.Path,
    *,
    flow=None,
    codec=None,
    flow_config=FLOW_CONFIG,
    codec_config=CODEC_CONFIG,
    model=None,
) -> pathlib.Path:
    """Write both files; a config may be a dictionary, a text, or None for none at all."""  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    model = model or music_model()
    for name, state, config in (
        ("state_dict", flow or flow_state(model), flow_config),
        ("compression_state_dict", codec or codec_state(model), codec_config),
    ):
        package = {"version": "1.4.0a1", "exported": True, "best_state": state}
        if config is not None:
            text = config if isinstance(config, str) else yaml.safe_dump(config)
            package["xp.cfg"] = text
        write_torch_zip(folder / f"{name}.bin", package)
    return folder


def write_torch_zip(path: pathlib.Path, package: dict) -> None:
    """Write dictionaries, texts, booleans and float32 arrays as torch does: opcode by opcode."""
    values: list[np.ndarray] = []

    def text(s: str) -> bytes:
        raw = s.encode()
        return b"X" + len(raw).to_bytes(4, "little") + raw

    def number(n: int) -> bytes:
        return b"J" + int(n).to_bytes(4, "little", signed=True)

    def many(numbers) -> bytes:
        return b"(" + b"".join(map(number, numbers)) + b"t"

    def written(x) -> bytes:
        if isinstance(x, dict):
            return b"}(" + b"".join(text(k) + written(v) for k, v in x.items()) + b"u"
        if isinstance(x, bool):
            return b"\x88" if x else b"\x89"
        if isinstance(x, str):
            return text(x)
        x = np.ascontiguousarray(x, np.float32)
        values.append(x)
        strides = [s // 4 for s in x.strides]
        record = text("storage") + b"ctorch\nFloatStorage\n" + text(str(len(values) - 1))
        record = b"(" + record + text("cpu") + number(x.size) + b"tQ"
        rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n(" + record + number(0)
        return rebuild + many(x.shape) + many(strides) + b"\x89ccollections\nOrderedDict\n)RtR"

    description = b"\x80\x02" + written(package) + b"."
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(f"{path.stem}/data.pkl", description)
        for number_, value in enumerate(values):
            archive.writestr(f"{path.stem}/data/{number_}", value.tobytes())
        archive.writestr(f"{path.stem}/version", "3\n")
