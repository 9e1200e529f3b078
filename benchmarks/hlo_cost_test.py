import pytest

from benchmarks.hlo_cost import program_cost
from hylorada_jax.errors import DataError

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
    # 64 bytes for each operand and the result, 16 for the tuple; each comparison 4 + 4 + 1.
    assert program_cost(PROGRAM).bytes_accessed == 5 * (3 * (3 * 64 + 16) + 9) + 9


def test_a_loop_over_the_blocks_of_a_row_runs_half_of_them_on_average():
    by_data = PROGRAM.replace("%c.1 = s32[] constant(3)", "%c.1 = s32[] get-tuple-element(%p.1), index=0")
    # Of four blocks one, two, three, four.
    assert program_cost(by_data, row_blocks=4).flops == 5 * (2.5 * 128 + 1) + 1


def test_a_loop_of_unknown_length_is_refused():
    with pytest.raises(DataError, match="direction=GT"):
        program_cost(PROGRAM.replace("direction=LT", "direction=GT"))
