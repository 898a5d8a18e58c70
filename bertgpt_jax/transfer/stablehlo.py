"""The forward as a StableHLO program (`jax.export`) for any batch and length, beside its parameters.

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
from bertgpt_jax.models import make_model
from bertgpt_jax.nn.blocks import ComputeConfig
from bertgpt_jax.nn.masks import causal_mask, segment_mask
from bertgpt_jax.shapes import Array, Params
from bertgpt_jax.transfer.npz import write_arrays
from bertgpt_jax.transfer.proof import TOLERANCE, make_batch
from bertgpt_jax.transfer.source import ModelConfig, ProofFailed, Source, nested
from bertgpt_jax.transfer.target import building, write_json

PLATFORMS = ("cpu", "cuda", "tpu")
FORWARD = "forward.stablehlo"


def export_stablehlo(source: Source, out: str, dtype: str = "float32") -> list[str]:
    """Writes `forward.stablehlo`, `params.npz` and `model.json`; returns lines that say what they are.

    The program takes (parameters, inputs): nested dicts of arrays as in `params.npz`, and `tokens` int32 [b, t] (an
    encoder also `types` and `segments`, 0 for padding). A GPT's result is logits [b, t, V]; a BERT's those and the
    next-sentence logits [b, 2], or None.

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
    config = source.model_config
    params = jax.tree.map(lambda x: x.astype(jnp.dtype(dtype)), nested(source.read(list(source.leaves))))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    forward = make_forward(config, dtype)
    with building(out, source.label.partition(", step")[0], size + (64 << 20)) as work:
        write_arrays(source, work, dtype)
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
        program = export.export(jax.jit(forward), platforms=PLATFORMS)(shapes, abstract_inputs(config))
        (work / FORWARD).write_bytes(program.serialize())
        difference = _prove(work / FORWARD, forward, params, config, source)
        write_json(work / "model.json", _description(source, dtype, difference))
    return [
        f"  {FORWARD}: any batch, up to {config.max_positions} positions, for {', '.join(PLATFORMS)}",
        f"  read back and run: differs from the model by {difference:.1e} at most",
        f"finished: {out}",
        "  next: jax.export.deserialize(open('forward.stablehlo', 'rb').read()).call(params, inputs)",
    ]


def make_forward(config: ModelConfig, dtype: str) -> Any:
    """(params, inputs) -> logits, from plain arrays."""
    model = make_model(config, ComputeConfig(dtype=dtype, attention="reference", unroll_layers=False))

    def decoder(params: Params, inputs: dict[str, Array]) -> Array:
        tokens = inputs["tokens"]
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        return model.apply({"params": params}, tokens, positions, causal_mask())

    def encoder(params: Params, inputs: dict[str, Array]) -> tuple[Array, Array | None]:
        tokens = inputs["tokens"]
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        mask = segment_mask(inputs["segments"])
        return model.apply({"params": params}, tokens, positions, inputs["types"], mask, positions)

    return encoder if config.kind == "bert" else decoder


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
            a, b = (np.asarray(array, np.float32) for array in (x, y))
            difference = float(np.abs(a - b).max())
            tolerance = TOLERANCE if x.dtype == jnp.float32 else 2**-7  # bfloat16 keeps 8 bits
            if not difference <= tolerance * max(1.0, float(np.abs(b).max())):
                raise ProofFailed(f"{FORWARD} read back differs from {source.label} by {difference:.2e}")
            worst = max(worst, difference)
    return worst


def _description(source: Source, dtype: str, difference: float) -> dict[str, Any]:
    return {
        "dtype": dtype,
        "step": source.step,
        "jax": jax.__version__,
        "platforms": list(PLATFORMS),
        "largest_difference": difference,
        "model": source.model_config.model_dump(mode="json"),
    }
