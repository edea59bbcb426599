"""What a compiled program's text says, on texts small enough to add up by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instantid_jax.parallel.flops import count_flops
from instantid_jax.parallel.hlo import HloError, costs, parse, taps

LOOP = """HloModule jit_f, is_scheduled=true

%fused_computation.1 (p0: bf16[4,8], p1: bf16[8,16]) -> bf16[4,16] {
  %p0 = bf16[4,8]{1,0} parameter(0)
  %p1 = bf16[8,16]{1,0} parameter(1)
  ROOT %convolution.1 = bf16[4,16]{1,0} convolution(%p0, %p1), dim_labels=bf_io->bf
}

%body (arg: (s32[], bf16[4,8], bf16[8,16])) -> (s32[], bf16[4,8], bf16[8,16]) {
  %arg = (s32[], bf16[4,8]{1,0}, bf16[8,16]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %x = bf16[4,8]{1,0} get-tuple-element(%arg), index=1
  %w = bf16[8,16]{1,0} get-tuple-element(%arg), index=2
  %fusion.1 = bf16[4,16]{1,0:S(1)} fusion(%x, %w), kind=kOutput, calls=%fused_computation.1, backend_config={"estimated_cycles":"100"}
  %kernel = bf16[4,8]{1,0} custom-call(%fusion.1), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"block_q": 1024
}}, backend_config={"custom_call_config":{"body":"TUz="}}
  ROOT %tuple = (s32[], bf16[4,8]{1,0}, bf16[8,16]{1,0}) tuple(%i, %kernel, %w)
}

%condition (arg.1: (s32[], bf16[4,8], bf16[8,16])) -> pred[] {
  %arg.1 = (s32[], bf16[4,8]{1,0}, bf16[8,16]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%arg.1), index=0
  %limit = s32[] constant(7)
  ROOT %compare = pred[] compare(%i.1, %limit), direction=LT
}

%all-reduce-scatter.1 (g: f32[16,4]) -> f32[4,4] {
  %g = f32[16,4]{1,0} parameter(0)
  %all-reduce.1 = f32[16,4]{1,0} all-reduce(%g), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %dynamic-slice.1 = f32[4,4]{1,0} dynamic-slice(%all-reduce.1, %i.3), dynamic_slice_sizes={4,4}
}

ENTRY %main (a: bf16[4,8], b: bf16[8,16], c: f32[16,4], d: f32[2,4]) -> bf16[4,8] {
  %a = bf16[4,8]{1,0} parameter(0)
  %b = bf16[8,16]{1,0} parameter(1)
  %c = f32[16,4]{1,0} parameter(2)
  %d = f32[2,4]{1,0} parameter(3)
  %zero = s32[] constant(0)
  %start = (s32[], bf16[4,8]{1,0}, bf16[8,16]{1,0}) tuple(%zero, %a, %b)
  %loop = (s32[], bf16[4,8]{1,0}, bf16[8,16]{1,0}) while(%start), condition=%condition, body=%body
  %scattered = f32[4,4]{1,0} fusion(%c), kind=kCustom, calls=%all-reduce-scatter.1, backend_config={"estimated_cycles":"5"}
  %gathered = f32[16,4]{1,0} all-gather(%d), replica_groups=[1,8]<=[8], dimensions={0}
  %summed = f32[2,4]{1,0} all-reduce(%d), replica_groups=mesh['data'=2,'fsdp'=4] {'data'}, to_apply=%add
  ROOT %out = bf16[4,8]{1,0} get-tuple-element(%loop), index=1
}
"""


def test_a_loop_counts_as_often_as_it_runs_and_broken_lines_are_read_on() -> None:
    found = costs(parse(LOOP), slice_size=4)
    assert found.flops == 7 * 2 * 4 * 8 * 16
    assert found.cycles == 7 * 100 + 5
    assert found.uncounted == {"tpu_custom_call": 7}


@pytest.mark.parametrize(
    ("limit", "direction", "step", "turns"), [(7, "LT", 1, 7), (7, "LE", 1, 8), (7, "NE", 1, 7), (10, "LT", 2, 5), (11, "LT", 2, 6), (10, "LE", 5, 3)]
)
def test_a_counter_may_move_by_more_than_one_and_its_end_may_count(limit: int, direction: str, step: int, turns: int) -> None:
    text = LOOP.replace("constant(7)", f"constant({limit})").replace("direction=LT", f"direction={direction}")
    text = text.replace(
        "  ROOT %tuple = (s32[], bf16[4,8]{1,0}, bf16[8,16]{1,0}) tuple(%i,",
        f"  %by = s32[] constant({step})\n  %next = s32[] add(%i, %by)\n  ROOT %tuple = (s32[], bf16[4,8]{{1,0}}, bf16[8,16]{{1,0}}) tuple(%next,",
    )
    assert costs(parse(text), slice_size=4).flops == turns * 2 * 4 * 8 * 16


def test_collectives_by_kind_and_those_between_slices() -> None:
    found = costs(parse(LOOP), slice_size=4)
    assert found.collectives == {"reduce-scatter": 16 * 4 * 4, "all-gather": 16 * 4 * 4, "all-reduce": 2 * 4 * 4}
    assert found.crossing == 16 * 4 * 4 + 2 * 4 * 4  # the scattered sum stays within {0..3} and {4..7}
    assert costs(parse(LOOP)).crossing == 0


BRANCHES = """HloModule jit_g, is_scheduled=true

