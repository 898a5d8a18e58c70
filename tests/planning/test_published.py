"""The time model beside published runs, and what it says of changes whose direction is known."""

from __future__ import annotations

import dataclasses

import pytest

from bertgpt_jax.planning import published
from bertgpt_jax.planning.places import parse
from bertgpt_jax.planning.roofline import hbm_bytes, matmul_seconds, sent_bytes, step_time
from bertgpt_jax.planning.work import Shards, Work

GPT = Work(layers=24, width=2048, heads=16, head_size=128, feed_forward=8192, vocabulary=50_304, rows=512, length=2048)
PARAMETERS = 1.3e9
POD = parse("v5e:16x16")
FSDP = Shards(1, 256, 1, 1, 1)


@pytest.mark.parametrize("run", published.runs(), ids=lambda run: f"{run.name} {run.place.name}".replace(" ", "-"))
def test_a_published_run(run: published.PublishedRun) -> None:
    """Within a fifth, as the issue asks; the sizes come to the parameters in the run's name."""
    assert abs(run.error()) < 0.20, f"predicted {run.predicted():.3f}, published {run.mfu:.3f}"
    digits, unit = run.name.split()[-1][:-1], run.name[-1]
    assert run.parameters == pytest.approx(float(digits) * {"B": 1e9, "M": 1e6}[unit], rel=0.12)
    assert run.shards.chips == run.place.chips


def test_the_error_that_is_printed_is_the_largest() -> None:
    errors = [abs(run.error()) for run in published.runs()]
    assert published.calibration_error() == max(errors) < 0.15
    assert any(not run.fitted for run in published.runs()) and set(published.known_chips()) >= {"v4", "v5e", "v5p"}


def test_products_are_the_models_flops() -> None:
    """Of sizes that fill the matrix unit, without recomputation: 6 x weights x positions at the unit's share."""
    work = dataclasses.replace(GPT, causal=False, fused_attention=False, vocabulary=51_200)
    weights = work.layers * work.layer_weights + work.vocabulary * work.width
    attention = 12 * work.layers * work.length * work.width
    flops = (6 * weights + attention) * work.positions / 256
    assert matmul_seconds(work, FSDP, POD) == pytest.approx(flops / (POD.chip.flops * 0.93), rel=1e-6)


def seconds(shards: Shards = FSDP, place=POD, **changes) -> float:
    return step_time(dataclasses.replace(GPT, **changes), shards, place, PARAMETERS).total


def test_what_is_slower() -> None:
    assert seconds(remat="full") > seconds(remat="dots") > seconds(remat="none")
    assert seconds(fused_attention=False) > seconds()
    assert seconds(head_size=64, heads=32) > seconds(), "half of the matrix unit is empty"
    assert seconds(Shards(1, 64, 4, 1, 1), microbatches=4) > seconds(microbatches=4), "the pipeline's bubble"
    assert seconds(Shards(1, 16, 1, 1, 16)) > seconds(), "activations are summed over 16 shards"
    assert seconds(rows=1024) == pytest.approx(2 * seconds(), rel=0.1)


def test_two_slices_and_the_network_between_them() -> None:
    """The gradient's part of a chip, sent and received; few chips with few positions cannot hide it."""
    two, shards = parse("v5e:16x16", 2), Shards(2, 256, 1, 1, 1)
    time = step_time(dataclasses.replace(GPT, rows=1024), shards, two, PARAMETERS)
    gradient = PARAMETERS / 256 * 4
    assert time.dcn == pytest.approx(gradient / (two.chip.dcn_bandwidth * 0.8), rel=1e-6)
    assert time.by_axis["data"] == 0 and time.binding == "matmul"
    few = step_time(dataclasses.replace(GPT, rows=8, length=8), Shards(2, 4, 1, 1, 1), parse("v5e:2x2", 2), PARAMETERS)
    assert few.binding == "dcn" and few.dcn > few.ici


def test_shards_that_span_slices_gather_over_the_network() -> None:
    """In every part of the batch; a gradient of replicas crosses it once a step."""
    two, parts = parse("v5e:16x16", 2), dataclasses.replace(GPT, microbatches=4)
    replicas = step_time(parts, Shards(2, 256, 1, 1, 1), two, PARAMETERS)
    work = dataclasses.replace(parts, dcn_fsdp=2)
    spanning = step_time(work, Shards(1, 512, 1, 1, 1), two, PARAMETERS)
    assert spanning.dcn > replicas.dcn and spanning.by_axis["fsdp"] > 0
    assert spanning.dcn == pytest.approx(sent_bytes(work, Shards(1, 512, 1, 1, 1), PARAMETERS)["fsdp"] / 511 / 2.5e9)


def test_bytes_sent() -> None:
    """FSDP: every weight is gathered twice and reduced once, in bf16; tensor: four sums of activations a layer."""
    sent = sent_bytes(GPT, Shards(1, 64, 1, 1, 4), PARAMETERS)
    stack = GPT.layers * GPT.layer_weights / 4
    tables = (PARAMETERS - GPT.layers * GPT.layer_weights) / 4
    assert sent["fsdp"] == pytest.approx((6 * stack + 8 * tables) * 63 / 64)
    hidden = GPT.positions / 64 * GPT.width * 2
    assert sent["tensor"] == pytest.approx(4 * 2 * hidden * GPT.layers * 3 / 4)
    assert sent["data"] == sent["pipe"] == sent["context"] == 0
    assert sent_bytes(GPT, Shards(256, 1, 1, 1, 1), PARAMETERS)["data"] == pytest.approx(8 * PARAMETERS * 255 / 256)


def test_memory_passes_fall_with_sharding() -> None:
    assert hbm_bytes(GPT, FSDP, PARAMETERS) < hbm_bytes(GPT, Shards(256, 1, 1, 1, 1), PARAMETERS)
