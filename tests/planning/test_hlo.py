"""Reading compiled programs: shapes, groups, trip counts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxherd.core.errors import JaxherdError
from jaxherd.planning.costs import attention_flops
from jaxherd.planning.hlo import Shape, parse_hlo, replica_groups

# Written by hand: a loop of 3 around a loop of 5, and a loop whose bound is an argument.
NESTED = """HloModule nested, is_scheduled=true, num_partitions=4

%inner_body (p: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %p = (s32[], bf16[8,128]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%p), index=1
  %y = bf16[8,128]{1,0} tanh(%x), metadata={op_name="jit(f)/while/body/tanh"}
  ROOT %out = (s32[], bf16[8,128]{1,0}) tuple(%i, %y)
}

%inner_condition (p.1: (s32[], bf16[8,128])) -> pred[] {
  %five = s32[]{:T(128)} constant(5)
  %p.1 = (s32[], bf16[8,128]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  ROOT %less = pred[]{:T(512)} compare(%i.1, %five), direction=LT
}

%outer_body (q: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %q = (s32[], bf16[8,128]{1,0}) parameter(0)
  ROOT %loop = (s32[], bf16[8,128]{1,0}) while(%q), condition=%inner_condition, body=%inner_body
}

%compare_fusion (a: s32[], b: s32[]) -> pred[] {
  %a = s32[] parameter(0)
  %b = s32[] parameter(1)
  ROOT %c = pred[] compare(%a, %b), direction=LT
}

%outer_condition (q.1: (s32[], bf16[8,128])) -> pred[] {
  %q.1 = (s32[], bf16[8,128]{1,0}) parameter(0)
  %three = s32[] constant(3)
  %three.copy = s32[] copy(%three)
  %i.2 = s32[] get-tuple-element(%q.1), index=0
  ROOT %cf = pred[] fusion(%i.2, %three.copy), kind=kLoop, calls=%compare_fusion
}

%open_condition (q.2: (s32[], s32[])) -> pred[] {
  %q.2 = (s32[], s32[]) parameter(0)
  %i.3 = s32[] get-tuple-element(%q.2), index=0
  %n = s32[] get-tuple-element(%q.2), index=1
  ROOT %less.1 = pred[] compare(%i.3, %n), direction=LT
}

ENTRY %main (x.1: (s32[], bf16[8,128]), n.1: (s32[], s32[])) -> (s32[], bf16[8,128]) {
  %x.1 = (s32[], bf16[8,128]{1,0}) parameter(0)
  %n.1 = (s32[], s32[]) parameter(1)
  %open = (s32[], s32[]) while(%n.1), condition=%open_condition, body=%outer_body
  ROOT %outer = (s32[], bf16[8,128]{1,0}) while(%x.1), condition=%outer_condition, body=%outer_body
}
"""


def test_trip_counts_multiply():
    module = parse_hlo(NESTED)
    schedule = module.schedule()
    # The outer body runs 3 times and once for the loop nobody can count.
    assert schedule.runs["outer_body"] == 3 + 1
    assert schedule.runs["inner_body"] == 5 * (3 + 1)
    assert schedule.unknown_loops == ("open",)
    assert module.num_partitions == 4


def test_instruction_fields():
    module = parse_hlo(NESTED)
    body = module.computations["inner_body"]
    assert body.by_name["x"].shapes == (Shape("bf16", (8, 128), memory_space=1),)
    assert body.by_name["y"].bytes == 8 * 128 * 2
    assert body.by_name["y"].op_name == "jit(f)/while/body/tanh"
    assert body.root.name == "out"
    assert body.root.operands == ("i", "y")


@pytest.mark.parametrize(
    ("dtype", "size"),
    [("bf16", 2), ("f32", 4), ("s4", 0.5), ("f8e4m3fn", 1), ("pred", 1), ("c64", 8), ("token", 0)],
)
def test_bytes_by_type(dtype, size):
    assert Shape(dtype, (6, 4)).bytes == 24 * size


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}, x=1", ((0, 1), (2, 3))),
        ("replica_groups={}, x=1", ((0, 1, 2, 3),)),
        ("channel_id=1", ((0, 1, 2, 3),)),
        ("replica_groups=[2,2]<=[4], x=1", ((0, 1), (2, 3))),
        ("replica_groups=[2,2]<=[2,2]T(1,0), x=1", ((0, 2), (1, 3))),
        ("replica_groups=mesh['a'=2,'b'=2] {'b'}, x=1", ((0, 1), (2, 3))),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}, x=1", ((0, 2), (1, 3))),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}, x=1", ((0, 1, 2, 3),)),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}", ((0, 2), (1, 3))),
        ("replica_groups=mesh['a'=4] {'a':(2)2}", ((0, 1), (2, 3))),
        ("replica_groups=mesh['a'=4] {'a':(1)2}", ((0, 2), (1, 3))),
    ],
)
def test_replica_groups(text, groups):
    assert replica_groups(text, 4) == groups


@given(st.permutations([0, 1, 2]), st.lists(st.integers(1, 4), min_size=3, max_size=3))
def test_iota_groups_agree_with_numpy(permutation, dims):
    import numpy as np

    total = int(np.prod(dims))
    flat = np.arange(total).reshape(dims).transpose(permutation).reshape(dims[permutation[0]], -1)
    text = (
        f"replica_groups=[{flat.shape[0]},{flat.shape[1]}]<=[{','.join(map(str, dims))}]"
        f"T({','.join(map(str, permutation))}), x=1"
    )
    assert replica_groups(text, total) == tuple(map(tuple, flat.tolist()))


def test_other_text_is_refused():
    with pytest.raises(JaxherdError, match="no ENTRY"):
        parse_hlo("module @jit_f { }")


def test_attributes_over_several_lines_end_no_computation():
    """A splash kernel prints one; what follows it in the computation must be read."""
    text = """HloModule m, num_partitions=1

%body (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  %kernel = f32[4]{0} custom-call(%p), custom_call_target="tpu_custom_call", backend_config={"a": {
    "b": 1
}}, metadata={op_name="splash"}
  ROOT %after = f32[4]{0} negate(%kernel)
}

%copy (q: f32[4]) -> f32[4] {
  ROOT %q = f32[4]{0} parameter(0)
}, execution_thread="sparsecore"

ENTRY %main (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  ROOT %r = f32[4]{0} call(%x), to_apply=%body
}
"""
    module = parse_hlo(text)
    assert set(module.computations) == {"body", "copy", "main"}
    assert module.computations["body"].root.name == "after"


KERNEL = """HloModule kernel, is_scheduled=true

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %splash_mha_fwd.1 = f32[8]{0} custom-call(%x), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 256}"
}}, metadata={op_name="jit(f)/kernel_flops_fwd_1.500000e+06_dkv_3.000000e+06_dq_2.250000e+06/pallas_call"}
  %splash_mha_dkv_no_residuals.1 = f32[8]{0} custom-call(%splash_mha_fwd.1), custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/transpose(jvp())/kernel_flops_fwd_1.500000e+06_dkv_3.000000e+06_dq_2.250000e+06/pallas_call"}
  %splash_mha_dq_no_residuals.1 = f32[8]{0} custom-call(%splash_mha_fwd.1), custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/transpose(jvp())/kernel_flops_fwd_1.500000e+06_dkv_3.000000e+06_dq_2.250000e+06/pallas_call"}
  ROOT %y = f32[8]{0} tanh(%splash_mha_dkv_no_residuals.1), metadata={op_name="jit(f)/tanh"}
}
"""


def test_a_kernel_whose_attributes_hold_line_breaks_is_one_instruction():
    lines = parse_hlo(KERNEL).computations["main"].instructions
    assert [line.name for line in lines][1:] == [
        "splash_mha_fwd.1",
        "splash_mha_dkv_no_residuals.1",
        "splash_mha_dq_no_residuals.1",
        "y",
    ]
    assert [attention_flops(line) for line in lines] == [
        (0, False), (1.5e6, False), (3e6, True), (2.25e6, True), (0, False),
    ]  # fmt: skip
