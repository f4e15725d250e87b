"""Work of compiled programs: hand-written HLO in the forms of both compilers, and a program compiled here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dynfocus_jax.planning.flops import count_flops
from dynfocus_jax.planning.program_work import analyze_program, replica_groups

LAYERS, ROWS, D, F = 5, 6, 16, 24


def network(weights, x):
    """Compute two matrix products per layer, which are recomputed in the backward pass."""

    def layer(x, weights):
        up, down = weights
        return x + jnp.tanh(x @ up) @ down, None

    return jax.lax.scan(jax.checkpoint(layer), x, weights)[0].sum()


@pytest.fixture(scope="module")
def arguments():
    return (jnp.ones((LAYERS, D, F)), jnp.ones((LAYERS, F, D))), jnp.ones((ROWS, D))


def test_flops_of_a_trace(arguments):
    product = 2 * ROWS * D * F
    assert count_flops(jax.jit(network).trace(*arguments).jaxpr.jaxpr) == 2 * product * LAYERS
    gradient = jax.jit(jax.grad(network, argnums=(0, 1))).trace(*arguments).jaxpr.jaxpr
    # Two products forward, the first of them again for the second's gradient, and two gradients of each. The
    # second product may also be traced again, without being used.
    assert count_flops(gradient) in ((2 + 1 + 4) * product * LAYERS, (2 + 2 + 4) * product * LAYERS)


def test_flops_of_a_compiled_loop(arguments):
    """The body of a loop counts once per iteration, unlike in XLA's own cost analysis."""
    # The CPU's compiler may replace large products by library calls; these small ones stay dots.
    text = jax.jit(network).lower(*arguments).compile().as_text()
    assert analyze_program(text).flops == 2 * 2 * ROWS * D * F * LAYERS


CUBLAS = (
    'custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"dot_dimension_numbers":'
    '{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}'
)
GPU = """HloModule m, num_partitions=4

%fused (p.0: f32[5,16,24], p.1: s32[]) -> f32[16,24] {
  %p.0 = f32[5,16,24]{2,1,0} parameter(0)
  %p.1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = f32[1,16,24]{2,1,0} dynamic-slice(%p.0, %p.1, %zero, %zero), dynamic_slice_sizes={1,16,24}
  ROOT %out = f32[16,24]{1,0} bitcast(%slice)
}

%body (b: (s32[], f32[5,16,24], bf16[6,16])) -> (s32[], f32[5,16,24], bf16[6,16]) {
  %b = (s32[], f32[5,16,24]{2,1,0}, bf16[6,16]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%b), index=0
  %w = f32[5,16,24]{2,1,0} get-tuple-element(%b), index=1
  %x = bf16[6,16]{1,0} get-tuple-element(%b), index=2
  %layer = f32[16,24]{1,0} fusion(%w, %i), kind=kLoop, calls=%fused
  %gather = (f32[16,24]{1,0}, f32[32,24]{1,0}) all-gather-start(%layer), replica_groups=[2,2]<=[4]
  %gathered = f32[32,24]{1,0} all-gather-done(%gather)
  %y = (f32[6,24]{1,0}, s8[4096]{0}) custom-call(%x, %layer), CUBLAS
  ROOT %t = (s32[], f32[5,16,24]{2,1,0}, bf16[6,16]{1,0}) tuple(%i, %w, %x)
}

%condition (c: (s32[], f32[5,16,24], bf16[6,16])) -> pred[] {
  %c = (s32[], f32[5,16,24]{2,1,0}, bf16[6,16]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%c), index=0
  %bound = s32[] constant(5)
  ROOT %less = pred[] compare(%j, %bound), direction=LT
}

ENTRY %main (a: (s32[], f32[5,16,24], bf16[6,16])) -> f32[] {
  %a = (s32[], f32[5,16,24]{2,1,0}, bf16[6,16]{1,0}) parameter(0)
  %loop = (s32[], f32[5,16,24]{2,1,0}, bf16[6,16]{1,0}) while(%a), condition=%condition, body=%body
  %s = f32[] constant(0)
  ROOT %sum = f32[] all-reduce(%s), replica_groups={{0,1,2,3}}, to_apply=%add
}
"""


@pytest.mark.parametrize("counter", ["s32", "u32"])
def test_a_gpu_program(counter):
    program = analyze_program(GPU.replace("CUBLAS", CUBLAS).replace("s32", counter))
    assert program.flops == 5 * 2 * 6 * 16 * 24
    gather, reduce = sorted(program.collectives, key=lambda each: each.kind)
    assert (gather.kind, gather.count, gather.groups.tolist()) == ("all-gather", 5, [[0, 1], [2, 3]])
    assert [array.dims for array in gather.outputs] == [(32, 24)]
    assert gather.sent == 5 * 32 * 24 * 4 / 2
    assert (reduce.kind, reduce.count, reduce.sent) == ("all-reduce", 1, 2 * 4 * 3 / 4)
    layer, index, x, y = 16 * 24 * 4, 4, 6 * 16 * 2, 6 * 24 * 4
    slices = 2 * layer + index  # one layer of the stack of five is read
    assert program.hbm_bytes == 5 * (slices + 3 * layer + (x + layer + y + 4096)) + 2 * 4


