# ---
# jupyter:
#   jupytext:
#     formats: py:percent,ipynb
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Llama 4 in jaxherd, on a CPU, in three minutes
#
# What makes Llama 4's text decoder its own: three layers of *chunked* attention with RoPE, then one
# *full* layer without any position encoding (NoPE) whose queries grow with position; and, in every
# layer of Scout, 16 routed experts of which each token meets one, beside a shared expert that all
# meet. Here you look at each of these, and train a small one on real text.

# %%
# In Colab: install jaxherd first (the repository's README says from where).
import importlib.util

if importlib.util.find_spec("jaxherd") is None:
    raise SystemExit("Run: !pip install 'jaxherd[demo] @ git+URL-OF-THE-REPOSITORY'")

# %%
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from jaxherd.core import catalog
from jaxherd.models import presets

# %% [markdown]
# ## The released sizes, exactly
# A config knows its parameters and FLOPs without allocating anything.

# %%
for name in ("llama4-scout", "llama4-maverick", "mobilellm-pro", "smollm2-135m"):
    config = presets.preset(name)
    pattern = " | ".join(
        f"{s.count} x ({' + '.join(f'{r.length} {r.layer.attention.kind}' for r in s.runs)})"
        for s in config.segments()
    )
    print(f"{name:16} {config.num_params():>15,} parameters, "
          f"{config.active_params():>14,} active, layers: {pattern}")  # fmt: skip

# %% [markdown]
# ## Who sees whom
# A chunked layer is block-diagonal: token 8192 sees only itself. A NoPE layer sees everything, and
# its queries are scaled by $1 + 0.1\,\ln(1 + \lfloor (p+1)/8192 \rfloor)$.

# %%
from jaxherd.kernels.attention import AttentionMask
from jaxherd.layers.attention import TemperatureTuning

positions = jnp.arange(24, dtype=jnp.int32)[None]
figure, axes = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
for axis, (kind, size) in zip(axes, [("chunked", 8), ("causal", None)]):
    mask = AttentionMask(positions, positions, kind=kind, size=size)
    axis.imshow(mask.dense()[0], cmap="Blues")
    axis.set(
        title=f"{kind}{'' if size is None else f', size {size}'}", xlabel="key", ylabel="query"
    )
reach = jnp.arange(0, 262144, 64)
axes[2].plot(reach, TemperatureTuning()(reach), color="#1b6ca8")
axes[2].set(title="temperature of NoPE queries", xlabel="position", ylabel="scale")
plt.show()

# %% [markdown]
# ## A small Scout, trained on Python's sources and Shakespeare
# The very recipe of `jaxherd run llama4/scout --on cpu`, made shorter by overrides.

# %%
from jaxherd.core.runner import run_experiment

experiment = catalog.load("llama4/scout", "cpu").with_overrides(
    [
        "pretrain.run_config.steps=40",
        "pretrain.run_config.eval_every=20",
        "pretrain.optimizer.schedule.warmup_steps=8",
        "pretrain.data.max_eval_batches=4",
    ]
)
workdir = pathlib.Path(tempfile.mkdtemp()) / "scout"
summary = run_experiment(
    experiment, workdir, target="cpu", devices=tuple(jax.devices("cpu")[:1]), quiet=True
)
{name: round(value, 3) for name, value in summary["pretrain"].items() if "bits" in name}

# %%
from jaxherd.training.loggers import read_records

records = [r for r in read_records(workdir / "pretrain" / "metrics.jsonl") if r["kind"] == "train"]
load = np.concatenate(
    [np.asarray(v) for k, v in records[-1].items() if k.startswith("expert_load")]
)
figure, axes = plt.subplots(1, 2, figsize=(11, 3.2), layout="constrained")
axes[0].plot([r["step"] for r in records], [r["loss"] for r in records], color="#1b6ca8")
axes[0].set(title="loss", xlabel="step", ylabel="nats a token")
image = axes[1].imshow(load, aspect="auto", cmap="viridis", vmin=0)
axes[1].set(title="share of tokens by expert", xlabel="expert", ylabel="routed layer")
figure.colorbar(image, ax=axes[1])
plt.show()

# %% [markdown]
# Forty steps teach it the commonest words and a fair routing, not yet sentences; the full recipe
# (500 steps) does better, and `report.md` in its folder shows the text before and after.
#
# ## Generate with what you trained
# A run's folder is a model source; a module is a pytree that any JAX transformation takes.

# %%
import jaxherd
from jaxherd.inference.generate import Generator, Request
from jaxherd.inference.sampling import Sampling

tokenizer = jaxherd.load_tokenizer(workdir)
generator = Generator(jaxherd.load(workdir), tokenizer)
prompt = "def "
request = Request(tuple(tokenizer.encode(prompt, add_bos=True)), 60, Sampling(temperature=0.7))
print(prompt + (generator.run([request])[0].text or ""))

# %% [markdown]
# ## Before you rent a slice
# `jaxherd plan llama4/scout --on v5p:4x4x8` compiles the full-size step with the real TPU compiler,
# here, and tells memory per chip, collectives and an estimate of the step time. Committed plans come
# with the package.

# %%
import json

from jaxherd.core import resources

for path in sorted((resources.folder("tpu") / "plans").glob("*.json")):
    plan = json.loads(path.read_text())
    print(f"{path.stem:34} fits: {plan['fits']!s:5}  {plan['hbm_gib_per_chip']:6.1f} of "
          f"{plan['hbm_limit_gib']:.1f} GiB a chip, bound by {plan['bottleneck']}")  # fmt: skip
