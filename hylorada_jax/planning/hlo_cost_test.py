import pytest

from hylorada_jax.errors import DataError
from hylorada_jax.planning.hlo_cost import program_cost

# A product in a loop of 3 runs inside a loop of 5, as XLA prints an optimized program.
PROGRAM = """HloModule loops

%product (p: (s32[], f32[4,4])) -> (s32[], f32[4,4]) {
  %p = (s32[], f32[4,4]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[4,4] get-tuple-element(%p), index=1
  %y = f32[4,4] dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}, metadata={op_name="a/b"}
  ROOT %r = (s32[], f32[4,4]) tuple(%i, %y)
}

%three (p.1: (s32[], f32[4,4])) -> pred[] {
  %p.1 = (s32[], f32[4,4]) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %c.1 = s32[] constant(3)
  ROOT %lt = pred[] compare(%i.1, %c.1), direction=LT
}

%five (p.2: (s32[], f32[4,4])) -> pred[] {
  %p.2 = (s32[], f32[4,4]) parameter(0)
  %i.2 = s32[] get-tuple-element(%p.2), index=0
  %c.2 = s32[] constant(5)
  ROOT %lt.2 = pred[] compare(%i.2, %c.2), direction=LT
}

%repeated (p.3: (s32[], f32[4,4])) -> (s32[], f32[4,4]) {
  %p.3 = (s32[], f32[4,4]) parameter(0)
  ROOT %w.3 = (s32[], f32[4,4]) while(%p.3), condition=%three, body=%product
}

ENTRY %main (p.4: (s32[], f32[4,4])) -> (s32[], f32[4,4]) {
  %p.4 = (s32[], f32[4,4]) parameter(0)
  ROOT %w.4 = (s32[], f32[4,4]) while(%p.4), condition=%five, body=%repeated
}
"""


def test_loops_are_counted_as_often_as_they_run():
    # 2·4³ operations in the product, and one comparison wherever a loop is started.
    assert program_cost(PROGRAM).flops == 5 * (3 * 128 + 1) + 1
    # 64 bytes for each operand and the result; each comparison 4 + 4 + 1; for the tuple 16, with jax 0.12 8.
    assert program_cost(PROGRAM).bytes_accessed in [5 * (3 * (3 * 64 + n) + 9) + 9 for n in (16, 8)]


STEP = """  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  ROOT %r = (s32[], f32[4,4]) tuple(%next,"""


def test_turns_that_were_put_into_one_are_not_counted_again():
    """As XLA does where an operand of a product comes from other devices in parts, two at a time."""
    by_two = PROGRAM.replace("  ROOT %r = (s32[], f32[4,4]) tuple(%i,", STEP)
    assert program_cost(by_two).flops == 5 * (2 * (128 + 1) + 1) + 1  # 0, 2, and one for the sum in each


def test_a_loop_of_unknown_length_is_refused_or_told_its_turns():
    with pytest.raises(DataError, match="direction=GT"):
        program_cost(PROGRAM.replace("direction=LT", "direction=GT"), turns=2)
    # The inner limit is now one of the loop's own values.
    told = PROGRAM.replace("constant(3)", "get-tuple-element(%p.1), index=0")
    with pytest.raises(DataError, match="direction=LT"):
        program_cost(told)
    assert program_cost(told, turns=3) == program_cost(PROGRAM)
    assert program_cost(told, turns=1.5).flops == 5 * (1.5 * 128 + 1) + 1


# Half of an array is moved to a TPU's other memory and back; then one of two branches is taken.
MOVED = """HloModule moved

%dear (p.1: f32[8,4]) -> f32[8,4] {
  %p.1 = f32[8,4] parameter(0)
  %x.1 = f32[8,4] add(%p.1, %p.1)
  ROOT %y.1 = f32[8,4] multiply(%x.1, %x.1)
}

%cheap (p.2: f32[8,4]) -> f32[8,4] {
  %p.2 = f32[8,4] parameter(0)
  ROOT %x.2 = f32[8,4] add(%p.2, %p.2)
}

ENTRY %main (p: f32[16,4], which: s32[]) -> f32[8,4] {
  %p = f32[16,4] parameter(0)
  %which = s32[] parameter(1)
  %s = ((f32[16,4]), f32[8,4]{1,0:S(1)}, s32[]) slice-start(%p), slice={[8:16], [0:4]}, metadata={op_name="a"}
  %t = f32[8,4]{1,0:S(1)} slice-done(%s)
  %u = (f32[8,4], f32[8,4]{1,0:S(1)}, u32[]) copy-start(%t)
  %v = f32[8,4] copy-done(%u), metadata={op_name="b"}
  ROOT %w = f32[8,4] conditional(%which, %v, %v), branch_computations={%dear, %cheap}
}
"""


def test_a_copy_is_counted_once_and_of_two_branches_the_cheap_one():
    # 128 bytes: two of them for the slice, two for the copy, three for the sum of 32 numbers.
    assert program_cost(MOVED) == (32, 7 * 128, 4 * 128)


# A call of a kernel as XLA prints it: what pallas notes has a line of its own.
CALL = """HloModule kernel

ENTRY %main (p: bf16[4,1024,64]) -> (f32[512,128], bf16[4,1024,64]) {
  %p = bf16[4,1024,64] parameter(0)
  %b = s8[1,2,2] constant({{{1,0},{1,1}}})
  ROOT %k.1 = (f32[512,128], bf16[4,1024,64]) custom-call(%b, %p), custom_call_target="tpu_custom_call", \
operand_layout_constraints={s8[1,2,2]{2,1,0}, bf16[4,1024,64]{2,1,0}}, frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 512}"
}}, metadata={op_name="jit(f)/NAME/pallas_call" stack_frame_id=9}, backend_config={"body":"TUzv"STATED}
}
"""
STATED = ',"cost_estimate":{"flops":"7","transcendentals":"5","bytes_accessed":"11"}'


def test_a_kernel_costs_what_it_states():
    assert program_cost(CALL.replace("STATED", STATED)) == (7, 11, 0)
    assert program_cost(CALL.replace("jit(f)/NAME/pallas_call", "ragged-dot-metadata")) == (0, 0, 0)
    with pytest.raises(DataError, match="states its cost"):
        program_cost(CALL.replace("STATED", ""))


@pytest.mark.parametrize(("kernel", "products"), [("fwd_residuals", 2), ("dq_segmented", 3), ("dkv", 4)])
def test_jax_s_splash_attention_costs_its_products_and_what_it_fetches(kernel, products):
    """Three blocks of 512, of 4 heads of 64 in bfloat16: a product has 2·512²·64 operations."""
    call = CALL.replace("NAME", f"vmap(3_blocks_of_512)/jit(s)/splash_mha_{kernel}").replace("STATED", "")
    table, tensor, sums, block = 4, 4 * 1024 * 64 * 2, 512 * 128 * 4, 512 * 64 * 2
    expected = products * 3 * 4 * 2 * 512**2 * 64, table + 2 * tensor + sums + 3 * 4 * 2 * block
    assert program_cost(call)[:2] == expected