TPU = """HloModule m, num_partitions=8

%all-reduce-scatter.1 (input.1: bf16[64,32]) -> bf16[16,32] {
  %input.1 = bf16[64,32]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.1 = bf16[64,32]{1,0:T(8,128)} all-reduce(%input.1), replica_groups={{0,2,4,6},{1,3,5,7}}
  %k = s32[] constant(0)
  ROOT %part = bf16[16,32]{1,0:T(8,128)} dynamic-slice(%all-reduce.1, %k, %k), dynamic_slice_sizes={16,32}
}

%product (p.0: bf16[4,8,16], p.1: bf16[4,16,32]) -> bf16[4,8,32] {
  %p.0 = bf16[4,8,16]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p.1 = bf16[4,16,32]{2,1,0:T(8,128)(2,1)S(1)} parameter(1)
  ROOT %conv = bf16[4,8,32]{2,1,0:T(8,128)} convolution(%p.0, %p.1), window={WINDOW}, dim_labels=0bf_0io->0bf
}

%start (p.2: bf16[16,32]) -> (bf16[16,32], bf16[64,32]) {
  %p.2 = bf16[16,32]{1,0:T(8,128)} parameter(0)
  %gather.1 = bf16[64,32]{1,0:T(8,128)} all-gather(%p.2), channel_id=7, replica_groups=[2,4]<=[8]
  ROOT %s = (bf16[16,32]{1,0:T(8,128)}, bf16[64,32]{1,0:T(8,128)}) custom-call(%gather.1)
}

%done (p.3: bf16[16,32], p.4: bf16[64,32]) -> bf16[64,32] {
  %p.3 = bf16[16,32]{1,0:T(8,128)} parameter(0)
  %p.4 = bf16[64,32]{1,0:T(8,128)} parameter(1)
  %gather.2 = bf16[64,32]{1,0:T(8,128)} all-gather(%p.3), channel_id=7, replica_groups=[2,4]<=[8]
  ROOT %d = bf16[64,32]{1,0:T(8,128)} custom-call(%p.3, %gather.2)
}

ENTRY %main (a: bf16[4,8,16], w: bf16[4,16,32], g: bf16[64,32]) -> bf16[16,32] {
  %a = bf16[4,8,16]{2,1,0:T(8,128)(2,1)} parameter(0)
  %w = bf16[4,16,32]{2,1,0:T(8,128)(2,1)S(1)} parameter(1)
  %g = bf16[64,32]{1,0:T(8,128)(2,1)} parameter(2)
  %y = bf16[4,8,32]{2,1,0:T(8,128)(2,1)} fusion(%a, %w), kind=kOutput, calls=%product
  %part = bf16[16,32]{1,0:T(8,128)(2,1)S(1)} bitcast(%g)
  %started = (bf16[16,32]{1,0:S(1)}, bf16[64,32]{1,0:S(1)}) fusion(%part), kind=kCustom, calls=%start
  %whole = bf16[64,32]{1,0:T(8,128)S(1)} get-tuple-element(%started), index=1
  %awaited = bf16[64,32]{1,0:T(8,128)S(1)} fusion(%part, %whole), kind=kCustom, calls=%done
  ROOT %r = bf16[16,32]{1,0:T(8,128)(2,1)} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.1
}
"""


def test_a_tpu_program():
    program = analyze_program(TPU.replace("WINDOW", "size=4 stride=3 lhs_dilate=4"))
    # A product of 4 batches of [8, 16] and [16, 32], written as a convolution over the batches.
    assert program.flops == 4 * 2 * 8 * 16 * 32
    gathered, reduced = program.collectives  # the gather appears twice in the text, at its start and its end
    assert (gathered.kind, gathered.sent) == ("all-gather", 64 * 32 * 2 * 3 / 4)
    assert (reduced.kind, reduced.groups.shape) == ("reduce-scatter", (2, 4))
    assert reduced.sent == 64 * 32 * 2 * 3 / 4
    # Arrays in vector memory, S(1), cause no traffic.
    assert program.hbm_bytes == 2 * (4 * 8 * 16 + 4 * 8 * 32) + 2 * (64 * 32 + 16 * 32)