%cheap (a.1: bf16[4,8]) -> bf16[4,8] {
  %a.1 = bf16[4,8]{1,0} parameter(0)
  ROOT %copy.1 = bf16[4,8]{1,0} copy(%a.1), backend_config={"estimated_cycles":"900"}
}

%dear (a.2: bf16[4,8]) -> bf16[4,8] {
  %a.2 = bf16[4,8]{1,0} parameter(0)
  %w.2 = bf16[8,8]{1,0} constant({...})
  ROOT %dot.2 = bf16[4,8]{1,0} dot(%a.2, %w.2), lhs_contracting_dims={1}, rhs_contracting_dims={0}, backend_config={"estimated_cycles":"30"}
}

ENTRY %main (a: bf16[4,8], p: s32[]) -> bf16[4,8] {
  %a = bf16[4,8]{1,0} parameter(0)
  %p = s32[] parameter(1)
  ROOT %chosen = bf16[4,8]{1,0} conditional(%p, %a, %a), branch_computations={%cheap, %dear}
}
"""


def test_of_a_condition_the_branch_with_more_products_counts() -> None:
    found = costs(parse(BRANCHES))
    assert found.flops == 2 * 4 * 8 * 8
    assert found.cycles == 30
    swapped = BRANCHES.replace("{%cheap, %dear}", "{%dear, %cheap}")
    assert costs(parse(swapped)) == found
    without = BRANCHES.replace(" dot(", " add(")  # with no products the cycles decide
    assert costs(parse(without)).cycles == 900


def test_bytes_are_those_of_hbm_alone() -> None:
    loop = 7 * ((4 * 8 + 8 * 16) * 2 + 4 * 8 * 2)  # the product's operands, the kernel's result; the product's result lies in scratch memory
    rest = (16 * 4 + 4 * 4) * 4 + (2 * 4 + 16 * 4) * 4 + 2 * (2 * 4) * 4
    assert costs(parse(LOOP)).hbm_bytes == loop + rest


SLICES = """HloModule slices, is_scheduled=true

%kept (p0: bf16[48,4,8], p1: bf16[4,8], p2: s32[], p3: bf16[48,4,8]) -> (bf16[48,4,8], bf16[4,8]) {
  %p0 = bf16[48,4,8]{2,1,0} parameter(0)
  %p1 = bf16[4,8]{1,0} parameter(1)
  %p2 = s32[] parameter(2)
  %p3 = bf16[48,4,8]{2,1,0} parameter(3)
  %zero.1 = s32[] constant(0)
  %weight = bf16[1,4,8]{2,1,0} dynamic-slice(%p3, %p2, %zero.1, %zero.1), dynamic_slice_sizes={1,4,8}
  %flat = bf16[4,8]{1,0} bitcast(%weight)
  %y = bf16[4,8]{1,0} add(%p1, %flat)
  %row = bf16[1,4,8]{2,1,0} bitcast(%y)
  %stack = bf16[48,4,8]{2,1,0} dynamic-update-slice(%p0, %row, %p2, %zero.1, %zero.1)
  ROOT %both = (bf16[48,4,8]{2,1,0}, bf16[4,8]{1,0}) tuple(%stack, %y)
}

