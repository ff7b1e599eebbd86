"""Compiled programs as read: operations, traffic, loops and groups, each counted by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from baichuan_jax.plan import hlo


def compiled(function, *shapes) -> hlo.Program:
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return hlo.parse(jax.jit(function).lower(*arguments).compile().as_text())


def total(program: hlo.Program, count) -> float:
    return sum(times * count(computation, item) for computation, item, times, _ in program.walk())


def test_products_are_counted_with_the_turns_of_loops_around_them():
    def function(x, w):
        def turn(x, _):
            return jax.lax.fori_loop(0, 3, lambda _, x: x @ w, x), None

        return jax.lax.scan(turn, x, None, length=5)[0]

    program = compiled(function, (16, 64), (64, 64))
    assert total(program, program.flops) == 15 * 2 * 16 * 64 * 64


LOOP = """HloModule m

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[8]{0} get-tuple-element(%p), index=1
  %by = s32[] constant(BY)
  %next = s32[] add(%i, %by)
  ROOT %t = (s32[], f32[8]{0}) tuple(%next, %x)
}

%condition (q: (s32[], f32[8])) -> pred[] {
  %q = (s32[], f32[8]{0}) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %limit = s32[] constant(8)
  ROOT %less = pred[] compare(%j, %limit), direction=LT
}

ENTRY %main (a: f32[8]) -> (s32[], f32[8]) {
  %a = f32[8]{0} parameter(0)
  %first = s32[] constant(1)
  %state = (s32[], f32[8]{0}) tuple(%first, %a)
  ROOT %loop = (s32[], f32[8]{0}) while(%state), condition=%condition, body=%body
}
"""


@pytest.mark.parametrize(("by", "turns"), [(1, 7), (2, 4), (7, 1)])
def test_a_loop_counts_by_its_own_step(by, turns):
    """As where a compiler has unrolled two turns into one: the counter goes up by two."""
    program = hlo.parse(LOOP.replace("BY", str(by)))
    assert program.trip_count(program.entry, program.entry.root) == turns


def test_a_batched_product_counts_every_batch():
    program = compiled(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (7, 16, 32), (7, 32, 24))
    assert total(program, program.flops) == 7 * 2 * 16 * 32 * 24


FUSED = """HloModule m

%fused (p0: f32[32,8,128], p1: s32[], p2: f32[8,128]) -> f32[32,8,128] {
  %p0 = f32[32,8,128]{2,1,0} parameter(0)
  %p2 = f32[8,128]{1,0} parameter(2)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %one = f32[1,8,128]{2,1,0} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,8,128}
  %new = f32[1,8,128]{2,1,0} bitcast(%p2)
  %sum = f32[1,8,128]{2,1,0} add(%one, %new)
  ROOT %out = f32[32,8,128]{2,1,0} dynamic-update-slice(%p0, %sum, %p1, %zero, %zero)
}

ENTRY %main (a: f32[32,8,128], i: s32[], b: f32[8,128]) -> f32[32,8,128] {
  %a = f32[32,8,128]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %b = f32[8,128]{1,0} parameter(2)
  ROOT %fusion = f32[32,8,128]{2,1,0} fusion(%a, %i, %b), kind=kLoop, calls=%fused
}
"""


def test_a_fused_update_of_one_slice_moves_that_slice_only():
    """Read: the slice, the index and the new values; written: the slice. Not the stack of 32."""
    program = hlo.parse(FUSED)
    slice_bytes = 8 * 128 * 4
    assert program.traffic(program.entry, program.entry.root) == 3 * slice_bytes + 4


SLICED = """HloModule m

%fused (p0: f32[32,8,128]) -> (bf16[1,8,128], bf16[2,8,128]) {
  %p0 = f32[32,8,128]{2,1,0} parameter(0)
  %half = bf16[32,8,128]{2,1,0} convert(%p0)
  %one = bf16[1,8,128]{2,1,0} slice(%half), slice={[3:4], [0:8], [0:128]}
  %two = bf16[2,8,128]{2,1,0} slice(%half), slice={[5:7], [0:8], [0:128]}
  ROOT %out = (bf16[1,8,128]{2,1,0}, bf16[2,8,128]{2,1,0}) tuple(%one, %two)
}

ENTRY %main (a: f32[32,8,128]) -> (bf16[1,8,128], bf16[2,8,128]) {
  %a = f32[32,8,128]{2,1,0} parameter(0)
  ROOT %fusion = (bf16[1,8,128]{2,1,0}, bf16[2,8,128]{2,1,0}) fusion(%a), kind=kLoop, calls=%fused
}
"""


def test_fused_slices_at_fixed_places_are_read_alone():
    """Unrolled blocks cut their weights so. Read: three of 32 in float32; written in bfloat16."""
    program = hlo.parse(SLICED)
    assert program.traffic(program.entry, program.entry.root) == 3 * 8 * 128 * (4 + 2)


def test_a_slice_at_a_fixed_place_reads_what_it_writes():
    program = compiled(lambda a: jax.lax.optimization_barrier(a)[3:5], (32, 8))
    slices = [item for item in program.entry.instructions if item.opcode in ("slice", "fusion")]
    assert [program.traffic(program.entry, item) for item in slices] == [2 * 2 * 8 * 4]


def test_shapes_of_tuples_are_summed():
    shape = "((bf16[4,8]{1,0}, f32[3]{0}), /*index=1*/s8[5]{0}, pred[])"
    assert hlo.shape_bytes(shape) == 64 + 12 + 5 + 1


@pytest.mark.parametrize(
    "notation",
    [
        "replica_groups={{0,2,4},{1,3,5}}",
        "replica_groups=[2,3]<=[3,2]T(1,0)",
        "replica_groups=mesh['axis_0'=3,'axis_1'=2] {'axis_0'}",
        "replica_groups=mesh['axis_0'=2,'axis_1'=3], device_ids=(0,2,4,1,3,5) {'axis_1'}",
        "replica_groups=mesh['axis_0'=2,'axis_1'=3], device_ids=([3,2]T(1,0)) {'axis_1'}",
    ],
)
def test_every_notation_of_device_groups(notation):
    assert np.sort(hlo.replica_groups(notation, 6), axis=1).tolist() == [[0, 2, 4], [1, 3, 5]]


def test_groups_in_another_notation_are_refused():
    with pytest.raises(ValueError, match="not known"):
        hlo.replica_groups("replica_groups=ring(0,2,4)", 6)


def test_empty_groups_mean_all_devices():
    assert hlo.replica_groups("replica_groups={}", 4).tolist() == [[0, 1, 2, 3]]


def test_text_without_a_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.parse("nothing here")


def test_post_order_follows_operands_and_what_must_run_before():
    """By hand, as XLA visits: the first operand first, but before it what must run earlier."""
    text = """HloModule step

ENTRY %main (a: f32[2]) -> f32[2] {
  %a = f32[2]{0} parameter(0)
  %late = f32[2]{0} negate(%a)
  %left = f32[2]{0} sine(%a), control-predecessors={%late}
  %right = f32[2]{0} cosine(%a)
  ROOT %last = f32[2]{0} add(%right, %left)
}
"""
    order = [item.name for item in hlo.parse(text).entry.post_order()]
    assert order == ["a", "right", "late", "left", "last"]