# A TPU's product whose weights arrive in eight pieces, two per iteration. A gather that starts before the
# loop continues during its iterations, which pass its buffers on.
PIECES = """HloModule m, num_partitions=8

%start (p.0: bf16[16,32]) -> (bf16[16,32], bf16[128,32]) {
  %p.0 = bf16[16,32]{1,0:T(8,128)} parameter(0)
  %gather.1 = bf16[128,32]{1,0:T(8,128)} all-gather(%p.0), channel_id=7, replica_groups=[1,8]<=[8]
  ROOT %s = (bf16[16,32]{1,0:T(8,128)}, bf16[128,32]{1,0:T(8,128)}) custom-call(%gather.1), \
custom_call_target="AsyncCollectiveStart"
}

%beside (p.1: bf16[64,16], p.2: bf16[16,32], p.3: bf16[16,32], p.4: bf16[128,32]) -> BESIDE {
  %p.1 = bf16[64,16]{1,0:T(8,128)} parameter(0)
  %p.2 = bf16[16,32]{1,0:T(8,128)} parameter(1)
  %p.3 = bf16[16,32]{1,0:T(8,128)} parameter(2)
  %p.4 = bf16[128,32]{1,0:T(8,128)} parameter(3)
  %gather.2 = bf16[128,32]{1,0:T(8,128)} all-gather(%p.3), channel_id=7, replica_groups=[1,8]<=[8]
  %conv = bf16[64,32]{1,0:T(8,128)} convolution(%p.1, %p.2), dim_labels=bf_io->bf
  ROOT %r.0 = BESIDE tuple(%conv, %p.3, %gather.2, %p.4)
}

%done (p.5: bf16[16,32], p.6: bf16[128,32]) -> bf16[128,32] {
  %p.5 = bf16[16,32]{1,0:T(8,128)} parameter(0)
  %p.6 = bf16[128,32]{1,0:T(8,128)} parameter(1)
  %gather.3 = bf16[128,32]{1,0:T(8,128)} all-gather(%p.5), channel_id=7, replica_groups=[1,8]<=[8]
  ROOT %d = bf16[128,32]{1,0:T(8,128)} custom-call(%p.5, %p.6, %gather.3), \
custom_call_target="AsyncCollectiveDone"
}

%condition (c: STATE) -> pred[] {
  %eight = u32[]{:T(128)} constant(8)
  %c = STATE parameter(0)
  %i.c = u32[]{:T(128)} get-tuple-element(%c), index=0
  ROOT %less = pred[]{:T(512)} compare(%i.c, %eight), direction=LT
}

%body (b: STATE) -> STATE {
  %seven = u32[]{:T(128)} constant(7)
  %two = u32[]{:T(128)S(6)} constant(2)
  %b = STATE parameter(0)
  %x = bf16[64,16]{1,0:T(8,128)} get-tuple-element(%b), index=1
  %w = bf16[16,32]{1,0:T(8,128)} get-tuple-element(%b), index=2
  %g = bf16[16,32]{1,0:T(8,128)} get-tuple-element(%b), index=3
  %h = bf16[128,32]{1,0:T(8,128)} get-tuple-element(%b), index=4
  %first = (bf16[16,32]{1,0}, bf16[16,32]{1,0}, u32[]) collective-permute-start(%w), channel_id=1, PAIRS
  %y.1 = BESIDE fusion(%x, %w, %g, %h), kind=kOutput, calls=%beside
  %w.1 = bf16[16,32]{1,0:T(8,128)} collective-permute-done(%first)
  %second = (bf16[16,32]{1,0}, bf16[16,32]{1,0}, u32[]) collective-permute-start(%w.1), channel_id=2, PAIRS
  %y.2 = BESIDE fusion(%x, %w.1, %g, %h), kind=kOutput, calls=%beside
  %w.2 = bf16[16,32]{1,0:T(8,128)} collective-permute-done(%second)
  %i.b = u32[]{:T(128)S(6)} get-tuple-element(%b), index=0
  %next = u32[]{:T(128)S(6)} add(%i.b, %two)
  ROOT %t = STATE tuple(%next, %x, %w.2, %g, %h)
}

ENTRY %main (x: bf16[64,16], w: bf16[16,32], g: bf16[16,32]) -> bf16[128,32] {
  %x = bf16[64,16]{1,0:T(8,128)} parameter(0)
  %w = bf16[16,32]{1,0:T(8,128)} parameter(1)
  %g = bf16[16,32]{1,0:T(8,128)} parameter(2)
  %started = (bf16[16,32]{1,0:T(8,128)}, bf16[128,32]{1,0:T(8,128)}) fusion(%g), kind=kCustom, calls=%start
  %h = bf16[128,32]{1,0:T(8,128)} get-tuple-element(%started), index=1
  %zero = u32[]{:T(128)S(6)} constant(START)
  %counter = u32[]{:T(128)S(6)} copy(%zero)
  %tuple = STATE tuple(%counter, %x, %w, %g, %h)
  %loop = STATE while(%tuple), condition=%condition, body=%body
  %buffer = bf16[128,32]{1,0:T(8,128)} get-tuple-element(%loop), index=4
  ROOT %r = bf16[128,32]{1,0:T(8,128)} fusion(%g, %buffer), kind=kCustom, calls=%done
}
"""
WORDS = {
    "BESIDE": "(bf16[64,32]{1,0}, bf16[16,32]{1,0}, bf16[128,32]{1,0}, bf16[128,32]{1,0})",
    "STATE": "(u32[]{:T(128)}, bf16[64,16]{1,0}, bf16[16,32]{1,0}, bf16[16,32]{1,0}, bf16[128,32]{1,0})",
    "PAIRS": "source_target_pairs={{0,1},{1,2},{2,3},{3,4},{4,5},{5,6},{6,7},{7,0}}",
}


