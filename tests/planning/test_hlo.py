"""Reading collectives from optimized HLO: real programs for eight CPU devices, and what libtpu prints."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from bertgpt_jax.planning.hlo import attention_kernels, collectives

MESH = {"data": 2, "fsdp": 4}


def compiled(function, *arguments) -> str:
    return jax.jit(function).lower(*arguments).compile().as_text()


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    devices = jax.devices()[:8]
    return Mesh([devices[:4], devices[4:]], tuple(MESH), axis_types=(AxisType.Auto,) * 2)


def array(mesh: Mesh, shape: tuple[int, ...], *axes) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*axes)))


def test_a_sum_over_one_axis(mesh: Mesh) -> None:
    """64 x 32 fp32 summed over 4 devices: each sends 2 x 3/4 of the 8 KiB result."""

    def add(x):
        return jax.lax.with_sharding_constraint(x.sum(0), NamedSharding(mesh, PartitionSpec()))

    (found,) = collectives(compiled(add, array(mesh, (4, 64, 32), "fsdp")), MESH)
    assert (found.kind, found.axes, found.count) == ("all-reduce", ("fsdp",), 1)
    assert found.sent == pytest.approx(2 * 3 / 4 * 64 * 32 * 4)


def test_what_a_loop_holds_counts_as_often_as_it_turns(mesh: Mesh) -> None:
    """A weight of each of 5 layers is gathered over 4 devices: 3/4 of 64 x 64 fp32 each."""
    replicated = NamedSharding(mesh, PartitionSpec())

    def layers(x, stacked):
        def one(x, w):
            return jnp.tanh(x @ jax.lax.with_sharding_constraint(w, replicated)), None

        return jax.lax.scan(one, x, stacked)[0]

    text = compiled(layers, array(mesh, (8, 64), "data"), array(mesh, (5, 64, 64), None, "fsdp"))
    gathers = [c for c in collectives(text, MESH) if c.kind == "all-gather"]
    assert [(c.axes, c.count) for c in gathers] == [(("fsdp",), 5)]
    assert gathers[0].sent == pytest.approx(5 * 3 / 4 * 64 * 64 * 4)


def test_what_slices_send_each_other() -> None:
    """As libtpu prints it: the chip's own 4 KiB go to the host, in a loop of three turns, and once 1 KiB."""
    attributes = '_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_transfer_type="KIND"'
    send = (
        "  %s = (f32[1024]{0}, u32[], token[]) send(%a, %t), channel_id=4, is_host_transfer=true, "
        f"frontend_attributes={{{attributes}}}"
    )
    text = f"""HloModule step
%body (p: f32[2]) -> f32[2] {{
{send.replace("KIND", "ALL_REDUCE")}
}}
ENTRY %main (p: f32[2]) -> f32[2] {{
  %w = f32[2]{{0}} while(%p), condition=%c, body=%body, backend_config={{"known_trip_count":{{"n":"3"}}}}
{send.replace("KIND", "ALL_GATHER").replace("f32[1024]", "bf16[512]")}
  %other = (f32[8]{{0}}, u32[], token[]) send(%a, %t), channel_id=5
}}"""
    reduce, gather = collectives(text, {"data": 4, "fsdp": 2}, {"data": 2, "fsdp": 1})
    assert (reduce.kind, reduce.axes, reduce.count, reduce.network) == ("all-reduce", ("data",), 3, True)
    assert reduce.sent == 3 * 2 * 4096 * 1 / 2 and (gather.kind, gather.sent) == ("all-gather", 1024)


def test_attention_kernels_are_told_apart() -> None:
    """As XLA prints them for a GPU and for a TPU, there in a loop that turns three times."""
    gpu = """HloModule step
ENTRY %main (p: bf16[2]) -> bf16[2] {
  %p = bf16[2]{0} parameter(0)
  %f = (bf16[2]{0}, f32[2]{0}, u8[0]{0}) custom-call(%p), custom_call_target="__cudnn$fmhaSoftmax", backend_config={}
  %g = (bf16[2]{0}, u8[0]{0}) custom-call(%p, %p), custom_call_target="__cublas$lt$matmul"
  ROOT %b = bf16[2]{0} custom-call(%p), custom_call_target="__cudnn$fmhaSoftmaxBackward", backend_config={}
}"""
    tpu = """HloModule step
%body (p: bf16[2]) -> bf16[2] {
  %p = bf16[2]{0} parameter(0)
  %splash_mha_fwd.3 = bf16[2]{0} custom-call(%p), custom_call_target="tpu_custom_call"
  ROOT %splash_mha_dkv.1 = bf16[2]{0} custom-call(%p), custom_call_target="tpu_custom_call"
}
%condition (p: bf16[2]) -> pred[] {
  ROOT %c = pred[] constant(true)
}
ENTRY %main (p: bf16[2]) -> bf16[2] {
  %p = bf16[2]{0} parameter(0)
  ROOT %w = bf16[2]{0} while(%p), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"3"}}
}"""
    assert attention_kernels(gpu) == (1, 1)
    assert attention_kernels(tpu) == (3, 3)


