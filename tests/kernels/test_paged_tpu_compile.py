"""Paged attention compiled by Mosaic for four generations of TPU, at the models' shapes."""

import re

import pytest
from programs import paged_program
from test_attention_tpu_compile import compiled

from jaxherd.kernels.paged_attention.arg_specs import ARG_SPECS
from jaxherd.planning.mosaic import TOPOLOGIES

pytest.importorskip("libtpu", reason="needs the TPU compiler: pip install 'jaxherd[tpu]'")

QUICK = [
    ("v5p", "scout_full"),
    ("v6e", "scout_draft_4"),
    ("v5e", "mobilellm_pro_local_int8"),
    ("tpu7x", "head_80_float32"),
]


def check(chip, name):
    spec = ARG_SPECS[name]
    text = compiled(chip, *paged_program(spec))
    calls = re.findall(r"%([\w.]+) = .*custom_call_target=\"tpu_custom_call\"", text)
    assert len(calls) == 1 and calls[0].startswith("paged_attention"), "chosen by platform"
    pool = f"[{spec.batch * min(-(-spec.length // spec.page_size), 64) + 1},"
    moved = [line for line in text.splitlines() if re.search(r" (copy|transpose)\(", line)]
    assert not [line for line in moved if pool in line.split(" = ")[1][:40]], (
        "the pool is not copied"
    )


@pytest.mark.parametrize("chip, name", QUICK)
@pytest.mark.filterwarnings("ignore")
def test_compiles(chip, name):
    check(chip, name)


@pytest.mark.tpu_compile_full
@pytest.mark.parametrize("chip", TOPOLOGIES)
@pytest.mark.parametrize("name", ARG_SPECS)
@pytest.mark.filterwarnings("ignore")
def test_every_spec_compiles(chip, name):
    check(chip, name)
