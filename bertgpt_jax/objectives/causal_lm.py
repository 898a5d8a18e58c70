"""Next-token prediction over fixed windows, or over packed documents (Radford et al. 2018, eq. 1)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from pydantic import Field

from bertgpt_jax.batches.packing import PackedDocuments
from bertgpt_jax.batches.windows import Windows
from bertgpt_jax.nn.masks import causal_mask
from bertgpt_jax.objectives.base import Batch, Sums, VocabularyLoss, rngs
from bertgpt_jax.shapes import Array, Params


class CausalLM(VocabularyLoss):
    """Batch: `tokens`, `positions`, `targets` int32 [B, T], `weights` fp32 [B, T]; packed: `segments` int32 [B, T]."""

    kind: Literal["causal_lm"] = "causal_lm"
    examples: Annotated[Windows | PackedDocuments, Field(discriminator="kind")] = Windows()
    masking: None = None

    def coefficients(self) -> dict[str, float]:
        """One part, `lm`."""
        return {"lm": 1.0}

    def metric_parts(self) -> dict[str, str]:
        """Accuracy is over predicted tokens."""
        return {"accuracy": "lm"}

    def weights(self, batch: Batch) -> dict[str, Array]:
        """Predicted tokens."""
        return {"lm": jnp.sum(batch["weights"])}

    def scored_share(self, sequence_length: int) -> float:
        """Share of positions that reach the vocabulary head."""
        return 1.0

    def abstract_batch(self, rows: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of a batch."""
        ids, weights = (
            jax.ShapeDtypeStruct((rows, length), jnp.int32),
            jax.ShapeDtypeStruct((rows, length), jnp.float32),
        )
        batch = {"tokens": ids, "positions": ids, "targets": ids, "weights": weights}
        return batch if isinstance(self.examples, Windows) else batch | {"segments": ids}

    def model_inputs(self, batch: Batch) -> tuple:
        """Positional arguments of the model's `__call__`."""
        most = getattr(self.examples, "max_segments", None)
        return batch["tokens"], batch["positions"], causal_mask(batch.get("segments"), most)

    def loss(self, model: Any, params: Params, batch: Batch, carry: Any, key: Array | None) -> Sums:
        """Summed cross-entropy and next-token accuracy."""
        x_BTD = model.apply({"params": params}, *self.model_inputs(batch), rngs=rngs(key), method="encode")
        loss, right = self.vocabulary_sums(model, params, x_BTD, batch["targets"], batch["weights"])
        return Sums({"lm": loss}, {"accuracy": right}, carry)
