"""The real pretrained SmolLM2-135M against transformers on the same dequantised weights."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxherd
from jaxherd.data.chat import encode_chat
from jaxherd.inference.generate import Generator, Request

pytestmark = [pytest.mark.slow, pytest.mark.oracle]

NEW = 64
ORACLE = """
import sys, numpy as np, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
prompts, out = np.load(sys.argv[2]), {}
with torch.inference_mode():
    for name in prompts.files:
        ids = torch.from_numpy(prompts[name])[None].long()
        out["logits_" + name] = model(ids).logits[0].numpy()
        tokens = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                                max_new_tokens=int(sys.argv[4]), min_new_tokens=int(sys.argv[4]))
        out["tokens_" + name] = tokens[0, ids.shape[1]:].numpy()
np.savez(sys.argv[3], **out)
"""


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    import importlib.util
    import os

    python = os.environ.get("JAXHERD_ORACLE_PYTHON")
    if python is None:
        if importlib.util.find_spec("torch") is None:
            pytest.skip("needs torch and transformers: set JAXHERD_ORACLE_PYTHON")
        python = sys.executable
    module = jaxherd.load("smollm2-135m-instruct")
    tokenizer = jaxherd.load_tokenizer("smollm2-135m-instruct")
    chat = [{"role": "user", "content": "Explain in two sentences why the sky is blue."}]
    prompts = {
        "plain": tokenizer.encode("The capital of France is"),
        "code": tokenizer.encode("def fibonacci(n):\n    "),
        "chat": encode_chat(tokenizer, chat),
        "long": tokenizer.encode("One day a small robot walked into the library. " * 25),
    }
    folder = tmp_path_factory.mktemp("smollm2")
    jaxherd.save(module, folder / "model", format="hf")
    np.savez(folder / "prompts.npz", **prompts)
    arguments = [folder / "model", folder / "prompts.npz", folder / "out.npz", NEW]
    subprocess.run([python, "-c", ORACLE, *map(str, arguments)], check=True)
    return module, tokenizer, prompts, dict(np.load(folder / "out.npz"))


def test_published_size(real):
    assert real[0].config.num_params() == 134_515_008


def test_logits(real):
    module, _, prompts, theirs = real
    forward = jax.jit(lambda m, t: m(t))
    for name, tokens in prompts.items():
        logits = forward(module, jnp.asarray([tokens], jnp.int32))[0]
        difference = np.abs(np.asarray(logits) - theirs[f"logits_{name}"]).max()
        print(f"{name}: {len(tokens)} tokens, largest difference {difference:.2e}")
        assert difference < 1e-2


def test_greedy_continuations(real):
    module, tokenizer, prompts, theirs = real
    generator = Generator(module, stop_ids=())
    requests = [Request(tuple(tokens), NEW) for tokens in prompts.values()]
    for name, result in zip(prompts, generator.run(requests)):
        print(name, repr(tokenizer.decode(result.tokens)))
        assert result.tokens == theirs[f"tokens_{name}"].tolist(), name


def test_text_is_english(real):
    module, tokenizer, prompts, _ = real
    text = "".join(Generator(module, tokenizer).stream(Request(tuple(prompts["plain"]), 12)))
    assert "Paris" in text
