"""The forward, and a GPT's decoding step, as StableHLO programs (`jax.export`) for any batch, beside their parameters.

For deployment, not for keeping: jax reads such programs for about six months of releases; the checkpoint is what lasts.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from bertgpt_jax.errors import ConfigError
from bertgpt_jax.generation.decode import Cache, GptDecoder
from bertgpt_jax.models import make_model
from bertgpt_jax.nn.attention import KeyValues
from bertgpt_jax.nn.blocks import ComputeConfig, stack, unstack
from bertgpt_jax.nn.masks import causal_mask, segment_mask
from bertgpt_jax.shapes import Array, Params
from bertgpt_jax.transfer.npz import write_arrays
from bertgpt_jax.transfer.proof import TOLERANCE, make_batch
from bertgpt_jax.transfer.source import ModelConfig, ProofFailed, Source, nested
from bertgpt_jax.transfer.target import building, write_json

PLATFORMS = ("cpu", "cuda", "tpu")
FORWARD, STEP = "forward.stablehlo", "step.stablehlo"


def export_stablehlo(source: Source, out: str, dtype: str = "float32") -> list[str]:
    """Writes `forward.stablehlo`, `params.npz` and `model.json`; returns lines that say what they are.

    The program takes (parameters, inputs): nested dicts of arrays as in `params.npz`, and `tokens` int32 [b, t] (an
    encoder also `types` and `segments`, 0 for padding). A GPT's result is logits [b, t, V]; a BERT's those and the
    next-sentence logits [b, 2], or None. A GPT also gets `step.stablehlo`, see `make_step`; its parameters are one
    array a layer (`layers/0/attention/query/kernel`), because a step that slices stacked ones copies every weight.

    Args:
        dtype: of the parameters and of the computation.

    Raises:
        ConfigError, StorageError: `out` cannot be made, or flatbuffers is not installed. ProofFailed: the program read
            back computes something else.
    """
    if importlib.util.find_spec("flatbuffers") is None:
        raise ConfigError(
            "jax writes programs with flatbuffers, which is missing: pip install 'bertgpt_jax[stablehlo]'"
        )
    config, gpt = source.model_config, source.model_config.kind == "gpt"
    params = jax.tree.map(lambda x: x.astype(jnp.dtype(dtype)), nested(source.read(list(source.leaves))))
    if gpt:
        params["layers"] = {str(i): layer for i, layer in enumerate(unstack(params["layers"]))}
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    forward = make_forward(config, dtype)
    with building(out, source.label.partition(", step")[0], size + (64 << 20)) as work:
        write_arrays(source, work, dtype, stacked=not gpt)
        _write(work / FORWARD, forward, shapes, abstract_inputs(config))
        difference = _prove(work / FORWARD, forward, params, config, source)
        if gpt:
            _write(work / STEP, make_step(config, dtype), shapes, *abstract_step(config, dtype))
            difference = max(difference, _prove_step(work / STEP, forward, params, config, source, dtype))
        write_json(work / "model.json", _description(source, dtype, difference))
    return [
        f"  {FORWARD}: any batch, up to {config.max_positions} positions, for {', '.join(PLATFORMS)}",
        *([f"  {STEP}: one more token a row, with a cache of any length"] if gpt else []),
        f"  read back and run: differs from the model by {difference:.1e} at most",
        f"finished: {out}",
        "  next: jax.export.deserialize(open('forward.stablehlo', 'rb').read()).call(params, inputs)",
    ]


def _write(path: Path, function: Any, *shapes: Any) -> None:
    path.write_bytes(export.export(jax.jit(function), platforms=PLATFORMS)(*shapes).serialize())


def make_forward(config: ModelConfig, dtype: str) -> Any:
    """(params, inputs) -> logits, from plain arrays."""
    model = make_model(config, ComputeConfig(dtype=dtype, attention="reference", unroll_layers=False))

    def decoder(params: Params, inputs: dict[str, Array]) -> Array:
        tokens = inputs["tokens"]
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        whole = params | {"layers": stack(_in_order(params["layers"]))}
        return model.apply({"params": whole}, tokens, positions, causal_mask())

    def encoder(params: Params, inputs: dict[str, Array]) -> tuple[Array, Array | None]:
        tokens = inputs["tokens"]
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        mask = segment_mask(inputs["segments"])
        return model.apply({"params": params}, tokens, positions, inputs["types"], mask, positions)

    return encoder if config.kind == "bert" else decoder


def make_step(config: ModelConfig, dtype: str) -> Any:
    """(params, tokens int32 [b], cache) -> (logits [b, V], cache).

    The cache is {"keys", "values": a tuple of [b, N, s, H] a layer, "starts": int32 [b], "slot": int32 []}: zeros and
    slot 0 before the first token; `starts` is the slot at which each row's own tokens begin.
    """
    decoder = GptDecoder(config, config.vocab_size, dtype)

    def step(params: Params, tokens_B: Array, cache: dict[str, Any]) -> tuple[Array, dict[str, Any]]:
        ends = {name: tree for name, tree in params.items() if name != "layers"}
        pairs = zip(cache["keys"], cache["values"], strict=True)
        known = Cache(tuple(KeyValues(k, v) for k, v in pairs), cache["starts"], cache["slot"])
        layout = {"ends": ends, "layers": _in_order(params["layers"])}
        logits_BV, known = decoder.step(layout, tokens_B, known)
        keys, values = zip(*known.layers, strict=True)
        return logits_BV, {"keys": keys, "values": values, "starts": known.starts_B, "slot": known.slot}

    return step


def _in_order(layers: Params) -> tuple[Params, ...]:
    return tuple(layers[str(i)] for i in range(len(layers)))


def abstract_step(config: ModelConfig, dtype: str) -> tuple[Any, Any]:
    """Tokens and cache of a step, with the batch and the cache's length left open."""
    rows, slots = export.symbolic_shape("b, s", constraints=[f"s <= {config.max_positions}"])
    ids = jax.ShapeDtypeStruct((rows,), jnp.int32)
    one = jax.ShapeDtypeStruct((rows, config.num_heads, slots, config.head_size), jnp.dtype(dtype))
    layers = (one,) * config.num_layers
    return ids, {"keys": layers, "values": layers, "starts": ids, "slot": jax.ShapeDtypeStruct((), jnp.int32)}


