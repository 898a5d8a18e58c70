"""The training state and one update of it: pure functions, jitted by the run with shardings and donation."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from bertgpt_jax.objectives.base import Batch, Objective, Sums, total_loss
from bertgpt_jax.shapes import Array, Params
from bertgpt_jax.training.optim import Optimizer
from bertgpt_jax.training.schedules import Schedule

State = dict[str, Any]
"""{"params", "optimizer", "step", "data_step", "carry", "extras"}, plain dicts, tuples and arrays.

`step` counts updates made, `data_step` batches drawn; `extras` holds `stage_step` (updates in this stage, what
schedules read) and `skipped` (updates left out in a row because they were not finite).
"""


def init_state(params: Params, optimizer: optax.GradientTransformation) -> State:
    """A fresh state around `params`."""
    zero = jnp.zeros((), jnp.int32)
    return {
        "params": params,
        "optimizer": optimizer.init(params),
        "step": zero,
        "data_step": zero,
        "carry": (),
        "extras": {"stage_step": zero, "skipped": zero},
    }


def split_microbatches(batch: Batch, count: int) -> Batch:
    """[B, ...] -> [count, B / count, ...], rows taken in turn, so that every device keeps its own rows."""
    return {
        name: array.reshape(array.shape[0] // count, count, *array.shape[1:]).swapaxes(0, 1)
        for name, array in batch.items()
    }


def gradients(
    model: Any, objective: Objective, params: Params, batch: Batch, carry: Any, key: Array | None, microbatches: int
) -> tuple[Params, dict[str, Array], dict[str, Array], Any]:
    """Gradient of the total loss of the whole batch, whatever the number of microbatches.

    The weights of the whole batch are known before the first microbatch: each differentiates its share of the global
    mean, so that gradients and sums simply add.

    Returns:
        (gradients, part sums, metric sums, carry); `metric sums` are still to be divided by their part's weight.
    """
    weights = objective.weights(batch)

    def share(params: Params, rows: Batch, carry: Any, key: Array | None) -> tuple[Array, Sums]:
        sums = objective.loss(model, params, rows, carry, key)
        return total_loss(objective, sums.parts, weights), sums

    differentiate = jax.grad(share, has_aux=True)
    if microbatches == 1:
        grads, sums = differentiate(params, batch, carry, None if key is None else jax.random.fold_in(key, 0))
        return grads, sums.parts, sums.metrics, sums.carry

    def one(accumulated: tuple, xs: tuple) -> tuple[tuple, None]:
        index, rows = xs
        grads, carry, totals = accumulated
        sub_key = None if key is None else jax.random.fold_in(key, index)
        more, sums = differentiate(params, rows, carry, sub_key)
        added = jax.tree.map(jnp.add, (grads, totals), (more, (sums.parts, sums.metrics)))
        return (added[0], sums.carry, added[1]), None

    rows = split_microbatches(batch, microbatches)
    first = jax.tree.map(lambda x: x[0], rows)
    grad_shapes, sum_shapes = jax.eval_shape(differentiate, params, first, carry, key)
    zeros, totals = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (grad_shapes, (sum_shapes.parts, sum_shapes.metrics))
    )
    (grads, carry, totals), _ = jax.lax.scan(one, (zeros, carry, totals), (jnp.arange(microbatches), rows))
    return grads, *totals, carry


def train_step(
    state: State,
    batch: Batch,
    *,
    model: Any,
    objective: Objective,
    optimizer: Optimizer,
    schedule: Schedule,
    microbatches: int,
    seed: int,
) -> tuple[State, dict[str, Array]]:
    """One update. Dropout depends on (seed, data_step, microbatch) alone.

    A loss, gradient or new parameter that is not finite leaves parameters and optimizer as they were and is counted.

    Returns:
        the new state and metrics, all fp32 []: `loss`, `<part>_loss`, the objective's, `learning_rate`, `grad_norm`,
        `param_norm`, `skipped`.
    """
    params, extras = state["params"], state["extras"]
    key = jax.random.fold_in(jax.random.key(seed), state["data_step"])
    grads, parts, metric_sums, carry = gradients(model, objective, params, batch, state["carry"], key, microbatches)
    weights = objective.weights(batch)
    loss, grad_norm = total_loss(objective, parts, weights), optax.tree.norm(grads)
    if optimizer.clip_norm is not None:
        grads = jax.tree.map(lambda g: g * jnp.minimum(1.0, optimizer.clip_norm / (grad_norm + 1e-12)), grads)

    rate = schedule(extras["stage_step"])
    updates, moments = optimizer.build().update(grads, state["optimizer"], params)
    moved = jax.tree.map(lambda p, u: p + rate * u, params, updates)
    # the new parameters too: a huge rate times weight decay overflows where loss and gradient are still finite
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & jnp.isfinite(optax.tree.norm(moved))
    kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), (moved, moments), (params, state["optimizer"]))

    made = finite.astype(jnp.int32)
    new_state = {
        "params": kept[0],
        "optimizer": kept[1],
        "step": state["step"] + made,
        "data_step": state["data_step"] + 1,
        "carry": carry,
        "extras": {
            "stage_step": extras["stage_step"] + made,
            "skipped": jnp.where(finite, 0, extras["skipped"] + 1),
        },
    }
    metrics = means(objective, parts, metric_sums, weights)
    metrics |= {
        "learning_rate": rate,
        "grad_norm": grad_norm,
        "param_norm": optax.tree.norm(params),
        "skipped": new_state["extras"]["skipped"],
    }
    return new_state, {name: jnp.asarray(value, jnp.float32) for name, value in metrics.items()}


def means(objective: Objective, parts: dict, metric_sums: dict, weights: dict) -> dict[str, Array]:
    """Sums divided by their weights: `loss`, `<part>_loss` where there are several parts, and the metrics."""
    safe = {name: jnp.where(weight > 0, weight, 1.0) for name, weight in weights.items()}
    result = {"loss": total_loss(objective, parts, weights)}
    if len(parts) > 1:
        result |= {f"{name}_loss": value / safe[name] for name, value in parts.items()}
    return result | {name: value / safe[objective.metric_parts()[name]] for name, value in metric_sums.items()}


def eval_step(params: Params, batch: Batch, *, model: Any, objective: Objective) -> tuple[dict, dict, dict]:
    """(part sums, metric sums, part weights) of one batch, dropout off; the evaluation adds them on the host."""
    sums = objective.loss(model, params, batch, (), None)
    return sums.parts, sums.metrics, objective.weights(batch)
