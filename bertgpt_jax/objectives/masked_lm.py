"""Masked language modelling without sentence pairs (Liu et al. 2019, section 4.2)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from pydantic import Field

from bertgpt_jax.batches.masking import Masking
from bertgpt_jax.batches.packing import PackedDocuments
from bertgpt_jax.batches.sentences import DocSentences, FullSentences
from bertgpt_jax.batches.windows import FullDocuments
from bertgpt_jax.nn.masks import segment_mask
from bertgpt_jax.objectives.base import Batch, Sums, VocabularyLoss, rngs
from bertgpt_jax.shapes import Array, Params


class MaskedLM(VocabularyLoss):
    """Batch: int32 `tokens`, `positions`, `segments` [B, T], `mask_positions`, `mask_labels` [B, P].

    And fp32 `mask_weights` [B, P], 0 where a row has fewer predictions.
    """

    kind: Literal["masked_lm"] = "masked_lm"
    examples: Annotated[FullDocuments | FullSentences | DocSentences | PackedDocuments, Field(discriminator="kind")] = (
        FullDocuments()
    )
    masking: Masking = Masking()
    coefficient: float = Field(default=1.0, gt=0)

    def coefficients(self) -> dict[str, float]:
        """One part, `mlm`."""
        return {"mlm": self.coefficient}

    def metric_parts(self) -> dict[str, str]:
        """Accuracy is over masked positions."""
        return {"mlm_accuracy": "mlm"}

    def weights(self, batch: Batch) -> dict[str, Array]:
        """Masked positions."""
        return {"mlm": jnp.sum(batch["mask_weights"])}

    def scored_share(self, sequence_length: int) -> float:
        """Share of positions that reach the vocabulary head."""
        return self.masking.predictions(sequence_length) / sequence_length

    def abstract_batch(self, rows: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of a batch."""
        return abstract_masked_batch(self.masking, rows, length)

    def model_inputs(self, batch: Batch) -> tuple:
        """Positional arguments of the model's `__call__`."""
        packed = isinstance(self.examples, PackedDocuments)
        return masked_inputs(batch, packed, self.examples.max_segments if packed else None)

    def loss(self, model: Any, params: Params, batch: Batch, carry: Any, key: Array | None) -> Sums:
        """Summed cross-entropy and accuracy over the masked positions."""
        inputs = self.model_inputs(batch)
        x_BPD, _ = model.apply({"params": params}, *inputs, rngs=rngs(key), method="head_inputs")
        loss, right = self.vocabulary_sums(model, params, x_BPD, batch["mask_labels"], batch["mask_weights"])
        return Sums({"mlm": loss}, {"mlm_accuracy": right}, carry)


def abstract_masked_batch(masking: Masking, rows: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of the arrays that every masked objective has."""
    ids = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    masks = (rows, masking.predictions(length))
    return {
        "tokens": ids,
        "positions": ids,
        "segments": ids,
        "mask_positions": jax.ShapeDtypeStruct(masks, jnp.int32),
        "mask_labels": jax.ShapeDtypeStruct(masks, jnp.int32),
        "mask_weights": jax.ShapeDtypeStruct(masks, jnp.float32),
    }


def masked_inputs(batch: Batch, packed: bool, max_segments: int | None = None) -> tuple:
    """`Bert.__call__` arguments of a masked batch; `types` and `cls_positions` may be absent.

    Args:
        packed: rows may hold several segments, up to `max_segments`.
    """
    types, pairs = batch.get("types"), batch.get("cls_positions")
    mask = segment_mask(batch["segments"], packed, max_segments)
    return batch["tokens"], batch["positions"], types, mask, batch["mask_positions"], pairs