def empty_cache(config: ModelConfig, rows: int, slots: int, dtype: str) -> dict[str, Any]:
    """The cache before the first token."""
    one = jnp.zeros((rows, config.num_heads, slots, config.head_size), jnp.dtype(dtype))
    layers = (one,) * config.num_layers
    return {"keys": layers, "values": layers, "starts": jnp.zeros(rows, jnp.int32), "slot": jnp.zeros((), jnp.int32)}


def abstract_inputs(config: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Inputs with the batch and the length left open."""
    rows, length = export.symbolic_shape("b, t", constraints=[f"t <= {config.max_positions}"])
    ids = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    names = ("tokens", "types", "segments") if config.kind == "bert" else ("tokens",)
    return dict.fromkeys(names, ids)


def _prove(path: Path, forward: Any, params: Params, config: ModelConfig, source: Source) -> float:
    """The largest difference between the program read back and the model, for two batch sizes."""
    program, worst = export.deserialize(path.read_bytes()), 0.0
    batch = make_batch(config, source.tokenizer)
    whole = {"tokens": batch["tokens"]}
    if config.kind == "bert":
        whole |= {"types": batch["types"], "segments": batch["attention"]}
    for rows in (1, len(batch["tokens"])):
        inputs = {name: jnp.asarray(array[:rows]) for name, array in whole.items()}
        theirs, ours = (jax.tree.leaves(run(params, inputs)) for run in (program.call, jax.jit(forward)))
        for x, y in zip(ours, theirs, strict=True):
            worst = max(worst, _difference(x, y, FORWARD, source))
    return worst


def _prove_step(
    path: Path, forward: Any, params: Params, config: ModelConfig, source: Source, dtype: str, length: int = 5
) -> float:
    """The largest difference between steps of the program read back and the whole forward, for two batch sizes."""
    program, worst = export.deserialize(path.read_bytes()), 0.0
    tokens_BT = make_batch(config, source.tokenizer)["tokens"][:, :length]
    for rows in (1, len(tokens_BT)):
        whole = jax.jit(forward)(params, {"tokens": jnp.asarray(tokens_BT[:rows])})
        cache = empty_cache(config, rows, length, dtype)
        for i in range(tokens_BT.shape[1]):
            logits, cache = program.call(params, jnp.asarray(tokens_BT[:rows, i]), cache)
            worst = max(worst, _difference(whole[:, i], logits, STEP, source))
    return worst


def _difference(ours: Array, theirs: Array, name: str, source: Source) -> float:
    """The largest difference of two results.

    Raises:
        ProofFailed: it is too large.
    """
    tolerance = TOLERANCE if ours.dtype == jnp.float32 else 2**-5  # bfloat16 keeps 8 bits
    a, b = (np.asarray(array, np.float32) for array in (ours, theirs))
    difference = float(np.abs(a - b).max())
    if not difference <= tolerance * max(1.0, float(np.abs(b).max())):
        raise ProofFailed(f"{name} read back differs from {source.label} by {difference:.2e}")
    return difference


def _description(source: Source, dtype: str, difference: float) -> dict[str, Any]:
    return {
        "dtype": dtype,
        "step": source.step,
        "jax": jax.__version__,
        "platforms": list(PLATFORMS),
        "largest_difference": difference,
        "model": source.model_config.model_dump(mode="json"),
    }
