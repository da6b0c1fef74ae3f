"""Run tiny random transformers models and write what they compute.

    python tests/golden/make_transformers_goldens.py                 the committed goldens
    python tests/golden/make_transformers_goldens.py --live FOLDER   every case, with its folder

Needs torch and transformers (5.23.0 made the committed files).  Weights are not stored: they
follow from each tensor's name by numpy's frozen RandomState, see `random_weights.py` beside it.
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
from random_weights import random_tensor, random_tokens  # noqa: E402

COMMON = {
    "vocab_size": 40,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 20,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "use_cache": False,
}
LLAMA4 = {
    "hidden_size": 20,
    "num_hidden_layers": 4,
    "head_dim": 8,
    "intermediate_size": 12,
    "intermediate_size_mlp": 28,
    "num_local_experts": 4,
    "attention_chunk_size": 7,
    "floor_scale": 4,
    "attn_scale": 0.3,
}


def build(case: dict) -> torch.nn.Module:
    if case["class"] == "Llama":
        config = transformers.LlamaConfig(**{**COMMON, **case["config"]})
        model = transformers.LlamaForCausalLM._from_config(config, attn_implementation="eager")
    else:
        config = transformers.Llama4TextConfig(**{**COMMON, **LLAMA4, **case["config"]})
        model = transformers.Llama4ForCausalLM._from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            tensor.copy_(torch.from_numpy(random_tensor(name, tuple(tensor.shape))))
    return model.float().eval()


def run(case: dict) -> tuple[torch.nn.Module, dict[str, np.ndarray]]:
    """Return the model and tokens, logits and gradients of the mean next-token loss."""
    model = build(case)
    tokens = random_tokens(case["length"], COMMON["vocab_size"])
    batch = torch.from_numpy(tokens)
    logits = model(batch).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
    loss.backward()
    out = {"tokens": tokens, "logits": logits.detach().numpy(), "loss": loss.detach().numpy()}
    for name, tensor in model.named_parameters():
        grad = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
        out[f"grad/{name}"] = grad.numpy()
    return model, out


def kept(case: dict, name: str) -> bool:
    """Return whether a committed golden keeps this array."""
    if not name.startswith("grad/") or case.get("grads") == "all":
        return True
    return any(part in name for part in ("router", "norm", "layers.1.self_attn.q_proj"))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--live", type=pathlib.Path)
    arguments = parser.parse_args()
    cases = json.loads((HERE / "transformers_cases.json").read_text())
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
        if model.config.tie_word_embeddings:
            shapes.pop("lm_head.weight")
        model.config.architectures = [type(model).__name__]
        out["config"] = np.array(model.config.to_json_string(use_diff=False))
        out["shapes"] = np.array(json.dumps(shapes))
        (HERE / "transformers").mkdir(exist_ok=True)
        arrays = {key: value for key, value in out.items() if kept(case, key)}
        np.savez_compressed(HERE / "transformers" / f"{name}.npz", **arrays)
        print(name, float(out["loss"]), float(np.abs(out["logits"]).max()))


if __name__ == "__main__":
    main()
