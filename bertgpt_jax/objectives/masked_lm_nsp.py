"""Masked tokens plus a label a pair: whether B follows A (Devlin et al. 2019, section 3.1), or whether the two are
swapped (ALBERT: Lan et al. 2020, section 3.1), as `examples.task` says."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from pydantic import Field

from bertgpt_jax.batches.masking import Masking
from bertgpt_jax.batches.packing import PackedPairs
from bertgpt_jax.batches.pairs import SentencePairs
from bertgpt_jax.nn.losses import cross_entropy
from bertgpt_jax.objectives.base import Batch, Sums, VocabularyLoss, is_best, rngs
from bertgpt_jax.objectives.masked_lm import abstract_masked_batch, masked_inputs
from bertgpt_jax.shapes import Array, Params


class MaskedLMNSP(VocabularyLoss):
    """Batch: that of `MaskedLM` plus int32 `types` [B, T], `next_labels` [B] (1 = random or swapped) and fp32
    `next_weights` [B].

    Packed pairs have labels and weights [B, K], and int32 `cls_positions` [B, K], where each pair begins.
    The masked loss is divided by the masked positions of the whole batch (the original on TPU averages per-core means).
    """

    kind: Literal["masked_lm_nsp"] = "masked_lm_nsp"
    examples: Annotated[SentencePairs | PackedPairs, Field(discriminator="kind")] = SentencePairs()
    masking: Masking = Masking()
    masked_coefficient: float = Field(default=1.0, gt=0)
    next_coefficient: float = Field(default=1.0, gt=0)

    @property
    def pair_part(self) -> str:
        """Name of the pairs' part: `nsp` (next sentence) or `sop` (sentence order)."""
        return "nsp" if self.examples.task == "next_sentence" else "sop"

    def coefficients(self) -> dict[str, float]:
        """Parts `mlm` and `nsp` or `sop`; the papers add them."""
        return {"mlm": self.masked_coefficient, self.pair_part: self.next_coefficient}

    def metric_parts(self) -> dict[str, str]:
        """Accuracies are over masked positions and over pairs."""
        return {"mlm_accuracy": "mlm", f"{self.pair_part}_accuracy": self.pair_part}

    def weights(self, batch: Batch) -> dict[str, Array]:
        """Masked positions and pairs."""
        return {"mlm": jnp.sum(batch["mask_weights"]), self.pair_part: jnp.sum(batch["next_weights"])}

    def scored_share(self, sequence_length: int) -> float:
        """Share of positions that reach the vocabulary head."""
        return self.masking.predictions(sequence_length) / sequence_length

    def abstract_batch(self, rows: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of a batch."""
        batch = abstract_masked_batch(self.masking, rows, length)
        batch["types"] = batch["tokens"]
        packed = isinstance(self.examples, PackedPairs)
        shape = (rows, self.examples.max_segments) if packed else (rows,)
        batch["next_labels"] = jax.ShapeDtypeStruct(shape, jnp.int32)
        batch["next_weights"] = jax.ShapeDtypeStruct(shape, jnp.float32)
        return batch | {"cls_positions": batch["next_labels"]} if packed else batch

    def model_inputs(self, batch: Batch) -> tuple:
        """Positional arguments of the model's `__call__`."""
        packed = isinstance(self.examples, PackedPairs)
        return masked_inputs(batch, packed, self.examples.max_segments if packed else None)

    def loss(self, model: Any, params: Params, batch: Batch, carry: Any, key: Array | None) -> Sums:
        """Summed cross-entropies and accuracies of both parts."""
        inputs = self.model_inputs(batch)
        x_BPD, following = model.apply({"params": params}, *inputs, rngs=rngs(key), method="head_inputs")
        loss, right = self.vocabulary_sums(model, params, x_BPD, batch["mask_labels"], batch["mask_weights"])
        labels, weights = batch["next_labels"], batch["next_weights"]
        next_loss = jnp.sum(cross_entropy(following, labels) * weights)
        next_right = jnp.sum(is_best(following, labels) * weights)
        metrics = {"mlm_accuracy": right, f"{self.pair_part}_accuracy": next_right}
        return Sums({"mlm": loss, self.pair_part: next_loss}, metrics, carry)
