"""Small GGUF files for tests, written by the gguf package."""

import gguf
import numpy as np

Q = gguf.GGMLQuantizationType
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def gguf_name(name: str) -> str:
    fixed = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in fixed:
        return fixed[name]
    _, _, layer, rest = name.split(".", 3)
    stem, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{NAMES[stem]}.{kind}"


def permuted(value: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to q and k: half rows of a head become pairs."""
    split = value.reshape(heads, 2, value.shape[0] // heads // 2, *value.shape[1:])
    return split.swapaxes(1, 2).reshape(value.shape)


def write(
    path,
    tensors,
    kind=Q.F32,
    *,
    heads=4,
    kv_heads=2,
    head_dim=6,
    width=24,
    hidden=20,
    extra=(),
    kinds=None,
):
    """Write the tensors of a Hugging Face llama as GGUF; `kinds` are formats of single tensors."""
    kinds = kinds or {}
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(hidden)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_eos_token_id(3)
    for add in extra:
        add(writer)
    for name, value in tensors.items():
        if "q_proj" in name or "k_proj" in name:
            value = permuted(value, heads if "q_proj" in name else kv_heads)
        one = Q.F32 if value.ndim == 1 else kinds.get(name, kind)
        data = np.ascontiguousarray(value) if one == Q.F32 else gguf.quants.quantize(value, one)
        writer.add_tensor(gguf_name(name), data, raw_dtype=one)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
