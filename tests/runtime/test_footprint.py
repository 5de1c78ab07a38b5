"""What is read from an optimised HLO module: how often each collective runs, and which copies move memory."""

import types

import pytest

from runtime.footprint import Footprint, instructions

HLO = """HloModule jit_step, is_scheduled=true, input_output_alias={ {0}: (1, {}, may-alias) }

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%fused (p: bf16[4,64]) -> bf16[64,4] {
  %p = bf16[4,64]{1,0} parameter(0)
  ROOT %inside = bf16[64,4]{1,0} transpose(%p), dimensions={1,0}
}

%moving (p: bf16[16,4,64], i: s32[]) -> bf16[64,4] {
  %p = bf16[16,4,64]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %next = s32[] add(%i, %i)
  %slice = bf16[1,4,64]{2,1,0} dynamic-slice(%p, %next, %i, %i), dynamic_slice_sizes={1,4,64}
  ROOT %turned = bf16[64,4]{0,1} bitcast(%slice)
}

%doubling (p: bf16[16,4,64], i: s32[]) -> bf16[1,4,64] {
  %p = bf16[16,4,64]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %slice.1 = bf16[1,4,64]{2,1,0} dynamic-slice(%p, %i, %i, %i), dynamic_slice_sizes={1,4,64}
  ROOT %double = bf16[1,4,64]{2,1,0} add(%slice.1, %slice.1)
}

%nesting (p: bf16[64,4]) -> bf16[64,4] {
  %p = bf16[64,4]{1,0} parameter(0)
  ROOT %inner = bf16[64,4]{1,0} fusion(%p), kind=kLoop, calls=%fused
}

%layer (carry: (f32[8,16], s32[])) -> (f32[8,16], s32[]) {
  %carry = (f32[8,16]{1,0}, s32[]) parameter(0)
  %all-reduce.1 = f32[8,16]{1,0:T(8,128)} all-reduce(%a), channel_id=1, to_apply=%add
  %all-reduce-start.2 = f32[8,16]{1,0} all-reduce-start(%b), channel_id=2, to_apply=%add
  %all-reduce-done.2 = f32[8,16]{1,0} all-reduce-done(%all-reduce-start.2)
  %fetch = (bf16[4,64]{1,0:T(8,128)S(1)}, bf16[4,64]{1,0}, u32[]{:S(2)}) copy-start(%w)
  %evict = (bf16[4,64]{1,0:T(8,128)}, bf16[4,64]{1,0:T(8,128)S(1)}, u32[]{:S(2)}) copy-start(%v)
  ROOT %tuple = (f32[8,16]{1,0}, s32[]) tuple(%all-reduce-done.2, %i)
}

%more (carry: (f32[8,16], s32[])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%window (state: (f32[8,16])) -> (f32[8,16]) {
  %layers = (f32[8,16]{1,0}, s32[]) while(%init), condition=%more, body=%layer, backend_config={"known_trip_count":{"n":"32"}}
  %all-gather.3 = s32[8]{0} all-gather(%ids), channel_id=3, dimensions={0}
  ROOT %out = (f32[8,16]{1,0}) tuple(%r)
}

ENTRY %main.9 (w: bf16[64,4], s: f32[8,16]) -> (f32[8,16]) {
  %w = bf16[64,4]{1,0} parameter(0)
  %copy.7 = bf16[64,4]{0,1:T(8,128)} copy(%w)
  %fusion.1 = bf16[64,4]{1,0:T(8,128)S(1)} fusion(%w), kind=kLoop, calls=%fused
  %steps = (f32[8,16]{1,0}) while(%start), condition=%more, body=%window
  ROOT %result = (f32[8,16]{1,0}) tuple(%g)
}
"""  # noqa: E501


ON_TPU = HLO.replace(', backend_config={"known_trip_count":{"n":"32"}}', "").replace(
    "ROOT %less = pred[] compare(%i, %n)",
    "%n = s32[]{:T(128)} constant(32)\n  ROOT %less = pred[]{:T(512)} compare(%i, %n)",
)


