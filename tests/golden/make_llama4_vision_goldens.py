"""Run tiny random multimodal Llama 4 models of transformers and write what they compute.

    python tests/golden/make_llama4_vision_goldens.py                 the committed goldens
    python tests/golden/make_llama4_vision_goldens.py --live FOLDER   every case, with its folder

Needs torch and transformers (5.23.0 made the committed files).  Neither weights nor tiles are
stored: they follow from names and sizes, see `random_weights.py` beside it.
"""

import argparse
import json
import pathlib
import sys

import numpy as np
import torch
import transformers

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE))
from make_transformers_goldens import COMMON, LLAMA4  # noqa: E402
from random_weights import placeholder_tokens, random_tensor, random_tiles  # noqa: E402


def build(case: dict) -> torch.nn.Module:
    config = transformers.Llama4Config(
        text_config={**COMMON, **LLAMA4, **case["text"]},
        vision_config=case["vision"],
        image_token_index=COMMON["vocab_size"] - 1,
        boi_token_index=1,
        eoi_token_index=2,
    )
    model = transformers.Llama4ForConditionalGeneration._from_config(
        config, attn_implementation="eager"
    )
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            tensor.copy_(torch.from_numpy(random_tensor(name, tuple(tensor.shape))))
    return model.float().eval()


def run(case: dict) -> tuple[torch.nn.Module, dict[str, np.ndarray]]:
    """Return the model and tokens, states, features, logits and gradients of the mean loss."""
    model, vision = build(case), case["vision"]
    side = round(
        vision["image_size"] // vision["patch_size"] * vision.get("pixel_shuffle_ratio", 0.5)
    )
    tokens = placeholder_tokens(case["images"], side * side, case["length"], COMMON["vocab_size"])
    tiles = random_tiles(
        sum(map(sum, case["images"])), vision["image_size"], vision.get("num_channels", 3)
    )
    seen = {}

    def watch(name, module):
        module.register_forward_hook(lambda _m, _i, out: seen.update({name: out.detach().numpy()}))

    watch("states", model.vision_model.layernorm_post)
    watch("features", model.vision_model.vision_adapter)
    watch("projected", model.multi_modal_projector)
    batch = torch.from_numpy(tokens)
    logits = model(batch, pixel_values=torch.from_numpy(tiles.transpose(0, 3, 1, 2))).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
    loss.backward()
    out = {
        "tokens": tokens,
        "logits": logits.detach().numpy(),
        "loss": loss.detach().numpy(),
        **seen,
    }
    for name, tensor in model.named_parameters():
        grad = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
        out[f"grad/{name}"] = grad.numpy()
    return model, out


def kept(name: str) -> bool:
    """Return whether a committed golden keeps this array: of the text's gradients only some."""
    some = ("embed_tokens", "router", "layers.1.self_attn.q_proj")
    return "grad/language_model" not in name or any(part in name for part in some)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--live", type=pathlib.Path)
    arguments = parser.parse_args()
    cases = json.loads((HERE / "llama4_vision_cases.json").read_text())
    torch.set_num_threads(1)
    for name, case in cases.items():
        if arguments.live is None and not case.get("golden"):
            continue
        model, out = run(case)
        if arguments.live is not None:
            folder = arguments.live / name
            model.save_pretrained(folder)
            np.savez(folder / "golden.npz", **out)
            continue
        shapes = {n: list(t.shape) for n, t in model.state_dict().items()}
        model.config.architectures = [type(model).__name__]
        out["config"] = np.array(model.config.to_json_string(use_diff=False))
        out["shapes"] = np.array(json.dumps(shapes))
        (HERE / "llama4_vision").mkdir(exist_ok=True)
        arrays = {key: value for key, value in out.items() if kept(key)}
        np.savez_compressed(HERE / "llama4_vision" / f"{name}.npz", **arrays)
        print(name, float(out["loss"]), float(np.abs(out["logits"]).max()))


if __name__ == "__main__":
    main()
