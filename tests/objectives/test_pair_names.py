"""The second part of `masked_lm_nsp` is called by what its label says."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from bertgpt_jax.batches.packing import PackedPairs
from bertgpt_jax.batches.pairs import SentencePairs
from bertgpt_jax.nn.blocks import ComputeConfig
from bertgpt_jax.objectives.masked_lm_nsp import MaskedLMNSP


class Model:
    """Gives the logits it was made with."""

    compute = ComputeConfig()

    def __init__(self, *logits: np.ndarray):
        self._logits, self.config = logits, SimpleNamespace(vocab_size=logits[0].shape[-1])

    def apply(self, variables, *inputs, rngs=None, method: str):
        hidden = np.zeros((*self._logits[0].shape[:2], 2))
        return {"head_inputs": (hidden, self._logits[1]), "logits": self._logits[0]}[method]

    def head_weights(self, params):
        return np.zeros((self._logits[0].shape[-1], 2)), None


@pytest.mark.parametrize("kind", [SentencePairs, PackedPairs])
def test_sentence_order_is_next_sentence_by_another_name(kind) -> None:
    rng = np.random.default_rng(0)
    following, order = (MaskedLMNSP(examples=kind(task=task)) for task in ("next_sentence", "sentence_order"))
    batch = {name: np.zeros(x.shape, x.dtype) for name, x in order.abstract_batch(4, 16).items()}
    batch["segments"][:] = 1
    batch["mask_weights"][:] = batch["next_weights"][:] = 1
    batch["next_labels"][:] = rng.integers(0, 2, batch["next_labels"].shape)
    model = Model(rng.normal(size=(*batch["mask_labels"].shape, 9)), rng.normal(size=(*batch["next_labels"].shape, 2)))
    ours, theirs = (objective.loss(model, {}, batch, (), None) for objective in (order, following))
    assert set(order.coefficients()) == set(order.weights(batch)) == set(ours.parts) == {"mlm", "sop"}
    assert order.metric_parts() == {"mlm_accuracy": "mlm", "sop_accuracy": "sop"} and set(ours.metrics) == {
        "mlm_accuracy",
        "sop_accuracy",
    }
    assert set(following.coefficients()) == set(following.weights(batch)) == set(theirs.parts) == {"mlm", "nsp"}
    assert ours.parts["sop"] == theirs.parts["nsp"] > 0 and ours.parts["mlm"] == theirs.parts["mlm"]
    assert ours.metrics["sop_accuracy"] == theirs.metrics["nsp_accuracy"]
    assert order.weights(batch)["sop"] == batch["next_weights"].size
