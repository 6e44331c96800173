"""The reader of compiled programs, on programs small enough to count by hand."""

# ruff: noqa: E501  the program is as compilers print it

import jax
import jax.numpy as jnp
import pytest

from mmada_jax.devices import hlo

# A loop of 8 rounds: a gather that blocks, one that is spread over two fusions, a sum with start and
# done, a kernel, two products, one of them within a fusion. Then a loop whose end isn't known.
TEXT = """\
HloModule jit_step, is_scheduled=true

%product (p.0: bf16[4,6], p.1: bf16[6,10]) -> bf16[4,10] {
  %p.0 = bf16[4,6]{1,0:T(8,128)} parameter(0)
  %p.1 = bf16[6,10]{1,0:T(8,128)} parameter(1)
  %all-gather.2 = bf16[16,10]{1,0} all-gather(%p.1), channel_id=2, dimensions={0}
  ROOT %convolution.1 = bf16[4,10]{1,0} convolution(%p.0, %p.1), dim_labels=bf_io->bf
}

%more (p.2: bf16[6,10]) -> bf16[16,10] {
  %p.2 = bf16[6,10]{1,0} parameter(0)
  ROOT %all-gather.3 = bf16[16,10]{1,0} all-gather(%p.2), channel_id=2, dimensions={0}
}

%condition (state: (s32[], bf16[4,6])) -> pred[] {
  %state = (s32[]{:T(128)}, bf16[4,6]{1,0}) parameter(0)
  %constant.8 = s32[]{:T(128)} constant(8)
  %i = s32[] get-tuple-element(%state), index=0
  ROOT %lt = pred[] compare(%i, %constant.8), direction=LT, backend_config={"estimated_cycles":"1"}
}

%body (state.1: (s32[], bf16[4,6])) -> (s32[], bf16[4,6]) {
  %state.1 = (s32[]{:T(128)}, bf16[4,6]{1,0}) parameter(0)
  %x = bf16[4,6]{1,0} get-tuple-element(%state.1), index=1
  %w = bf16[6,10]{1,0} constant({...})
  %all-gather.1 = bf16[6,10]{1,0} all-gather(%w), channel_id=1, dimensions={0}
  %fusion.1 = bf16[4,10]{1,0} fusion(%x, %w), kind=kOutput, calls=%product, backend_config={"window_config":{"estimated_cycles":"100"}}
  %fusion.2 = bf16[16,10]{1,0} fusion(%w), kind=kLoop, calls=%more, backend_config={"estimated_cycles":"7"}
  %all-reduce-start.1 = (bf16[6,10]{1,0}, bf16[6,10]{1,0}) all-reduce-start(%w), channel_id=3, to_apply=%add
  %all-reduce-done.1 = bf16[6,10]{1,0} all-reduce-done(%all-reduce-start.1)
  %my_kernel.5 = bf16[4,6]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"body":"AB==","cost_estimate":{"flops":"50"}}}
  %dot.1 = bf16[4,10]{1,0} dot(%my_kernel.5, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %tuple.1 = (s32[], bf16[4,6]{1,0}) tuple(%i.1, %my_kernel.5)
}

%unknown (state.2: (s32[], s32[])) -> pred[] {
  %state.2 = (s32[], s32[]) parameter(0)
  %a = s32[] get-tuple-element(%state.2), index=0
  %b = s32[] get-tuple-element(%state.2), index=1
  ROOT %lt.1 = pred[] compare(%a, %b), direction=LT
}

%body.2 (state.3: (s32[], s32[])) -> (s32[], s32[]) {
  %state.3 = (s32[], s32[]) parameter(0)
  %add.2 = s32[] add(%state.3, %state.3), backend_config={"estimated_cycles":"1000"}
  ROOT %tuple.2 = (s32[], s32[]) tuple(%add.2, %add.2)
}

ENTRY %main (x.0: bf16[4,6]) -> bf16[4,6] {
  %x.0 = bf16[4,6]{1,0} parameter(0)
  %while.1 = (s32[], bf16[4,6]{1,0}) while(%tuple.0), condition=%condition, body=%body
  %while.2 = (s32[], s32[]) while(%tuple.0), condition=%unknown, body=%body.2
  %reduce-scatter.1 = f32[2,5]{1,0} reduce-scatter(%x.0), channel_id=9, replica_groups=[1,4]<=[4], dimensions={0}
  ROOT %out = bf16[4,6]{1,0} get-tuple-element(%while.1), index=1
}
"""


@pytest.fixture(scope="module")
def program():
    return hlo.CompiledProgram(TEXT, trips=3)


def test_loops_count(program):
    assert program.loops() == {"body": 8, "body.2": 3}
    assert program.cycles() == 9 * 1 + 8 * (100 + 7) + 3 * 1000


def test_products(program):
    one = 2 * 4 * 6 * 10
    assert program.matmul_flops() == 8 * 2 * one
    assert program.kernels() == {"my_kernel": 8}
    assert program.kernel_flops() == 8 * 50


def test_collectives(program):
    found = {(c.kind, c.is_async, c.bytes, c.times, c.loop) for c in program.collectives()}
    assert found == {
        ("all-gather", False, 6 * 10 * 2, 8, "body"),
        ("all-gather", True, 16 * 10 * 2, 8, "body"),
        ("all-reduce", True, 6 * 10 * 2, 8, "body"),
        ("reduce-scatter", False, 4 * 2 * 5 * 4, 1, None),
    }


@pytest.mark.parametrize(
    ("lhs", "rhs", "out", "window", "pairs"),
    [
        (3, 3, 1, "size=3", 3),  # a sum over the window
        (1, 4, 4, "size=4 pad=3_3 rhs_reversal=1", 4),  # an axis of the weight alone: one tap meets
        (4, 1, 4, "size=1", 4),  # an axis of the rows alone
        (3, 2, 2, "size=2", 4),
        (2, 2, 2, "size=2 pad=0_0 lhs_dilate=2 stride=1", 2),  # every second tap meets a zero between
    ],
)
def test_taps_outside_of_the_operand_do_not_count(lhs, rhs, out, window, pairs):
    text = (
        f"ENTRY %main (l: f32[5,{lhs},11]) -> f32[5,{out},7] {{\n"
        f"  %l = f32[5,{lhs},11]{{2,1,0}} parameter(0)\n  %r = f32[{rhs},11,7]{{2,1,0}} parameter(1)\n"
        f"  ROOT %c = f32[5,{out},7]{{2,1,0}} convolution(%l, %r), window={{{window}}}, "
        "dim_labels=b0f_0io->b0f\n}\n"
    )
    assert hlo.CompiledProgram(text).matmul_flops() == 2 * 5 * 7 * 11 * pairs


def test_a_program_of_the_cpu_is_read_too():
    def f(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    text = jax.jit(f).lower(jnp.ones((8, 16)), jnp.ones((5, 16, 16))).compile().as_text()
    assert list(hlo.CompiledProgram(text).loops().values()) == [5]