@pytest.mark.parametrize(("start", "iterations"), [(0, 4), (2, 3), (1, 4)])
def test_a_loop_that_counts_by_two(start, iterations):
    text = PIECES.replace("START", str(start))
    for word, meaning in WORDS.items():
        text = text.replace(word, meaning)
    program = analyze_program(text)
    assert program.flops == iterations * 2 * (2 * 64 * 16 * 32)
    sent = dict.fromkeys(("collective-permute", "all-gather"), 0.0)
    for each in program.collectives:
        sent[each.kind] += each.sent
    # The gather runs once, although it appears in every iteration.
    piece, gathered, x, y = 16 * 32 * 2, 128 * 32 * 2, 64 * 16 * 2, 64 * 32 * 2
    assert sent == {"collective-permute": iterations * 2 * piece, "all-gather": gathered * 7 / 8}
    assert program.hbm_bytes == iterations * 2 * (2 * piece + x + piece + y) + (2 * piece + gathered)


PREFETCHED = """HloModule m

ENTRY %main (x: f32[8,16]) -> f32[2,16] {
  %x = f32[8,16]{1,0:T(8,128)} parameter(0)
  %c.0 = (f32[8,16]{1,0:T(8,128)S(1)}, f32[8,16]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%x)
  %c.1 = f32[8,16]{1,0:T(8,128)S(1)} copy-done(%c.0)
  %s.0 = ((f32[8,16]{1,0}), f32[4,16]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%x), slice={[0:4], [0:16]}
  %s.1 = f32[4,16]{1,0:T(8,128)S(1)} slice-done(%s.0)
  ROOT %s.2 = f32[2,16]{1,0:T(8,128)} slice(%s.1), slice={[0:2], [0:16]}
}
"""


def test_prefetch_into_vector_memory():
    assert analyze_program(PREFETCHED).hbm_bytes == (8 + 4 + 2) * 16 * 4


BRANCHES = """HloModule m

%long (p.0: f32[4,8]) -> f32[4,4] {
  %p.0 = f32[4,8]{1,0} parameter(0)
  %twice = f32[4,8]{1,0} add(%p.0, %p.0)
  ROOT %dot.0 = f32[4,4]{1,0} dot(%twice, %p.0), lhs_contracting_dims={1}, rhs_contracting_dims={1}
}

%short (p.1: f32[4,8]) -> f32[4,4] {
  %p.1 = f32[4,8]{1,0} parameter(0)
  ROOT %zeros = f32[4,4]{1,0} slice(%p.1), slice={[0:4], [0:4]}
}

ENTRY %main (i: s32[], x: f32[4,8]) -> f32[4,4] {
  %i = s32[] parameter(0)
  %x = f32[4,8]{1,0} parameter(1)
  ROOT %y = f32[4,4]{1,0} conditional(%i, %x, %x), branch_computations={ORDER}
}
"""


@pytest.mark.parametrize("order", ["%long, %short", "%short, %long"])
def test_the_longest_branch_counts(order):
    assert analyze_program(BRANCHES.replace("ORDER", order)).flops == 2 * 4 * 4 * 8


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,2},{1,3}}, to_apply=%add", [[0, 2], [1, 3]]),
        ("replica_groups=[2,2]<=[4], dimensions={0}", [[0, 1], [2, 3]]),
        ("replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}, x", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("replica_groups=mesh['a'=2,'b'=1,'c'=2] {'a','c'}, x", [[0, 1, 2, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(1)2}, x", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(2)2}, x", [[0, 1], [2, 3]]),
        ("source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]]),
        ("channel_id=1", [[0, 1, 2]]),
    ],
)
def test_replica_groups(text, groups):
    np.testing.assert_array_equal(replica_groups(text, 3), groups)
