"""The training state and one update of it: pure functions, jitted by the run with shardings and donation."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bertgpt_jax.objectives.base import Batch, Objective, Sums, total_loss
from bertgpt_jax.parallel.replicas import sum_of_replicas
from bertgpt_jax.shapes import Array, Params, PyTree
from bertgpt_jax.training.optim import Optimizer
from bertgpt_jax.training.schedules import Schedule

State = dict[str, Any]
"""{"params", "optimizer", "step", "data_step", "carry", "extras"}, plain dicts, tuples and arrays.

`step` counts updates made, `data_step` batches drawn; `extras` holds `stage_step` (updates in this stage, what
schedules read) and `skipped` (updates left out in a row because they were not finite).
"""

LARGEST_UPDATE = 1e28
"""More than an optimizer makes of a gradient with a finite norm (below 1.9e19), at rate 1 and decay aside: at most a
parameter's own norm (LAMB), or the gradient over an eps of 1e-8 (Adam with an empty second moment)."""

PRNGS = {"threefry": "threefry2x32", "philox": "philox4x32", "rbg": "rbg"}
"""Our names of jax's random number generators."""


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
    model: Any,
    objective: Objective,
    params: Params,
    batch: Batch,
    carry: Any,
    key: Array | None,
    microbatches: int,
    lies: PyTree | None = None,
) -> tuple[Params, dict[str, Array], dict[str, Array], Any]:
    """Gradient of the total loss of the whole batch, whatever the number of microbatches.

    The weights of the whole batch are known before the first microbatch: each differentiates its share of the global
    mean, so that gradients and sums simply add. With several microbatches every replica adds up its own, in fp32, and
    only the totals are summed over replicas: the price is one whole gradient a replica.

    Args:
        lies: shardings of the result, where replicas divide it (`replicas.spread`).

    Returns:
        (gradients, part sums, metric sums, carry); `metric sums` are still to be divided by their part's weight.
    """
    whole = (params, objective.weights(batch), key)
    accumulate = partial(_accumulate, model, objective, microbatches)
    if microbatches == 1 and lies is None:
        grads, totals, carry = accumulate(whole, (batch, carry))
    else:
        grads, totals, carry = sum_of_replicas(accumulate, whole, (batch, carry), lies)
    return _lying(grads, lies), *totals, carry


def _lying(tree: PyTree, shardings: PyTree | None) -> PyTree:
    return tree if shardings is None else jax.lax.with_sharding_constraint(tree, shardings)


def _accumulate(model: Any, objective: Objective, microbatches: int, whole: tuple, mine: tuple) -> tuple:
    """(gradients, (part sums, metric sums), carry) of some rows, a microbatch at a time.

    Args:
        whole: (parameters, weights of the whole batch, key).
        mine: (rows, carry).
    """
    (params, weights, key), (batch, carry) = whole, mine

    def one(index: Array | int, rows: Batch, carry: Any) -> tuple:
        sub_key = None if key is None else jax.random.fold_in(key, index)

        def share(params: Params) -> tuple[Array, Sums]:
            sums = objective.loss(model, params, rows, carry, sub_key)
            return total_loss(objective, sums.parts, weights), sums

        grads, sums = jax.grad(share, has_aux=True)(params)
        return (grads, (sums.parts, sums.metrics)), sums.carry

    def add(accumulated: tuple, xs: tuple) -> tuple[tuple, None]:
        totals, carry = accumulated
        more, carry = one(*xs, carry)
        return (jax.tree.map(jnp.add, totals, more), carry), None

    if microbatches == 1:
        (grads, sums), carry = one(0, batch, carry)
        return grads, sums, carry
    rows = split_microbatches(batch, microbatches)
    shapes, _ = jax.eval_shape(one, 0, jax.tree.map(lambda x: x[0], rows), carry)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    ((grads, sums), carry), _ = jax.lax.scan(add, (zeros, carry), (jnp.arange(microbatches), rows))
    return grads, sums, carry


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
    prng: str = "threefry",
    divided: PyTree | None = None,
) -> tuple[State, dict[str, Array]]:
    """One update. Dropout depends on (seed, data_step, microbatch) alone.

    A loss or gradient that is not finite, or a rate at which new parameters would not be, leaves parameters and
    optimizer as they were and is counted.

    Args:
        prng: what draws dropout masks, a key of `PRNGS`.
        divided: shardings of parameters and gradients while they are updated, where replicas divide them (ZeRO-1);
            None: as the parameters lie.

    Returns:
        the new state and metrics, all fp32 []: `loss`, `<part>_loss`, the objective's, `learning_rate`, `grad_norm`,
        `param_norm`, `skipped`.
    """
    extras, carry = state["extras"], state["carry"]
    key = jax.random.fold_in(jax.random.key(seed, impl=PRNGS[prng]), state["data_step"])
    whole = state["params"]
    grads, parts, metric_sums, carry = gradients(model, objective, whole, batch, carry, key, microbatches, divided)
    params = _lying(whole, divided)
    weights = objective.weights(batch)
    loss = total_loss(objective, parts, weights)
    grad_norm, param_norm = optax.tree.norm(grads), optax.tree.norm(params)
    if optimizer.clip_norm is not None:
        grads = jax.tree.map(lambda g: g * jnp.minimum(1.0, optimizer.clip_norm / (grad_norm + 1e-12)), grads)

    rate = schedule(extras["stage_step"])
    with jax.named_scope("optimizer"):
        updates, moments = optimizer.build().update(grads, state["optimizer"], params)
        moved = jax.tree.map(lambda p, u: p + rate * u, params, updates)
    # A huge rate overflows where loss and gradient are still finite. The new parameters are bounded, not looked at:
    # whether to keep them is then known before they are made, and one pass over the state makes and keeps them.
    reach = jnp.abs(rate) * (LARGEST_UPDATE + (1.0 + optimizer.weight_decay) * param_norm)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & jnp.isfinite(reach)
    kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), (moved, moments), (params, state["optimizer"]))

    made = finite.astype(jnp.int32)
    new_state = {
        "params": _lying(kept[0], divided),
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
        "param_norm": param_norm,
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