def test_a_permutation(mesh: Mesh) -> None:
    def shift(x):
        body = lambda y: jax.lax.ppermute(y, "data", [(0, 1), (1, 0)])  # noqa: E731
        return jax.shard_map(body, mesh=mesh, in_specs=PartitionSpec("data"), out_specs=PartitionSpec("data"))(x)

    (found,) = collectives(compiled(shift, array(mesh, (2, 16), "data")), MESH)
    assert (found.kind, found.axes, found.count, found.sent) == ("collective-permute", ("data",), 1, 16 * 4)


# ---------------------------------------------------------------- what libtpu prints

BODY = """\
HloModule jit_f, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%start (p: bf16[1,100]) -> (bf16[1,100], bf16[8,100]) {
  %gather.1 = bf16[8,100]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=7, replica_groups=GROUPS, dimensions={0}
}

%end (p: bf16[1,100]) -> bf16[8,100] {
  %gather.2 = bf16[8,100]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=7, replica_groups=GROUPS, dimensions={0}
}

%condition (s: (s32[], bf16[8,100])) -> pred[] {
  %limit = s32[]{:T(128)} constant(6)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%body (s: (s32[], bf16[8,100])) -> (s32[], bf16[8,100]) {
  %async-start = (bf16[1,100]{1,0}, bf16[8,100]{1,0:T(8,128)}) fusion(%x), kind=kCustom, calls=%start
  %async-done = bf16[8,100]{1,0:T(8,128)} fusion(%x), kind=kCustom, calls=%end
}

ENTRY %main (x: bf16[8,100]) -> bf16[8,100] {
  %loop = (s32[]{:T(128)}, bf16[8,100]{1,0}) while(%t), condition=%condition, body=%body
  %all = (f32[50]{0}, f32[50]{0}) all-reduce(%a, %b), channel_id=9, replica_groups={{0,4},{1,5}}, to_apply=%add
  %s = (bf16[64]{0}, bf16[64]{0:S(1)}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%a), channel_id=3, \
source_target_pairs={{0,1},{1,2},{2,3},{3,0}}
}
"""


@pytest.mark.parametrize(
    ("groups", "axes", "members"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", ("fsdp",), 4),
        ("[2,4]<=[8]", ("fsdp",), 4),
        ("[4,2]<=[2,4]T(1,0)", ("data",), 2),
        ("[1,8]<=[8]", ("data", "fsdp"), 8),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", ("fsdp",), 4),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_0'}", ("data",), 2),
        ("mesh['axis_0'=8] {'axis_0'}", ("data", "fsdp"), 8),
        ("mesh['axis_0'=8] {'axis_0':(1)2}", ("data",), 2),
    ],
)
def test_notations_of_groups(groups: str, axes: tuple, members: int) -> None:
    """Start and end of a fused gather are one; the loop turns as often as its condition's constant says."""
    found = {c.kind: c for c in collectives(BODY.replace("GROUPS", groups), MESH)}
    gather = found["all-gather"]
    assert (gather.axes, gather.count) == (axes, 6)
    assert gather.sent == pytest.approx(6 * 8 * 100 * 2 * (members - 1) / members)
    assert (found["all-reduce"].axes, found["all-reduce"].sent) == (("data",), 2 * 400 / 2)
    assert (found["collective-permute"].axes, found["collective-permute"].sent) == (("fsdp",), 128)


def test_a_trip_count_that_xla_states() -> None:
    text = BODY.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"48"}}')
    assert {c.kind: c.count for c in collectives(text.replace("GROUPS", "[2,4]<=[8]"), MESH)}["all-gather"] == 48
