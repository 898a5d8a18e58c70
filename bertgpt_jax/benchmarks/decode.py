"""Benchmark `decode`: greedy continuations by a GPT-2-shaped random model beside `transformers.generate`, fp32.

Prefill is a call for one new token. Decoding is what a call for all of them takes beyond that, for both sides alike.
What the techniques of ours give is measured beside it, each taken out or put in alone; of threads, in another process
that has one CPU.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field

from bertgpt_jax.benchmarks.cpu_gpt import Settings as Shape
from bertgpt_jax.benchmarks.cpu_gpt import make_model
from bertgpt_jax.benchmarks.harness import Result, Row, Side, compare, measure, rate, require, summary
from bertgpt_jax.benchmarks.updates import loaded_from
from bertgpt_jax.config import Config
from bertgpt_jax.errors import DataError
from bertgpt_jax.generation.continuation import Continuation, right_aligned, rounded
from bertgpt_jax.generation.decode import Cache, GptDecoder
from bertgpt_jax.generation.loop import advance, begin
from bertgpt_jax.generation.sampling import Sampling, row_keys
from bertgpt_jax.models.gpt import GptConfig
from bertgpt_jax.nn.attention import KeyValues
from bertgpt_jax.nn.blocks import unstack
from bertgpt_jax.shapes import Array, Params, PyTree
from bertgpt_jax.transfer.load import Loaded
from bertgpt_jax.transfer.source import nested, parameter_shapes

GREEDY = Sampling(temperature=0)
WARMUP = 1
AGREE = 1e-3
"""Largest difference of the first logits with which both sides still have the same model."""


class Settings(Config):
    """Settings of the benchmark."""

    layers: int = Field(default=12, ge=1)
    hidden: int = Field(default=768, ge=8)
    heads: int = Field(default=12, ge=1)
    vocabulary: int = Field(default=50257, ge=2)
    positions: int = Field(default=1024, ge=8)
    batches: tuple[int, ...] = (1, 32)
    prompt: int = Field(default=32, ge=1)
    new: int = Field(default=64, ge=2)
    rounds: int = Field(default=7, ge=1, description="at batch 1; a third of it, at least 3, for larger ones")
    techniques: bool = Field(default=True, description="also measure what each technique gives")
    technique_tokens: int = Field(default=16, ge=1)


def run(settings: Settings) -> Result:
    """Compares both at every batch size; their first logits must agree."""
    require("torch", "transformers", extra="parity", purpose="benchmark decode")
    shape = Shape(
        layers=settings.layers, hidden=settings.hidden, heads=settings.heads,
        vocabulary=settings.vocabulary, length=settings.positions,
    )  # fmt: skip
    model = make_model(shape).eval()
    model.config.use_cache = True
    loaded = loaded_from(model)
    rows, comparisons, ratios, facts = [], {}, {}, {"parameters": sum(p.numel() for p in model.parameters())}
    for batch in settings.batches:
        prompts = np.random.default_rng(batch).integers(0, settings.vocabulary, (batch, settings.prompt))
        rounds = settings.rounds if batch == 1 else max(settings.rounds // 3, 3)
        columns = _beside_transformers(model, loaded, prompts, settings, rounds, facts)
        comparisons[f"batch {batch}"] = found = summary(columns, WARMUP)
        for part, times in _parts(columns, settings).items():
            comparisons[f"{part}, batch {batch}"] = apart = summary(times, WARMUP)
            ratios[f"transformers, {part}, batch {batch}"] = apart["ratios"]["transformers"]
            rows += _rows(apart, part, batch, settings)
        if settings.techniques and hasattr(os, "sched_getaffinity") and len(os.sched_getaffinity(0)) > 1:
            comparisons[f"one CPU, batch {batch}"] = alone = _with_one_cpu(settings, batch)
            rows += _thread_rows(found, alone, batch, settings)
        if settings.techniques:
            apart = compare(_techniques(loaded, prompts, settings), rounds, WARMUP)
            comparisons[f"techniques, batch {batch}"] = apart
            rows += [
                Row(f"GPT-2 small, batch {batch}, decoding: {name} over ours", spread["median"], "x", detail=True)
                for name, spread in apart["paired"].items()
            ]
    return Result(tuple(rows), comparisons, ratios, facts)


# ---------------------------------------------------------------- beside transformers


def _beside_transformers(
    model: Any, loaded: Loaded, prompts: np.ndarray, settings: Settings, rounds: int, facts: dict[str, Any]
) -> dict[str, np.ndarray]:
    """Seconds [rounds] of both sides for all new tokens and for one; what they wrote goes to `facts`."""
    import torch

    decoder = GptDecoder(loaded.model_config, settings.vocabulary)
    params = decoder.layout(loaded.params)
    inputs, ours = torch.as_tensor(prompts), _continuer(decoder, params, prompts)

    def theirs(new: int) -> Any:
        with torch.inference_mode():
            return model.generate(
                inputs, attention_mask=torch.ones_like(inputs), do_sample=False, use_cache=True,
                max_new_tokens=new, min_new_tokens=new, eos_token_id=None, pad_token_id=0,
            )[:, inputs.shape[1] :]  # fmt: skip

    with torch.inference_mode():
        their_logits = model(inputs).logits[:, -1].numpy()
    tokens_BT, starts_B = right_aligned(prompts)
    logits = jax.jit(decoder.prefill, static_argnums=3)(params, tokens_BT, starts_B, tokens_BT.shape[1])[0]
    apart = float(np.abs(np.asarray(logits) - their_logits).max())
    if not apart <= AGREE:
        raise DataError(f"the first logits differ by {apart:.1e}, over {AGREE:.0e}; the sides have different models")
    same = np.mean(np.all(np.array(ours(settings.new)) == theirs(settings.new).numpy(), 1))
    facts[f"batch {len(prompts)}"] = {"first_logits_apart": apart, "rows_with_equal_tokens": float(same)}

    return measure(_sides({"ours": ours, "transformers": theirs}, settings), rounds, WARMUP)


def _continuer(decoder: GptDecoder, params: PyTree, prompts: np.ndarray) -> Callable[[int], list[list[int]]]:
    return lambda new: Continuation(decoder, params, GREEDY, new).run(prompts)


def _sides(calls: dict[str, Callable[[int], Any]], settings: Settings) -> list[Side]:
    """A call for all new tokens and one for the first, of each."""
    return [
        Side(f"{name}, {new} tokens", lambda: None, lambda _, call=call, new=new: call(new))
        for new in (settings.new, 1)
        for name, call in calls.items()
    ]


def _parts(columns: dict[str, np.ndarray], settings: Settings) -> dict[str, dict[str, np.ndarray]]:
    """Seconds [rounds] of `prefill` and `decoding` of each side, round by round."""
    first, whole = (
        {name: columns[f"{name}, {new} tokens"] for name in ("ours", "transformers")} for new in (1, settings.new)
    )
    return {"prefill": first, "decoding": {name: whole[name] - first[name] for name in first}}


def _rows(apart: dict[str, Any], part: str, batch: int, settings: Settings) -> list[Row]:
    """Rates of both sides, and the paired median of one part; decoding has bars."""
    shape, tokens = f"GPT-2 small, batch {batch}", batch * (settings.new - 1)
    what = part
    if part == "prefill":
        what, tokens = f"prefill of {settings.prompt} tokens a row", batch * settings.prompt
    rows = [
        Row(f"{shape}, {what}, {name}", rate(apart, name, tokens), "tokens/s", detail=name != "ours")
        for name in ("ours", "transformers")
    ]
    bar = {1: 1.6, 32: 1.0}.get(batch) if part == "decoding" else None
    return [*rows, Row(f"{shape}, {what} over transformers", apart["paired"]["transformers"]["median"], "x", bar)]


# ---------------------------------------------------------------- threads

_ALONE = """
import sys
from bertgpt_jax.benchmarks.harness import use_cpus
use_cpus(1)
from bertgpt_jax.benchmarks.decode import measure_alone
measure_alone(sys.argv[1], int(sys.argv[2]))
"""


def _with_one_cpu(settings: Settings, batch: int) -> dict[str, Any]:
    """Our side in a process confined to one CPU: how many threads there are is settled when a process begins."""
    command = [sys.executable, "-c", _ALONE, settings.model_dump_json(), str(batch)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise DataError(f"benchmark decode on one CPU ended with {done.returncode}: {done.stderr.strip()[-300:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure_alone(settings_json: str, batch: int) -> None:
    """Prints what `compare` finds for our side alone, with random parameters of the same shape."""
    settings = Settings.model_validate_json(settings_json)
    sizes = dict(num_layers=settings.layers, hidden_size=settings.hidden, num_heads=settings.heads)
    config = GptConfig(
        **sizes, intermediate_size=4 * settings.hidden, vocab_size=settings.vocabulary, max_positions=settings.positions
    )
    rng = np.random.default_rng(0)
    shapes = {path: shape for path, (_, shape) in parameter_shapes(config).items()}
    params = nested({path: rng.standard_normal(shape, np.float32) * 0.02 for path, shape in shapes.items()})
    decoder = GptDecoder(config, settings.vocabulary)
    prompts = rng.integers(0, settings.vocabulary, (batch, settings.prompt))
    ours = _continuer(decoder, decoder.layout(params), prompts)
    print(json.dumps(compare(_sides({"ours": ours}, settings), max(settings.rounds // 3, 1), WARMUP)))


def _thread_rows(found: dict[str, Any], alone: dict[str, Any], batch: int, settings: Settings) -> list[Row]:
    """What one CPU takes over what all of them take."""
    many, one = (_medians(each, settings) for each in (found, alone))
    return [
        Row(f"GPT-2 small, batch {batch}, {part}: with one thread over ours", b / a, "x", detail=True)
        for part, a, b in zip(("prefill", "decoding"), many, one, strict=True)
    ]


def _medians(found: dict[str, Any], settings: Settings) -> tuple[float, float]:
    """Our median seconds of (prefill, decoding)."""
    whole, first = (found["seconds"][f"ours, {new} tokens"]["median"] for new in (settings.new, 1))
    return first, whole - first


# ---------------------------------------------------------------- techniques


class StackedLayers(GptDecoder):
    """Slices the stacked layers in every step, as a scan over layers does."""

    def layout(self, params: Params, mesh: Any = None) -> PyTree:
        """The layers stay stacked."""
        return super().layout(params, mesh) | {"layers": jax.tree.map(jnp.asarray, params["layers"])}

    def step(self, params: PyTree, tokens_B: Array, cache: Cache) -> tuple[Array, Cache]:
        """See `Decoder`."""
        return super().step(params | {"layers": unstack(params["layers"])}, tokens_B, cache)


class SlotsFirst(GptDecoder):
    """Keeps keys and values as [B, S, N, H], the order in which they are computed."""

    def step(self, params: PyTree, tokens_B: Array, cache: Cache) -> tuple[Array, Cache]:
        """See `Decoder`."""
        logits_BV, cache = super().step(params, tokens_B, self.turned(cache))
        return logits_BV, self.turned(cache)

    @staticmethod
    def turned(cache: Cache) -> Cache:
        """[B, S, N, H] to [B, N, S, H] and back."""
        return cache._replace(layers=tuple(KeyValues(*(x.swapaxes(1, 2) for x in layer)) for layer in cache.layers))


def _techniques(loaded: Loaded, prompts: np.ndarray, settings: Settings) -> list[Side]:
    """Ours first, then ours with one technique changed; a step is `technique_tokens` tokens a row."""
    plain = GptDecoder(loaded.model_config, settings.vocabulary)
    laid = plain.layout(loaded.params)
    fields = {field.name: getattr(plain, field.name) for field in dataclasses.fields(plain)}
    transposed = GptDecoder(**fields | {"transposed_head": True})
    head = laid | {"head_DV": transposed.layout(loaded.params)["head_DV"]}
    stacked = StackedLayers(**fields)
    tokens_BT, starts_B = right_aligned(prompts)
    slots = tokens_BT.shape[1] + rounded(settings.new)
    keys_B = row_keys(0, np.zeros((len(prompts), 2), np.uint32))
    many, none = settings.technique_tokens, np.array([], np.int32)

    def start() -> Any:
        return begin(plain, GREEDY, slots, laid, tokens_BT, starts_B, keys_B, None, np.int32(0), none)

    def side(name: str, decoder: GptDecoder, params: PyTree, a_call: int = many, turned: bool = False) -> Side:
        def prepare() -> dict[str, Any]:
            state = start()
            return {"state": state._replace(cache=SlotsFirst.turned(state.cache)) if turned else state}

        def step(held: dict[str, Any]) -> None:
            first = jnp.asarray(tokens_BT.shape[1], jnp.int32)
            state = held["state"]._replace(number=jnp.int32(1))
            state = state._replace(cache=state.cache._replace(slot=first))
            for _ in range(many // a_call):
                state, tokens_BN = advance(decoder, GREEDY, a_call, params, state, np.int32(a_call), none)
                jax.block_until_ready(tokens_BN)
            held["state"] = state

        return Side(name, prepare, step)

    return [
        side("ours", plain, laid),
        side("with a transposed copy of the head", transposed, head),
        side("with the cache as [B, S, N, H]", SlotsFirst(**fields), laid, turned=True),
        side("with a call a token", plain, laid, a_call=1),
        side("with stacked layers", stacked, stacked.layout(loaded.params)),
    ]
