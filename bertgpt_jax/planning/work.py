"""What one training step computes and how the mesh splits it, in sizes alone: input of the analytic models."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp

from bertgpt_jax.nn.attention import AttentionCase, PathChoice, choose
from bertgpt_jax.nn.masks import AttentionMask
from bertgpt_jax.parallel.mesh import AXES
from bertgpt_jax.parallel.pipeline import PER_STAGE
from bertgpt_jax.training.run_config import RunConfig, StageConfig


class Shards(NamedTuple):
    """Sizes of the mesh axes, in their order."""

    data: int
    fsdp: int
    pipe: int
    context: int
    tensor: int

    @classmethod
    def of(cls, sizes: Mapping[str, int]) -> Shards:
        """From a resolved mesh: axis name to size."""
        return cls(*(sizes[axis] for axis in AXES))

    @property
    def rows(self) -> int:
        """Parts that the rows of a layer's input are split into."""
        return self.data * self.fsdp

    @property
    def batch(self) -> int:
        """Parts that the rows of a batch are split into: stages of a pipeline hold their share of it too."""
        return self.rows * self.pipe

    @property
    def chips(self) -> int:
        """Devices of the mesh."""
        return self.rows * self.pipe * self.context * self.tensor


@dataclasses.dataclass(frozen=True)
class Work:
    """One step of a stage.

    Attributes:
        layers, width, heads, head_size, feed_forward: of the layer stack.
        matrices: of a feed-forward layer: 2, or 3 where it is gated.
        vocabulary, scored: rows of the head's table, share of the positions that reach it.
        rows, length: of the batch, as it is computed (filled up where the mesh asks for it).
        microbatches: parts in which it is computed.
        remat: `ComputeConfig.remat`.
        fused_attention: by a kernel, or round a ring, that keeps no scores.
        head_chunk: `ComputeConfig.head_chunk`.
        pipeline_parts, pipeline_repeats: `PipelineConfig.microbatches` and groups of layers a stage.
        width_bytes: of an activation's element.
        dcn_fsdp: `MeshConfig.dcn_fsdp`, slices that shards of the parameters span.
    """

    layers: int
    width: int
    heads: int
    head_size: int
    feed_forward: int
    vocabulary: int
    rows: int
    length: int
    causal: bool = True
    scored: float = 1.0
    matrices: int = 2
    microbatches: int = 1
    remat: str = "none"
    fused_attention: bool = True
    head_chunk: int | None = None
    pipeline_parts: int | None = None
    pipeline_repeats: int = 1
    width_bytes: int = 2
    dcn_fsdp: int = 1

    @property
    def layer_weights(self) -> int:
        """Elements of the matrices of one layer."""
        return 4 * self.width * self.heads * self.head_size + self.matrices * self.width * self.feed_forward

    @property
    def positions(self) -> int:
        """Input positions of the batch."""
        return self.rows * self.length

    @property
    def recomputes(self) -> bool:
        """Whether the backward pass runs whole layers again."""
        return self.remat in ("full", "offload")


def pipeline_parts(work: Work, shards: Shards) -> int:
    """Microbatches that go through the stages of a pipeline, as `nn/pipeline.py` chooses them; 1 without one.

    0: the rows do not divide into any number of them.
    """
    if shards.pipe == 1:
        return 1
    rows, rest = divmod(work.rows, shards.rows * work.microbatches)
    wanted = work.pipeline_parts or PER_STAGE * shards.pipe
    fitting = [n for n in range(shards.pipe, wanted + 1, shards.pipe) if rows % n == 0]
    return max(fitting, default=0) if rows and not rest else 0


def work_of(config: RunConfig, stage: StageConfig, platform: str, context: int = 1) -> Work:
    """The work of a stage's full batch; the vocabulary of the model must be known.

    Args:
        context: parts in which the mesh holds each sequence.
    """
    model, compute = config.model, config.execution.compute
    causal = config.objective.kind == "causal_lm"
    choice = PathChoice(compute.attention, platform, compute.context_attention)
    attention = AttentionCase(
        (1, stage.sequence_length, model.num_heads, model.head_size),
        stage.sequence_length,
        jnp.dtype(compute.dtype),
        AttentionMask(causal=causal),
        model.attention_dropout > 0,
        context,
    )
    return Work(
        layers=model.num_layers,
        width=model.hidden_size,
        heads=model.num_heads,
        head_size=model.head_size,
        feed_forward=model.intermediate_size,
        vocabulary=model.vocab_size,
        rows=stage.batch_size,
        length=stage.sequence_length,
        causal=causal,
        scored=config.objective.scored_share(stage.sequence_length),
        microbatches=stage.microbatches,
        remat=compute.remat,
        fused_attention=choose(choice, attention) != "reference",
        head_chunk=compute.head_chunk,
        pipeline_parts=config.execution.pipeline.microbatches,
        pipeline_repeats=config.execution.pipeline.groups,
        width_bytes=jnp.dtype(compute.dtype).itemsize,
        dcn_fsdp=config.execution.mesh.dcn_fsdp,
    )