%wrapped (g: bf16[4,8]) -> bf16[64,8] {
  %g = bf16[4,8]{1,0} parameter(0)
  ROOT %ag = bf16[64,8]{1,0} all-gather(%g), replica_groups=[1,16]<=[16], dimensions={0}
}

ENTRY %main (a: bf16[48,4,8], b: bf16[4,8], i: s32[], c: bf16[48,4,8]) -> bf16[48,4,8] {
  %a = bf16[48,4,8]{2,1,0} parameter(0)
  %b = bf16[4,8]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %c = bf16[48,4,8]{2,1,0} parameter(3)
  %zero = s32[] constant(0)
  %turn = (bf16[48,4,8]{2,1,0}, bf16[4,8]{1,0}) fusion(%a, %b, %i, %c), kind=kLoop, calls=%kept
  %piece = ((bf16[48,4,8]{2,1,0}), bf16[1,4,8]{2,1,0:S(1)}, s32[]{:S(2)}) slice-start(%c), slice={[0:1], [0:4], [0:8]}
  %held = bf16[1,4,8]{2,1,0:S(1)} slice-done(%piece)
  %placed = bf16[48,4,8]{2,1,0} dynamic-update-slice(%a, %held, %i, %zero, %zero)
  %room = bf16[48,4,8]{2,1,0} custom-call(), custom_call_target="AllocateBuffer"
  %begun = ((bf16[4,8]{1,0}), bf16[64,8]{1,0}, u32[]) async-start(%b), calls=%wrapped
  %ended = bf16[64,8]{1,0} async-done(%begun), calls=%wrapped
  %after = token[] after-all()
  %send = (bf16[4,8]{1,0}, u32[], token[]) send(%b, %after), frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"}
  %everyone = bf16[4,8]{1,0} all-reduce(%b), replica_groups={}, to_apply=%add
  ROOT %out = bf16[48,4,8]{2,1,0} get-tuple-element(%turn), index=0
}
"""


def test_of_what_is_sliced_or_replaced_in_part_the_part_moves() -> None:
    row = 4 * 8 * 2
    turn = 2 * row + 2 * row + 4  # reads a weight, its input and the index, writes a row of the stack and its result
    gather = row + 16 * row
    assert costs(parse(SLICES)).hbm_bytes == turn + row + row + gather + row + 2 * row  # piece, placed, gather, send, sum


def test_what_goes_to_other_slices_is_sent_or_reduced_by_all() -> None:
    found = costs(parse(SLICES), slice_size=8)
    row = 4 * 8 * 2
    assert found.collectives == {"all-gather": 16 * row, "send": row, "all-reduce": row}
    assert found.crossing == 16 * row + row + row


@pytest.mark.parametrize(
    ("size", "kernel", "out", "stride", "low", "holes"), [(8, 3, 8, 1, 1, 1), (9, 3, 5, 2, 1, 1), (4, 3, 8, 1, 1, 2), (8, 3, 4, 2, 0, 1)]
)
def test_pairs_of_outputs_and_taps_that_meet_an_input(size: int, kernel: int, out: int, stride: int, low: int, holes: int) -> None:
    spread = np.zeros((size - 1) * holes + 1)
    spread[::holes] = 1
    padded = np.pad(spread, (low, kernel + stride * out))
    assert taps(size, kernel, out, stride, low, holes, 1) == sum(padded[i * stride : i * stride + kernel].sum() for i in range(out))


def test_a_text_without_an_entry_is_refused() -> None:
    with pytest.raises(HloError, match="no ENTRY"):
        parse("HloModule empty\n")


def test_the_compiled_program_has_the_operations_of_the_traced_one() -> None:
    def f(x: jax.Array, w: jax.Array, k: jax.Array) -> jax.Array:
        x, _ = jax.lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x, length=5)
        picture = x.reshape(1, 8, 8, 4)
        return jax.lax.conv_general_dilated(picture, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    traced = jax.jit(f).trace(jnp.ones((16, 16)), jnp.ones((16, 16)), jnp.ones((3, 3, 4, 6)))
    assert count_flops(traced.jaxpr) == 5 * 2 * 16**3 + 2 * 22**2 * 4 * 6
