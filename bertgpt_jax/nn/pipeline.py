"""The layer stack as a pipeline: stages side by side, each on other rows, handing on what they computed.

Huang et al. 2019 (GPipe) and, with several groups of layers a stage, the circular schedule of Narayanan et al. 2021
(section 2.2, interleaved). Written as one array program with a dimension of stages (Xu et al. 2021, GSPMD, section
3.3): every iteration maps one function over that dimension and then rotates it by one. Where `stages` lies on a mesh
axis the rotation is a permutation between neighbours; without a mesh it is the same function on one device.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core.scope import LazyRng
from jax.sharding import PartitionSpec
from pydantic import Field, model_validator

from bertgpt_jax.config import Config
from bertgpt_jax.nn.layers import constrain
from bertgpt_jax.nn.masks import AttentionMask
from bertgpt_jax.nn.random import part_of_rows, parts_of_rows, row_key
from bertgpt_jax.shapes import Array, Hidden, Params

ANY = PartitionSpec.UNCONSTRAINED

Layer = Callable[[Params, Hidden, AttentionMask, LazyRng | None], Hidden]
"""One layer: its parameters, rows, what they attend to, and the dropout stream or None."""


class PipelineConfig(Config):
    """How the layers are computed where they are spread over pipeline stages (`execution.mesh.pipe`)."""

    microbatches: int | None = Field(
        default=None,
        ge=1,
        description="parts in which rows go through the stages, a multiple of the stages; "
        "null: four times the stages, or as many as the rows divide into",
    )
    schedule: Literal["gpipe", "circular"] = Field(
        default="gpipe", description="circular: a stage has `repeats` groups of layers, and waits less at both ends"
    )
    repeats: int | None = Field(default=None, ge=1, description="groups of layers a stage; null: circular 2, gpipe 1")
    remat: bool = Field(default=False, description="the backward pass computes each stage anew from what went into it")

    @model_validator(mode="after")
    def _repeats_fit(self) -> PipelineConfig:
        if self.repeats is not None and (self.repeats > 1) != (self.schedule == "circular"):
            rule = "gpipe has 1" if self.schedule == "gpipe" else "circular has 2 or more"
            raise ValueError(f"repeats = {self.repeats} with schedule = '{self.schedule}': {rule}")
        return self

    @property
    def groups(self) -> int:
        """Groups of layers a stage."""
        return self.repeats or (2 if self.schedule == "circular" else 1)


class Pipeline(NamedTuple):
    """A pipeline laid out.

    Layers keep their order: group r * stages + s of them, of equal size, is the r-th of stage s.

    Attributes:
        stages: at least 2.
        repeats: groups of layers a stage.
        wanted: microbatches, a multiple of `stages`; batches that do not divide so take the next smaller multiple.
        row_shards: what the rows of a microbatch are a multiple of.
        remat: stages are computed anew in the backward pass.
    """

    stages: int
    repeats: int
    wanted: int
    row_shards: int = 1
    remat: bool = False

    def microbatches(self, rows: int) -> int:
        """Parts that `rows` rows go through the stages in; 0 if they do not divide."""
        counts = range(self.wanted, 0, -self.stages)
        return next((count for count in counts if rows % (count * self.row_shards) == 0), 0)

    def iterations(self, microbatches: int) -> int:
        """Turns until the last microbatch has left the last stage; in `stages - 1` of them a stage has nothing."""
        return microbatches * self.repeats + self.stages - 1

    def idle_share(self, microbatches: int) -> float:
        """Share of a stage's iterations in which it has nothing to do (the bubble)."""
        return (self.stages - 1) / self.iterations(microbatches)


