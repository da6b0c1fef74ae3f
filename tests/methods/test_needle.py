"""Needle in a haystack: cells, files, resumption, and lengths that do not fit."""

import csv
import dataclasses
import json
from typing import Any

import pytest

from jaxherd.core.errors import JaxherdError
from jaxherd.data.haystack import Haystack
from jaxherd.data.tokenizers import ByteTokenizer
from jaxherd.inference.requests import Result
from jaxherd.methods import needle
from jaxherd.methods.needle import (
    NeedleGrid,
    cache_bytes,
    check_lengths,
    is_found,
    run_grid,
    shares,
)
from jaxherd.models import presets

WORDS = ByteTokenizer()
CONFIG = presets.llama(
    vocab_size=259, embed_dim=8, num_layers=2, num_heads=2, num_kv_heads=1, hidden_dim=8, max_length=1024
)  # fmt: skip


class Reader:
    """Stands in for a model that reads the first part of a text only: it knows what it should say."""

    reach = 250
    asked = 0

    def __init__(self, module, tokenizer, stop_ids=None):
        self.tokenizer = tokenizer
        type(self).asked = 0

    def run(self, requests):
        [request] = requests
        type(self).asked += 1
        text = self.tokenizer.decode(request.tokens[: self.reach])
        at = text.find("The magic number of ")
        number = "".join(c for c in text[at:].split(".")[0] if c.isdigit()) if at >= 0 else ""
        return [Result([1], f" It is {number or 'unknown'}.", "stop")]


@pytest.fixture
def module():
    import jax

    return CONFIG.build(jax.random.key(0))


@pytest.fixture
def grid(tmp_path):
    (tmp_path / "text.txt").write_text("".join(f"A sentence of text {n:03d}. " for n in range(30)))
    return NeedleGrid((300, 600), (0.0, 0.9), 2, Haystack(str(tmp_path / "text.txt")))


def test_cells_and_files(module, grid, tmp_path):
    folder, told = tmp_path / "out", []
    found = run_grid(
        module,
        WORDS,
        grid,
        folder,
        about="reader",
        report=lambda *g: told.append(g),
        make_generator=Reader,
    )
    table = shares(grid, found)
    # It reads 250 tokens: of 300 all but the end, of 600 the beginning.
    assert table[0].tolist() == [1.0, 1.0] and table[1, 1] == 0.0
    assert Reader.asked == 8 and told[-1] == ("needles asked", 8, 8)
    rows = list(csv.reader((folder / "needle.csv").open()))
    assert rows[0] == ["depth", "300", "600"] and [float(x) for x in rows[1]] == [0.0, *table[0]]
    summary = json.loads((folder / "needle.json").read_text())
    assert summary["found"] == pytest.approx(table.mean()) and summary["by_length"]["600"] == 0.5
    assert (folder / "needle.png").read_bytes().startswith(b"\x89PNG")
    answers = {one.said for one in found if one.right}
    assert len(answers) == sum(one.right for one in found), "no two cells share a needle"


def test_it_goes_on_where_it_stopped(module, grid, tmp_path):
    folder = tmp_path / "out"
    wanted = run_grid(module, WORDS, grid, folder, about="m", make_generator=Reader)
    lines = (folder / "answers.jsonl").read_text().splitlines(keepends=True)
    (folder / "answers.jsonl").write_text("".join(lines[:3]) + lines[3][:20])
    (folder / "needle.png").unlink()
    assert run_grid(module, WORDS, grid, folder, about="m", make_generator=Reader) == wanted
    assert Reader.asked == 5 and (folder / "needle.png").exists()
    with pytest.raises(JaxherdError, match="another grid or model"):
        run_grid(module, WORDS, grid, folder, about="another", make_generator=Reader)
    other = dataclasses.replace(grid, needles=3)
    with pytest.raises(JaxherdError, match="another grid or model"):
        run_grid(module, WORDS, other, folder, about="m", make_generator=Reader)


def test_lengths_that_do_not_fit(module):
    with pytest.raises(JaxherdError, match="more than the model's 1024"):
        check_lengths(module, [100, 2000])
    # Two layers, keys and values, one head of 4, float32, up to a power of two.
    assert cache_bytes(module, 600) == 2 * 2 * 1024 * 4 * 4 + positions(module, 1024)
    need = cache_bytes(module, 1000)
    check_lengths(module, [1000], free=2 * need)
    with pytest.raises(JaxherdError, match="256 would fit"):
        check_lengths(module, [1000], free=int(cache_bytes(module, 256) / 0.69))
    with pytest.raises(JaxherdError, match="no length would fit"):
        check_lengths(module, [1000], free=10)


def positions(module, capacity):
    """Return the bytes of what the cache keeps besides keys and values."""
    import jax

    leaves = jax.eval_shape(lambda: jax.tree.leaves(module.init_cache(1, capacity)))
    return sum(x.size * x.dtype.itemsize for x in leaves if x.dtype.kind == "i")


def test_right_answers():
    assert is_found("It is 12345.", "12345") and is_found("12345", "12345")
    assert not is_found("It is 123456", "12345") and not is_found("x12345", "12345")


def test_wrong_grids():
    wrongs: list[dict[str, Any]] = [
        dict(lengths=()), dict(lengths=(100, 100)), dict(lengths=(10,)), dict(lengths=(100,), depths=(2.0,)),
        dict(lengths=(100,), needles=0),
    ]  # fmt: skip
    for wrong in wrongs:
        with pytest.raises(JaxherdError):
            NeedleGrid(**wrong)
    assert (
        needle.hash_cell(512, 0.5, 0)
        != needle.hash_cell(512, 0.5, 1)
        != needle.hash_cell(1024, 0.5, 1)
    )
