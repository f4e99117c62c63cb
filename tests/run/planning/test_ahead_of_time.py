"""What is read off a program that was compiled for TPUs: its arithmetic, and what its collectives pass on."""

import functools

import jax
import jax.numpy as jnp
import pytest

from vlmprune_jax.base.errors import UserError
from vlmprune_jax.core.mesh.mesh import make_mesh
from vlmprune_jax.core.models.kernels import splash_attention
from vlmprune_jax.run.planning.ahead_of_time import collective_bytes, executed_flops, make_slice


def test_kernels_count_their_grid():
    """Splash attention forward: scores and mixing of 2 rows, 4 query and 2 key heads, in blocks of 512 positions."""
    q, k = (jax.ShapeDtypeStruct((2, 1024, heads, 64), jnp.bfloat16) for heads in (4, 2))
    traced = jax.make_jaxpr(functools.partial(splash_attention, causal=True))(q, k, k)
    assert executed_flops(traced.jaxpr) == 4 * 2 * 4 * 1024**2 * 64


def test_loops_count_as_often_as_they_run_at_most():
    """One that ends when the data says so: see core/models/vocabulary.py."""
    x = jax.ShapeDtypeStruct((3, 8), jnp.float32)

    def loop(x, used):
        return jax.lax.while_loop(
            lambda state: (state[0] < 5) & (state[0] < used), lambda state: (state[0] + 1, state[1] @ x.T @ x), (0, x)
        )[1]

    assert executed_flops(jax.make_jaxpr(loop)(x, 2).jaxpr) == 5 * 2 * (2 * 3 * 3 * 8)


HLO = """\
HloModule jit_step, is_scheduled=true

%condition.1 (p.1: (s32[], bf16[4,8])) -> pred[] {
  %bound = s32[]{:T(128)} constant(5)
  %i = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  ROOT %less = pred[]{:T(512)} compare(%i, %bound), direction=LT
}
%fused.1 (p.2: bf16[1,8]) -> bf16[4,8] {
  ROOT %ag.1 = bf16[4,8]{1,0:T(8,128)(2,1)S(1)} all-gather(%p.2), channel_id=7, replica_groups=mesh['a'=4,'b'=2] {'a'}, dimensions={0}
}
%fused.2 (p.3: bf16[1,8]) -> bf16[4,8] {
  ROOT %ag.2 = bf16[4,8]{1,0:T(8,128)(2,1)} all-gather(%p.3), channel_id=7, replica_groups=mesh['a'=4,'b'=2] {'a'}, dimensions={0}
}
%body.1 (p.4: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %start = bf16[4,8]{1,0} fusion(%x), kind=kLoop, calls=%fused.1
  %done = bf16[4,8]{1,0} fusion(%start), kind=kLoop, calls=%fused.2
  ROOT %sum = (f32[16]{0}, bf16[4]{0}) all-reduce(%done, %y), channel_id=8, replica_groups=[2,4]<=[8], to_apply=%add.1
}
%shared.1 (p.6: f32[4]) -> f32[4] {
  ROOT %next = f32[4]{0} collective-permute(%p.6), channel_id=10, source_target_pairs={{0,1},{1,0}}
}
%ring.condition (p.8: (bf16[1,8], u32[], u32[])) -> pred[] {
  %bound.2 = u32[]{:T(128)} constant(8)
  %i.2 = u32[]{:T(128)} get-tuple-element(%p.8), index=1
  ROOT %less.2 = pred[]{:T(512)} compare(%i.2, %bound.2), direction=LT
}
%ring.body (p.9: (bf16[1,8], u32[], u32[])) -> (bf16[1,8], u32[], u32[]) {
  %two.2 = u32[]{:T(128)} constant(2)
  %i.3 = u32[]{:T(128)} get-tuple-element(%p.9), index=1
  %i.4 = u32[]{:T(128)} add(%i.3, %two.2)
  %here = bf16[1,8]{1,0} collective-permute(%w.1), channel_id=11, source_target_pairs={{0,1},{1,0}}
  %there = bf16[1,8]{1,0} collective-permute(%here), channel_id=12, source_target_pairs={{0,1},{1,0}}
  ROOT %state = (bf16[1,8], u32[], /*index=2*/u32[]) tuple(%there, %i.4, %rest)
}
ENTRY %main.1 (p.5: bf16[4,8]) -> bf16[4,8] {
  %ring = (bf16[1,8], u32[], u32[]) while(%tuple.2), condition=%ring.condition, body=%ring.body
  %once = f32[4]{0} call(%a), to_apply=%shared.1
  %twice = f32[4]{0} call(%once), to_apply=%shared.1
  %loop = (s32[], bf16[4,8]) while(%tuple), condition=%condition.1, body=%body.1
  %scatter = f32[6]{0} reduce-scatter(%z), channel_id=9, replica_groups={{0,1},{2,3}}, dimensions={0}, to_apply=%add.1
}
"""  # noqa: E501 (as XLA writes it)


