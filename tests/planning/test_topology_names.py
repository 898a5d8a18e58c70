"""Names of places: what each means, and what is said of those that do not exist."""

from __future__ import annotations

import math

import pytest

from bertgpt_jax.errors import ConfigError
from bertgpt_jax.planning.chips import CHIPS
from bertgpt_jax.planning.links import axis_bandwidth
from bertgpt_jax.planning.places import Place, parse, torus_shapes
from bertgpt_jax.planning.work import Shards


@pytest.mark.parametrize(
    ("text", "chips", "hosts", "sides", "cloud"),
    [
        ("v4-32", 16, 4, (2, 2, 4), "v4-32"),
        ("v4-128", 64, 16, (4, 4, 4), "v4-128"),
        ("v5p-512", 256, 64, (4, 8, 8), "v5p-512"),
        ("v5p:8x8x16", 1024, 256, (8, 8, 16), "v5p-2048"),
        ("v5litepod-256", 256, 64, (16, 16), "v5litepod-256"),
        ("v5e-8", 8, 1, (2, 4), "v5litepod-8"),
        ("v5e:4x4", 16, 4, (4, 4), "v5litepod-16"),
        ("v6e-256", 256, 64, (16, 16), "v6e-256"),
        ("v5p:16x16x24", 6144, 1536, (16, 16, 24), "v5p-12288"),
        ("h100:8", 8, 1, (8,), "h100:8"),
        ("h200:64", 64, 8, (64,), "h200:64"),
        ("cpu:3", 3, 1, (3,), "cpu:3"),
    ],
)
def test_a_name(text: str, chips: int, hosts: int, sides: tuple, cloud: str) -> None:
    place = parse(text)
    assert (place.chips, place.hosts, place.sides, place.cloud_name) == (chips, hosts, sides, cloud)
    assert parse(place.name) == place and parse(cloud) == place
    assert f"{chips:,} chips {place.chip.name}" in place.describe()


def test_slices() -> None:
    place = parse("v5e:16x16", 2)
    assert (place.chips, place.slice_chips, place.hosts) == (512, 256, 128)
    assert "2 slices of 256" in place.describe()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("v5e:3x5", ["v5e:3x5", "v5e:2x4 and v5e:4x4"]),
        ("v5e:4x4x4", ["no slice of that shape", "v5e:8x8"]),
        ("v5p-513", ["v5p-513", "no slice of 513 cores", "v5p-512"]),
        ("v5p-500", ["nearest: v5p-384 and v5p-512"]),
        ("v5litepod-100", ["v5litepod-64 and v5litepod-128"]),
        ("v5x:4x4", ["no chip 'v5x'", "did you mean 'v5'"]),
        ("h300:8", ["no chip 'h300'", "did you mean 'h200'"]),
        ("h100:12", ["nearest: h100:8 and h100:16"]),
        ("pod", ["topology 'pod'", "v5p:8x8x16"]),
        ("v5e:", ["give CHIP:SIDES"]),
        ("v4:0x0x0", ["v4:0x0x0", "nearest"]),
    ],
)
def test_places_that_do_not_exist(text: str, shown: list[str]) -> None:
    with pytest.raises(ConfigError) as raised:
        parse(text)
    assert [part for part in shown if part not in str(raised.value)] == [], raised.value
    assert "\n" not in str(raised.value)


def test_no_slices() -> None:
    with pytest.raises(ConfigError, match="x 0"):
        parse("v5e:4x4", 0)


def test_shapes_are_of_one_torus_each() -> None:
    for chip in CHIPS.values():
        if chip.torus:
            shapes = list(torus_shapes(chip))
            assert len(set(shapes)) == len(shapes) and all(len(sides) == chip.torus for sides in shapes)
            sizes = [math.prod(sides) for sides in shapes]
            assert sizes == sorted(sizes)
        assert chip.usable_bytes <= chip.hbm_bytes and chip.source


@pytest.mark.parametrize(
    ("text", "shards", "links"),
    [
        # whole sides closed to rings: both directions of each
        ("v5e:16x16", (1, 256, 1, 1, 1), {"fsdp": 4}),
        ("v5e:16x16", (16, 1, 1, 1, 16), {"data": 2, "tensor": 2}),
        ("v5p:8x8x16", (1, 1024, 1, 1, 1), {"fsdp": 6}),
        # below 16 a side of v5e is a line
        ("v5e:4x4", (1, 16, 1, 1, 1), {"fsdp": 2}),
        # 4 of a side of 16 are a line, what is left of it too
        ("v5e:16x16", (1, 64, 1, 1, 4), {"tensor": 1, "fsdp": 3}),
        ("v5p:4x4x4", (4, 4, 1, 1, 4), {"data": 2, "fsdp": 2, "tensor": 2}),
    ],
)
def test_links_of_an_axis(text: str, shards: tuple, links: dict[str, int]) -> None:
    place = parse(text)
    bandwidth = axis_bandwidth(place, Shards(*shards))
    finite = {axis: value / place.chip.link_bandwidth for axis, value in bandwidth.items() if value < math.inf}
    assert finite == links


def test_gpus_have_a_switch_and_a_network() -> None:
    place = parse("h100:16")
    bandwidth = axis_bandwidth(place, Shards(2, 1, 1, 1, 8))
    assert bandwidth["tensor"] == place.chip.link_bandwidth and bandwidth["data"] == place.chip.dcn_bandwidth
    assert isinstance(place, Place)
