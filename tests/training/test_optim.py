"""Optimizers against NumPy transcriptions of their sources, per layer where layers are stacked."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from pydantic import TypeAdapter, ValidationError

from bertgpt_jax.nn.blocks import unstack
from bertgpt_jax.parallel.sharding import flatten, path_name
from bertgpt_jax.training.optim import Adafactor, AdamW, BertAdam, Lamb, Lion, Muon, Optimizer, matrix_dimensions

L, D, N, H, F, V = 3, 12, 2, 6, 20, 15
SHAPES = {
    "token_embedding": {"table": (V, D)},
    "embedding_norm": {"scale": (D,), "bias": (D,)},
    "masked_bias": (V,),
    "masked_transform": {"kernel": (D, D), "bias": (D,)},
    "layers": {
        "attention": {
            "query": {"kernel": (L, D, N, H), "bias": (L, N, H)},
            "output": {"kernel": (L, N, H, D), "bias": (L, D)},
        },
        "attention_norm": {"scale": (L, D), "bias": (L, D)},
        "feed_forward": {"up": {"kernel": (L, D, F), "bias": (L, F)}, "down": {"kernel": (L, F, D), "bias": (L, D)}},
    },
}
OPTIMIZERS = [AdamW(), BertAdam(), Lamb(), Lamb(adapt_all=True, pre_normalize=True), Adafactor(), Lion(), Muon()]
RATE = 1e-2


def compiled(transformation):
    """Its update; these programs run once or twice, so compiling fast is what counts."""
    return jax.jit(transformation.update, compiler_options={"xla_backend_optimization_level": 0})


def tree(seed: int):
    """Leaves of different sizes for every layer, so that a norm over all layers differs from one a layer."""
    rng = np.random.default_rng(seed)

    def leaf(shape):
        x = rng.standard_normal(shape)
        return jnp.asarray(
            x * np.arange(1, L + 1).reshape(L, *[1] * (len(shape) - 1)) if shape[0] == L else x, jnp.float32
        )

    return jax.tree.map(leaf, SHAPES, is_leaf=lambda x: isinstance(x, tuple))


def steps(config, params, count: int, rate: float = RATE):
    """Parameters after `count` updates with the gradients tree(1), tree(2), ..."""
    transformation = config.build()
    state = transformation.init(params)
    update = compiled(transformation)
    for i in range(count):
        updates, state = update(gradient(params, i + 1), state, params)
        params = jax.tree.map(lambda p, u: p + rate * u, params, updates)
    return params


def gradient(params, seed: int):
    full = flatten(tree(seed))
    return jax.tree_util.tree_map_with_path(lambda path, _: full[path_name(path)], params)


def assert_close(got, expected, rtol: float = 2e-5) -> None:
    for name, leaf in flatten(got).items():
        np.testing.assert_allclose(leaf, flatten(expected)[name], rtol=rtol, atol=rtol, err_msg=name)


def test_berts_adam_is_the_published_code() -> None:
    """google-research/bert optimization.py `apply_gradients`, in float64."""
    config = BertAdam(weight_decay=0.1)
    names = flatten(tree(0))
    params = {name: np.asarray(leaf, np.float64) for name, leaf in names.items()}
    m, v = ({name: np.zeros(leaf.shape) for name, leaf in params.items()} for _ in range(2))
    for i in range(4):
        for name, g in flatten(tree(i + 1)).items():
            g = np.asarray(g, np.float64)
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.999 * v[name] + 0.001 * g * g
            update = m[name] / (np.sqrt(v[name]) + 1e-6)
            if not name.endswith(("bias", "scale")):
                update = update + 0.1 * params[name]
            params[name] = params[name] - RATE * update
    got = flatten(steps(config, tree(0), 4))
    for name, expected in params.items():
        np.testing.assert_allclose(got[name], expected, rtol=1e-5, atol=1e-5, err_msg=name)


def test_berts_adam_does_not_correct_bias() -> None:
    """The first update is (1 - b1) / sqrt(1 - b2) = 3.16 times the sign of the gradient, not 1 times."""
    params = {"kernel": jnp.zeros(3)}
    transformation = BertAdam().build()
    updates, _ = transformation.update({"kernel": jnp.array([5.0, -2.0, 0.1])}, transformation.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -0.1 / 0.001**0.5 * np.array([1, -1, 1]), rtol=1e-3)


def test_adamw_is_decoupled_adam() -> None:
    config, rng = AdamW(weight_decay=0.1, b1=0.8, b2=0.95, eps=1e-6), np.random.default_rng(0)
    w = rng.standard_normal((4, 3))
    params, m, v = {"kernel": jnp.asarray(w, jnp.float32)}, np.zeros_like(w), np.zeros_like(w)
    transformation = config.build()
    state = transformation.init(params)
    for t in range(1, 6):
        g = rng.standard_normal(w.shape)
        m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g * g
        w = w - RATE * (m / (1 - 0.8**t) / (np.sqrt(v / (1 - 0.95**t)) + 1e-6) + 0.1 * w)
        updates, state = transformation.update({"kernel": jnp.asarray(g, jnp.float32)}, state, params)
        params = jax.tree.map(lambda p, u: p + RATE * u, params, updates)
    np.testing.assert_allclose(params["kernel"], w, rtol=1e-5)


@pytest.mark.parametrize("adapt_all", [False, True])
def test_lamb_under_stacking_equals_lamb_on_single_layers(adapt_all: bool) -> None:
    """Without stacking every leaf is a layer's: optax.lamb's own rule then applies where decay does."""
    config, stacked = Lamb(adapt_all=adapt_all, weight_decay=0.1), tree(0)
    got = unstack(steps(config, stacked, 3)["layers"])

    def single(seed: int):
        return [{"block": layer} for layer in unstack(tree(seed)["layers"])]

    for i, params in enumerate(single(0)):
        transformation = config.build()
        state, update = transformation.init(params), compiled(transformation)
        for step in range(3):
            updates, state = update(single(step + 1)[i], state, params)
            params = jax.tree.map(lambda p, u: p + RATE * u, params, updates)
        assert_close(got[i], params["block"])


def test_lamb_is_the_papers_rule() -> None:
    """You et al. 2020, algorithm 2, in float64 on one matrix; and optax's own LAMB."""
    config, rng = Lamb(weight_decay=0.1), np.random.default_rng(0)
    w = rng.standard_normal((4, 3))
    params = {"kernel": jnp.asarray(w, jnp.float32)}
    theirs, m, v = params, np.zeros_like(w), np.zeros_like(w)
    ours, other = config.build(), optax.lamb(RATE, 0.9, 0.999, 1e-6, weight_decay=0.1)
    state, other_state = ours.init(params), other.init(theirs)
    for t in range(1, 5):
        g = rng.standard_normal(w.shape)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        u = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-6) + 0.1 * w
        w = w - RATE * np.linalg.norm(w) / np.linalg.norm(u) * u
        grads = {"kernel": jnp.asarray(g, jnp.float32)}
        updates, state = ours.update(grads, state, params)
        params = jax.tree.map(lambda p, u: p + RATE * u, params, updates)
        updates, other_state = other.update(grads, other_state, theirs)
        theirs = optax.apply_updates(theirs, updates)
    np.testing.assert_allclose(params["kernel"], w, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(theirs["kernel"], w, rtol=1e-5, atol=1e-6)


def test_lamb_leaves_undecayed_parameters_alone_and_zero_norms_at_ratio_one() -> None:
    params = {"bias": jnp.full(3, 5.0), "kernel": jnp.zeros((2, 2)), "scale": jnp.ones(2)}
    grads = jax.tree.map(jnp.ones_like, params)
    plain, everywhere = (
        c.build().update(grads, c.build().init(params), params)[0] for c in (Lamb(), Lamb(adapt_all=True))
    )
    np.testing.assert_allclose(plain["bias"], -1.0, rtol=1e-4)
    np.testing.assert_allclose(plain["kernel"], -1.0, rtol=1e-4)
    np.testing.assert_allclose(everywhere["bias"], -5.0, rtol=1e-4)


def test_prenormalized_lamb_ignores_the_gradients_scale() -> None:
    params, grads = tree(0), tree(1)
    config = Lamb(pre_normalize=True, eps=1.0)

    def update(scale: float):
        transformation = config.build()
        scaled = jax.tree.map(lambda g: g * scale, grads)
        return compiled(transformation)(scaled, transformation.init(params), params)[0]

    assert_close(update(1.0), update(1000.0), rtol=1e-4)


@pytest.mark.parametrize("config", OPTIMIZERS, ids=lambda c: c.kind)
def test_decay_reaches_kernels_and_tables_but_neither_biases_nor_norms(config) -> None:
    """With gradients of zero all that moves a parameter is its decay."""
    params = tree(0)
    config = config.model_copy(update={"weight_decay": 0.5})
    transformation = config.build()
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = compiled(transformation)(zeros, transformation.init(params), params)
    for name, update in flatten(updates).items():
        decayed = not name.endswith(("bias", "scale"))
        assert np.any(update) == decayed, name
        if decayed and config.kind != "lamb":
            np.testing.assert_allclose(update, -0.5 * flatten(params)[name], rtol=1e-5, err_msg=name)


def test_decay_mask_follows_the_patterns() -> None:
    mask = flatten(AdamW(no_decay=("table$", "^layers/.*norm/")).decay_mask(tree(0)))
    assert not mask["token_embedding/table"] and not mask["layers/attention_norm/scale"]
    assert mask["embedding_norm/scale"] and mask["masked_bias"] and mask["layers/feed_forward/up/kernel"]


@pytest.mark.parametrize("config", OPTIMIZERS, ids=lambda c: c.kind)
def test_every_optimizer_descends(config) -> None:
    """Finite, and every parameter moves against a constant gradient."""
    params = tree(0)
    config = config.model_copy(update={"weight_decay": 0.0})
    transformation = config.build()
    state = transformation.init(params)
    grads = jax.tree.map(jnp.ones_like, params)
    update = compiled(transformation)
    for _ in range(2):
        updates, state = update(grads, state, params)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state))
    for name, leaf in flatten(updates).items():
        assert np.all(np.isfinite(leaf)) and np.sum(leaf) < 0, name


