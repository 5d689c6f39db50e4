"""Tests the computed cost of programs: FLOPs of matmuls, iterations of loops, and the traffic of HLO programs."""

import jax
import jax.numpy as jnp
import pytest

from trapo_jax.planning.program_cost import matmul_flops, traffic

SQUARE = jnp.zeros((8, 8))
ONE = 2 * 8**3  # FLOPs of one matmul of two `SQUARE` matrices


def flops(function, *arguments, **options):
    return matmul_flops(jax.jit(function).trace(*arguments).jaxpr, **options)


def test_matmuls_and_batched_matmuls_are_counted():
    assert flops(lambda a: a @ a, SQUARE) == ONE
    assert flops(lambda a: jnp.einsum("bij,bjk->bik", a, a), jnp.zeros((3, 8, 8))) == 3 * ONE


def test_the_body_of_a_loop_is_counted_once_per_iteration():
    body = lambda carry, _: (carry @ carry, None)
    assert flops(lambda a: jax.lax.scan(body, a, length=5)[0], SQUARE) == 5 * ONE
    twice = lambda a: jax.lax.scan(lambda c, _: (body(body(c, 0)[0], 0)[0], None), a, length=5)[0]
    assert flops(twice, SQUARE) == 10 * ONE


def test_a_loop_of_unknown_length_has_the_given_number_of_iterations():
    function = lambda a, n: jax.lax.fori_loop(0, n, lambda _, x: x @ x, a)
    assert flops(function, SQUARE, 3, unknown_trips=7) == 7 * ONE


def test_the_most_expensive_branch_is_counted():
    function = lambda a: jax.lax.cond(a[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, a)
    assert flops(function, SQUARE) == 2 * ONE


def test_gradients_and_recomputation_are_counted():
    loss = lambda a: jnp.sum(jnp.sin(a @ a) @ a)
    assert flops(jax.grad(loss), SQUARE) == 6 * ONE
    assert flops(jax.grad(jax.checkpoint(loss)), SQUARE) == 7 * ONE


# TPU compiler output without trip counts. The unrolled body increments the loop counter by 2, and an all-gather is
# split into two instructions.
PROGRAM = """HloModule jit_step

%fused (p0: f32[4,16], p1: bf16[32], p2: bf16[512]) -> (f32[16], bf16[512]) {
  %p0 = f32[4,16]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %slice = f32[1,16]{1,0} dynamic-slice(%p0, %zero, %zero), dynamic_slice_sizes={1,16}
  %p1 = bf16[32]{0} parameter(1)
  %gather.2 = bf16[512]{0} all-gather(%p1), channel_id=7, frontend_attributes={chain_id="0"}
  %p2 = bf16[512]{0} parameter(2)
  ROOT %out = (f32[1,16]{1,0}, bf16[512]{0}) tuple(%slice, %p2)
}

%body (arg: (s32[], f32[4,16], bf16[32], bf16[512])) -> (s32[], f32[4,16], bf16[32], bf16[512]) {
  %arg = (s32[]{:T(128)}, f32[4,16]{1,0}, bf16[32]{0}, /*index=3*/bf16[512]{0}) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %x = f32[4,16]{1,0} get-tuple-element(%arg), index=1
  %w = bf16[32]{0} get-tuple-element(%arg), index=2
  %g = bf16[512]{0} get-tuple-element(%arg), index=3
  %f = (f32[1,16]{1,0}, bf16[512]{0}) fusion(%x, %w, %g), kind=kLoop, calls=%fused
  %sent = (bf16[32]{0}, bf16[32]{0}, u32[], u32[]) collective-permute-start(%w), channel_id=3
  %come = bf16[32]{0} collective-permute-done(%sent)
  %two = s32[] constant(2)
  %next = s32[] add(%i, %two)
  ROOT %t = (s32[], f32[4,16]{1,0}, bf16[32]{0}, bf16[512]{0}) tuple(%next, %x, %come, %g)
}

%condition (arg.1: (s32[], f32[4,16], bf16[32], bf16[512])) -> pred[] {
  %arg.1 = (s32[]{:T(128)}, f32[4,16]{1,0}, bf16[32]{0}, /*index=3*/bf16[512]{0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%arg.1), index=0
  %limit = s32[] constant(LIMIT)
  ROOT %less = pred[] compare(%i.1, %limit), direction=LT
}

ENTRY %main (a: (s32[], f32[4,16], bf16[32], bf16[512])) -> (s32[], f32[4,16], bf16[32], bf16[512]) {
  %a = (s32[], f32[4,16]{1,0}, bf16[32]{0}, bf16[512]{0}) parameter(0)
  %w.1 = bf16[32]{0} get-tuple-element(%a), index=2
  %gather.1 = bf16[512]{0} all-gather(%w.1), channel_id=7, frontend_attributes={chain_id="0"}
  %vmem = bf16[512]{0:T(512)S(1)} copy(%gather.1)
  ROOT %loop = (s32[], f32[4,16]{1,0}, bf16[32]{0}, bf16[512]{0}) while(%a), condition=%condition, body=%body
}
"""


@pytest.mark.parametrize(("limit", "iterations"), [("8", 4), ("7", 4), ("2", 1)])
def test_the_number_of_iterations_is_read_from_the_condition(limit, iterations):
    found = traffic(PROGRAM.replace("LIMIT", limit))
    assert found.collectives == {"all-gather": 1024, "collective-permute": iterations * 64}


def test_a_fusion_reads_slices_and_passes_values_through_without_traffic():
    once, twice = (traffic(PROGRAM.replace("LIMIT", n)).memory for n in ("2", "4"))
    fusion, permute, counter, condition = 64 + 64, 64 + 64, 3 * 4, 4 + 4 + 1
    assert twice - once == fusion + permute + counter + condition


def test_a_compiled_loop_moves_operands_and_result_once_per_iteration():
    function = lambda a: jax.lax.scan(lambda c, _: (c @ c, None), a, length=10)[0]
    compiled = jax.jit(function).lower(jnp.zeros((64, 64))).compile()
    size = 64 * 64 * 4
    assert 10 * 2 * size <= traffic(compiled.as_text()).memory <= 10 * 6 * size