def run_layers(
    stack: nn.Module, layer: Layer, pipeline: Pipeline, x_BTD: Hidden, mask: AttentionMask, unroll: int = 1
) -> Hidden:
    """What `stack(x_BTD, mask)` computes, by a pipeline.

    Dropout is the stack's as well: a layer's key is the one that scanning gives it, and a microbatch draws its own rows
    of it.

    Args:
        stack: bound module with parameters stacked on a leading axis, as `layer_stack` makes it.
        layer: one layer of it.
        unroll: layers of one body of the loop over a group's layers.
    """
    rows = x_BTD.shape[0]
    count = pipeline.microbatches(rows * parts_of_rows())
    assert count, f"{rows} rows do not divide over {pipeline}; that is checked before anything is traced"
    params, stream = stack.variables["params"], stack.scope.rngs.get("dropout")
    layers = jax.tree.leaves(params)[0].shape[0]
    shape = pipeline.repeats, pipeline.stages, layers // (pipeline.repeats * pipeline.stages)

    def view(leaf: Array) -> Array:
        """[L, ...] as [repeats, stages, layers of a group, ...]; what is stored keeps the model's order."""
        return constrain(leaf.reshape(*shape, *leaf.shape[1:]), None, "stages", *[ANY] * leaf.ndim)

    keys = None if stream is None else jax.random.split(stream.rng, layers).reshape(shape)
    part = part_of_rows()
    before = 0 if part is None else part * rows
    leaves, tree = jax.tree.flatten(mask)
    of_rows = [leaf.shape[0] == rows for leaf in leaves]  # others are the same for every row

    def stage(params: Params, keys: Array | None, turn: Array, moving: list[Array]) -> Array:
        """One group of layers, on what a stage holds at its own iteration `turn`."""
        x_BTD, *masks = moving
        masks = iter(masks)
        both = zip(leaves, of_rows, strict=True)
        mask = jax.tree.unflatten(tree, [next(masks) if moves else leaf for leaf, moves in both])
        place = _place(pipeline, count, turn)
        repeat = 0 if pipeline.repeats == 1 else place.repeat
        params, keys = jax.tree.map(lambda leaf: leaf[repeat], (params, keys))
        first_row = before + place.member * (rows // pipeline.stages) + place.group

        def one(x_BTD: Hidden, xs: tuple) -> tuple[Hidden, None]:
            params, key = xs
            if key is not None:
                key = LazyRng(row_key(key, first_row, count // pipeline.stages), stream.suffix)
            return layer(params, x_BTD, mask, key), None

        x_BTD = jnp.where(place.valid, x_BTD, jnp.zeros((), x_BTD.dtype))
        return jax.lax.scan(one, x_BTD, (params, keys), unroll=min(unroll, shape[2]))[0]

    stage = jax.checkpoint(stage, prevent_cse=False) if pipeline.remat else stage
    axis = nn.logical_to_mesh_axes(("stages",))[0]
    mapped = jax.vmap(stage, in_axes=(1, 1, 0, 0), spmd_axis_name=axis)
    moving = [x_BTD, *(leaf for leaf, moves in zip(leaves, of_rows, strict=True) if moves)]
    return _rotate_through(partial(mapped, jax.tree.map(view, params), keys), moving, count, pipeline)


class _Place(NamedTuple):
    """What a stage works on: `member` of a `group` of microbatches, with its `repeat`-th layers, if it is `valid`."""

    group: Array
    repeat: Array
    member: Array
    valid: Array


def _place(pipeline: Pipeline, count: int, turn: Array) -> _Place:
    """The work of a stage in the `turn`-th iteration since the first microbatch reached it.

    As many microbatches as there are stages go round `repeats` times, then the next as many: a microbatch that leaves
    the last stage is just in time for the first.
    """
    stages, total = pipeline.stages, count * pipeline.repeats
    u = jnp.clip(turn, 0, total - 1)
    group, within = jnp.divmod(u, stages * pipeline.repeats)
    return _Place(group, within // stages, within % stages, (turn >= 0) & (turn < total))


def _rotate_through(
    step: Callable[[Array, list[Array]], Array], moving: list[Array], count: int, pipeline: Pipeline
) -> Hidden:
    """Sends rows through the stages and returns what comes out, in order.

    Microbatch (group n, member p) is rows p, j, n of [stages, rows, groups]: with the rows of a batch over stages first
    (`rows` of the logical table), every device cuts its own. Each stage holds one microbatch of the group that enters,
    and one of the group that leaves: both move on by one an iteration as the work itself does, so that nothing is ever
    sent further than to a neighbour.

    Args:
        step: (turn [stages], rows of all stages) -> the first of `moving` after one group of layers.
        moving: arrays [B, ...]; the first is the hidden state, the others go with it.
    """
    stages, repeats = pipeline.stages, pipeline.repeats
    groups, rows = count // stages, moving[0].shape[0] // count
    index = jnp.arange(stages)

    def lay(x: Array, *leading: str | None) -> Array:
        return constrain(x, *leading, "stages", "batch", *[ANY] * (x.ndim - 2 - len(leading)))

    def rotate(x: Array, by: int) -> Array:
        return lay(jnp.roll(x, by, 0))

    def choose(condition: Array, one: Array, other: Array) -> Array:
        return jnp.where(condition.reshape(-1, *[1] * (one.ndim - 1)), one, other)

    def cut(x: Array) -> Array:
        return lay(jnp.moveaxis(x.reshape(stages, rows, groups, *x.shape[1:]), 2, 0), None)

    waiting = [cut(x) for x in moving]

    def iteration(carry: tuple, t: Array) -> tuple[tuple, None]:
        state, arriving, leaving, done = carry
        place = _place(pipeline, count, t)
        loads, enters = (place.repeat == 0) & (place.member == 0), (place.repeat == 0) & (index == 0)
        arriving = [jnp.where(loads, x[place.group], y) for x, y in zip(waiting, arriving, strict=True)]
        state = [choose(enters, new, old) for new, old in zip(arriving, state, strict=True)]
        x = lay(step(t - index, state))
        ended = _place(pipeline, count, t - (stages - 1))
        pushed = choose(index == stages - 1, x, rotate(leaving, -1))
        leaving = jnp.where(ended.repeat == repeats - 1, pushed, leaving)
        done = jax.lax.dynamic_update_index_in_dim(done, leaving, ended.group, 0)
        return ([rotate(y, 1) for y in (x, *state[1:])], [rotate(y, -1) for y in arriving], leaving, done), None

    empty = [jnp.zeros_like(x[0]) for x in waiting]
    carry = (empty, empty, empty[0], jnp.zeros_like(waiting[0]))
    (_, _, _, done), _ = jax.lax.scan(iteration, carry, jnp.arange(pipeline.iterations(count)))
    out_BTD = jnp.moveaxis(done, 0, 2).reshape(moving[0].shape)
    return constrain(out_BTD, "rows", *[ANY] * (out_BTD.ndim - 1))