def footprint(hlo=HLO):
    memory = types.SimpleNamespace(
        argument_size_in_bytes=1000, output_size_in_bytes=520, alias_size_in_bytes=512,
        temp_size_in_bytes=64, generated_code_size_in_bytes=3,
    )  # fmt: skip
    return Footprint.of(types.SimpleNamespace(memory_analysis=lambda: memory, as_text=lambda: hlo))


def test_a_collective_counts_as_often_as_its_loop_turns():
    assert footprint().collectives() == {"all-reduce": 64, "all-gather": 1}
    assert [(array.dtype, array.shape, array.num_bytes) for array in footprint().gathered()] == [("s32", (8,), 32)]


def test_a_tpus_loops_tell_their_length_by_their_condition():
    assert footprint(ON_TPU).collectives() == {"all-reduce": 64 * 32, "all-gather": 32}  # both loops share one


def test_a_loop_of_unknown_length_turns_as_often_as_is_said():
    times = {found.op: found.times for found in instructions(HLO, unknown_turns=5) if found.op.startswith("all-")}
    assert times == {"all-reduce": 32 * 5, "all-gather": 5}


def test_only_a_copy_within_main_memory_moves_an_array():
    moved = footprint().moved([("bf16", (4, 64))])
    assert [(found.op, found.arrays[0].shape, found.times) for found in moved] == [("copy", (64, 4), 1)]
    assert footprint().moved([("bf16", (1, 64, 4))]) == moved  # axes of one element do not count
    assert not footprint().moved([("f32", (4, 64)), ("bf16", (64, 64))])
    between = [found for found in instructions(HLO) if found.op == "copy" and len(found.arrays) > 1]
    assert [found.times for found in between] == [32, 32]  # a fetch into the chip, and what left it again


@pytest.mark.parametrize(
    ("line", "op"),
    [
        ("bf16[64,4]{0,1} fusion(%all, %i), kind=kLoop, calls=%moving", "fusion"),
        ("(bf16[64,4]{1,0:S(1)}, bf16[64,4]{1,0}) fusion(%all, %i), kind=kLoop, calls=%moving", "fusion"),
        ("bf16[64,4]{1,0} fusion(%w), kind=kLoop, calls=%nesting", "fusion"),
        ("bf16[1,4,64]{2,1,0} dynamic-slice(%all, %i, %i, %i), dynamic_slice_sizes={1,4,64}", "dynamic-slice"),
        ("bf16[64,4]{1,0} slice(%all), slice={[0:64],[0:4]}", "slice"),
        ("bf16[1,4,64]{2,1,0} fusion(%all, %i), kind=kLoop, calls=%doubling", None),  # computes what it writes
        ("((bf16[128,4]{1,0}), bf16[64,4]{1,0}, s32[]{:S(2)}) slice-start(%all), slice={[0:64],[0:4]}", "slice"),
        ("((bf16[128,4]{1,0}), bf16[64,4]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%all), slice={[0:64],[0:4]}", None),
        ("((bf16[64,4]{1,0}), bf16[8,4]{1,0}, s32[]{:S(2)}) slice-start(%all), slice={[0:8],[0:4]}", None),
        ("bf16[64,4]{0,1:S(1)} fusion(%all, %i), kind=kLoop, calls=%moving", None),  # a fetch
        ("bf16[1,4,64]{2,1,0:S(1)} dynamic-slice(%all, %i, %i, %i), dynamic_slice_sizes={1,4,64}", None),
    ],
)
def test_a_slice_that_is_written_and_a_fusion_of_moves_alone_move_an_array(line, op):
    hlo = HLO.replace("%copy.7 = bf16[64,4]{0,1:T(8,128)} copy(%w)", f"%one = {line}")
    moved = footprint(hlo).moved([("bf16", (4, 64))])
    assert [(found.op, found.times) for found in moved] == ([(op, 1)] if op else [])


def test_what_a_call_needs_beside_its_arguments():
    assert footprint().beside_arguments == 64 + 520 - 512 + 3