def test_muons_matrices() -> None:
    """The layers' kernels as input x output matrices, the layer apart; nothing else."""
    matrices = {
        "layers/attention/query/kernel": ((1,), (2, 3)),
        "layers/attention/output/kernel": ((1, 2), (3,)),
        "layers/feed_forward/up/kernel": ((1,), (2,)),
        "layers/feed_forward/down/kernel": ((1,), (2,)),
    }
    is_view = lambda v: v is None or isinstance(v, optax.contrib.MuonDimensionNumbers)  # noqa: E731
    leaves = jax.tree_util.tree_flatten_with_path(matrix_dimensions(tree(0)), is_leaf=is_view)[0]
    assert len(leaves) == len(flatten(tree(0)))
    for path, view in leaves:
        assert (None if view is None else tuple(view)) == matrices.get(path_name(path)), path_name(path)


def test_muon_orthogonalizes_each_layers_matrix() -> None:
    params = tree(0)
    transformation = Muon(weight_decay=0.0).build()
    updates, _ = compiled(transformation)(tree(1), transformation.init(params), params)
    got = flatten(updates)
    shapes = {
        "layers/attention/query/kernel": (D, N * H), "layers/attention/output/kernel": (N * H, D),
        "layers/feed_forward/up/kernel": (D, F), "layers/feed_forward/down/kernel": (F, D),
    }  # fmt: skip
    for name, shape in shapes.items():
        for layer in np.asarray(got[name]).reshape(L, *shape):
            # five Newton-Schulz iterations leave singular values within about (0.7, 1.2); 0.2 sqrt(max) is Adam's size
            values = np.linalg.svd(layer / (0.2 * max(shape) ** 0.5), compute_uv=False)
            assert 0.5 < values.min() and values.max() < 1.4, (name, values)
    # the other half is AdamW with Nesterov momentum, whose first step is 1 + b1 / (1 + b1) instead of 1
    np.testing.assert_allclose(np.abs(got["token_embedding/table"]), 1 + 0.9 / 1.9, rtol=1e-3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(kind="adam"), "adamw"),
        (dict(kind="adamw", b1=1.0), "less than 1"),
        (dict(kind="adamw", no_decay=("(",)), "not a regular expression"),
        (dict(kind="adamw", clip_norm=0), "greater than 0"),
        (dict(kind="lion", eps=1e-8), "Extra inputs"),
    ],
)
def test_bad_settings_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TypeAdapter(Optimizer).validate_python(fields)


def test_states_of_one_kind_have_the_same_leaves_and_no_others() -> None:
    """What stages are checked by before a run, and a resume finds the right stage's state by."""
    configs = [
        *OPTIMIZERS,
        AdamW(first_moment="bfloat16"),
        AdamW(second_moment="factored", weight_decay=0.0),
        Adafactor(relative_step=False, clip_norm=None),
        Adafactor(momentum=0.9),
        Adafactor(momentum=0.5, weight_decay=0.0),
        Adafactor(momentum=0.9, relative_step=False),
        Lion(weight_decay=0.0),
        Muon(consistent_rms=None),
    ]

    def leaves(config: Optimizer) -> dict:
        state = flatten(jax.eval_shape(config.build().init, tree(0)))
        return {path: (leaf.shape, leaf.dtype) for path, leaf in state.items()}

    for one in configs:
        for other in configs:
            if one.kind == other.kind:  # adamw and lamb happen to have the same
                assert (one.state_kind == other.state_kind) == (leaves(one) == leaves(other)), (one, other)
            else:
                assert one.state_kind != other.state_kind