def test_collectives_count_as_often_as_their_loop_runs():
    assert collective_bytes(HLO) == {
        "all-gather": 5 * 4 * 8 * 2 * 3 // 4,  # in two fusions, which are one
        "all-reduce": 5 * 2 * (16 * 4 + 4 * 2) * 3 // 4,
        "collective-permute": 2 * 4 * 4 + 4 * 2 * 8 * 2,  # called from two places, and a ring unrolled by two
        "reduce-scatter": 6 * 4,
    }


@pytest.mark.parametrize(("source", "times"), [("jit(step)/dot_general", 1), ("jit(step)/while/body/dot_general", 5)])
def test_gathers_that_the_compiler_spreads_over_a_loop_run_once(source, times):
    """For example a weight's, over the chunks of a delta net that does not use it."""
    spread = HLO.replace("%fused", "%async_collective_fusion")
    spread = spread.replace("dimensions={0}\n}", f'dimensions={{0}}, metadata={{op_name="{source}"}}\n}}')
    assert collective_bytes(spread)["all-gather"] == times * 4 * 8 * 2 * 3 // 4


def test_what_starts_a_collective_names_its_operands_as_well():
    lines = """\
ENTRY %main.2 (p.7: bf16[4,8]) -> bf16[4,8] {
  %one = (bf16[4,8]{1,0:T(8,128)(2,1)S(1)}, bf16[4,8]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%p.7), channel_id=1, source_target_pairs={{0,1},{1,0}}
  %gone = bf16[4,8]{1,0} collective-permute-done(%one)
  %two = ((bf16[2,8]{1,0}, f32[3]{0}), (bf16[4,8]{1,0}, f32[6]{0})) all-gather-start(%a, %b), channel_id=2, replica_groups={{0,1}}, dimensions={0}
  %three = (f32[16]{0}, f32[4]{0}) all-reduce-start(%c, %d), channel_id=3, replica_groups={{0,1}}, to_apply=%add.1
}
"""  # noqa: E501 (as XLA writes it)
    assert collective_bytes(lines) == {
        "all-gather": (4 * 8 * 2 + 6 * 4) // 2,
        "all-reduce": (16 + 4) * 4,
        "collective-permute": 4 * 8 * 2,
    }


def test_what_crosses_slices_is_listed_apart():
    """The compiler turns it into transfers of the hosts, and numbers the devices of other collectives in a slice."""
    text = """\
ENTRY %main.3 (p: bf16[64,8]) -> bf16[64,8] {
  %recv.1 = (bf16[64,8]{1,0:T(8,128)(2,1)}, u32[], token[]) recv(%after-all.1), channel_id=3, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_transfer_type="ALL_REDUCE"}
  %all = f32[16]{0} all-reduce(%y), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%add
}
"""  # noqa: E501 (as XLA writes it)
    assert collective_bytes(text) == {"all-reduce": 2 * 16 * 4 * 3 // 4, "all-reduce between slices": 64 * 8 * 2}


def test_slices_lie_along_data():
    target = make_slice("v5e:2x2:2")
    mesh = make_mesh(2, 2, 2, devices=target.devices)
    assert (target.count, mesh.shape["data"]) == (2, 2)
    assert [{device.slice_index for device in part.flat} for part in mesh.devices] == [{0}, {1}]
    with pytest.raises(UserError, match=r"mesh\.data=1 must be a multiple of the number of TPU slices"):
        make_mesh(1, -1, 1, devices=target.devices)
