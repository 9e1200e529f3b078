"""Oracle: programs whose collectives are counted by hand."""

import pytest

from hylorada_jax.planning.collectives import Collective, collectives, sent_bytes

# Three layers gather a weight under way of other operations, one of them a loop; then one number is summed
# over all.
PROGRAM = """HloModule layers

%started (p: bf16[8,16]) -> bf16[32,16] {
  %p = bf16[8,16] parameter(0)
  ROOT %g = bf16[32,16]{1,0} all-gather(%p), channel_id=7, replica_groups=[2,4]<=[8], dimensions={0}
}

%ended (p.1: bf16[8,16]) -> bf16[32,16] {
  %p.1 = bf16[8,16] parameter(0)
  ROOT %g.1 = bf16[32,16]{1,0} all-gather(%p.1), channel_id=7, replica_groups=[2,4]<=[8], dimensions={0}
}

%turn (t: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %t = (s32[], bf16[8,16]) parameter(0)
  %i.3 = s32[] get-tuple-element(%t), index=0
  %w.3 = bf16[8,16] get-tuple-element(%t), index=1
  %under_way = bf16[32,16] fusion(%w.3), kind=kCustom, calls=%ended
  ROOT %r.3 = (s32[], bf16[8,16]) tuple(%i.3, %w.3)
}

%layer (q: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %q = (s32[], bf16[8,16]) parameter(0)
  %i = s32[] get-tuple-element(%q), index=0
  %w = bf16[8,16] get-tuple-element(%q), index=1
  %start = bf16[32,16] fusion(%w), kind=kCustom, calls=%started
  %meanwhile = (s32[], bf16[8,16]) while(%q), condition=%three, body=%turn
  %done = bf16[32,16] fusion(%w), kind=kCustom, calls=%ended
  ROOT %r = (s32[], bf16[8,16]) tuple(%i, %w)
}

%three (q.1: (s32[], bf16[8,16])) -> pred[] {
  %q.1 = (s32[], bf16[8,16]) parameter(0)
  %i.1 = s32[] get-tuple-element(%q.1), index=0
  %c = s32[] constant(3)
  ROOT %lt = pred[] compare(%i.1, %c), direction=LT
}

%seldom (s: f32[4]) -> f32[4] {
  %s = f32[4] parameter(0)
  ROOT %a = f32[4] all-to-all(%s), channel_id=9, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
}

%usually (s.1: f32[4]) -> f32[4] {
  ROOT %s.1 = f32[4] parameter(0)
}

ENTRY %main (q.2: (s32[], bf16[8,16])) -> f32[4] {
  %q.2 = (s32[], bf16[8,16]) parameter(0)
  %loop = (s32[], bf16[8,16]) while(%q.2), condition=%three, body=%layer
  %x = f32[4] constant({1,2,3,4})
  %is = pred[] constant(false)
  %c.2 = f32[4] conditional(%is, %x, %x), true_computation=%seldom, false_computation=%usually
  ROOT %sum = f32[4] OPERATION
}
"""


@pytest.mark.parametrize(
    ("operation", "kind", "sent"),
    [
        (
            "all-reduce(%c.2), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}",
            "all-reduce",
            2 * 3 / 4 * 16,
        ),
        (
            "reduce-scatter(%c.2), channel_id=1, replica_groups=mesh['a'=2,'b'=4] {'a'}",
            "reduce-scatter",
            16,
        ),
        ("all-to-all(%c.2), channel_id=1, replica_groups=[1,8]<=[8]", "all-to-all", 7 / 8 * 16),
        ("collective-permute(%c.2), channel_id=1, source_target_pairs={{0,1}}", "collective-permute", 16),
    ],
)
def test_each_is_counted_once_and_as_often_as_it_runs(operation, kind, sent):
    found = collectives(PROGRAM.replace("OPERATION", operation))
    # 32 · 16 numbers of two bytes, of which a quarter is there already.
    gather = Collective("all-gather", ((32, 16),), 3 / 4 * 32 * 16 * 2, 3)
    assert sorted(found) == sorted([gather, Collective(kind, ((4,),), sent, 1)])
    assert sent_bytes(found) == {"all-gather": 3 * gather.sent, kind: sent}


def test_of_many_results_all_are_counted():
    many = f"({'f32[4], ' * 5}/*index=5*/f32[8])"
    program = PROGRAM.replace(
        "%sum = f32[4] OPERATION", f"%sum = {many} all-reduce(%c.2), replica_groups=[2,4]<=[8]"
    )
    assert sent_bytes(collectives(program))["all-reduce"] == 2 * 3 / 4 * (5 * 16 + 32)
