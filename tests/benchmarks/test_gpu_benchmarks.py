"""The benchmarks of one GPU at tiny sizes on the CPU: what they measure, what they hold it to, what a failure does."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, get_args

import jax
import numpy as np
import pytest

from bertgpt_jax.benchmarks import ceilings, gpu_ablation, gpu_peers, gpu_step
from bertgpt_jax.benchmarks.gpu_ablation import OnOneBatch
from bertgpt_jax.benchmarks.gpu_cases import CASES, Trial, made_up_corpus, open_batches, run_config
from bertgpt_jax.benchmarks.gpu_rungs import LADDERS, FusedAttention, Rung, plain_layer_norm, without
from bertgpt_jax.benchmarks.gpu_sides import timed
from bertgpt_jax.benchmarks.gpu_step import Measured, rows_of, utilisation
from bertgpt_jax.benchmarks.harness import look_around
from bertgpt_jax.benchmarks.record import document
from bertgpt_jax.commands.benchmark import main
from bertgpt_jax.errors import ConfigError
from bertgpt_jax.nn import blocks, layers
from bertgpt_jax.nn.blocks import ComputeConfig

TRIAL = Trial(layers=1, hidden=32, heads=2, vocabulary=256, length=32, rows=4)
TINY = dict(trial=TRIAL, block=2, blocks=2, words=3000)
FP32 = ComputeConfig(dtype="float32")


# ---------------------------------------------------------------- what is measured


def test_every_config_of_the_table_is_there() -> None:
    assert set(get_args(gpu_step.Name)) == set(CASES) and gpu_step.Settings().configs == tuple(CASES)
    assert next(iter(CASES.values())).apart, "the largest comes first"
    bars = {name: (case.least, case.stretch) for name, case in CASES.items()}
    assert bars["gpt2"] == (500e3, 560e3) and bars["bert_large_512_packed"] == (840, 1000)
    for name, case in CASES.items():
        config = run_config(case, ComputeConfig(dtype="bfloat16"))
        assert config.model.vocab_rows % 128 == 0 and config.model.hidden_dropout == 0
        assert config.stages[0].sequence_length == case.length, name
    settings = gpu_step.Settings()
    assert settings.block * settings.blocks >= 50


def test_made_up_words_are_tokens_and_batches_are_full(tmp_path: Path) -> None:
    case = TRIAL.of(CASES["gpt2"])
    config = run_config(case, FP32, made_up_corpus(case, 3000, tmp_path))
    batches = open_batches(config, tmp_path)
    first, second = batches(0), batches(1)
    assert first["tokens"].shape == (4, 32) and (first["weights"] == 1).all()
    assert not np.array_equal(first["tokens"], second["tokens"])
    ids = np.concatenate([batches(n)["tokens"].ravel() for n in range(20)])
    assert ids.max() < 256 and len(np.unique(ids)) > 150 and not (ids == 1).any(), "no word is unknown"
    packed = TRIAL.of(CASES["bert_large_512_packed"])._replace(length=128, document=20, predictions=20)
    config = run_config(packed, FP32, made_up_corpus(packed, 3000, tmp_path))
    assert gpu_step.examples_of_a_row(packed, open_batches(config, tmp_path)) > 1.5


def test_both_conventions_of_utilisation_are_those_of_the_design() -> None:
    """GPT-2 124M at 554K tokens/s: 44.7% with half of the causal attention; 0.798 and 0.855 GFLOP a token."""
    found = utilisation(CASES["gpt2"], 65_536 / 554e3, "NVIDIA H200")
    assert found["causal attention by half"] == pytest.approx(0.447, abs=0.002)
    assert found["attention in full"] / found["causal attention by half"] == pytest.approx(0.855 / 0.798, abs=0.002)
    bert = utilisation(CASES["bert_base"], 512 / 6267, "NVIDIA H200")
    assert list(bert) == ["attention in full"] and bert["attention in full"] == pytest.approx(0.443, abs=0.005)
    assert utilisation(CASES["gpt2"], 1.0, "cpu") == {}


def seen(seconds: float = 0.1) -> Measured:
    facts = {"errors": {}, "ours": {"bytes": 2**30, "first_step": {"cold": 9.0, "warm": 3.0}}}
    return Measured({"ours": np.full(60, seconds), "compile": np.full(60, 2 * seconds)}, facts)


def test_bars_hold_at_published_sizes_on_an_h200_alone() -> None:
    rows = rows_of(CASES["gpt2"], seen(), "NVIDIA H200", True)
    assert (rows[0].value, rows[0].least, rows[0].met) == (pytest.approx(655_360), 500e3, True)
    assert rows[1].value == pytest.approx(rows[0].value / 2) and rows[1].least is None
    said = " | ".join(row.measure for row in rows)
    assert all(x in said for x in ("by half", "in full", "memory of a step", "cold cache", "warm cache"))
    assert not rows_of(CASES["gpt2"], seen(1.0), "NVIDIA H200", True)[0].met
    for kind, full in (("NVIDIA H100", True), ("NVIDIA H200", False)):
        assert rows_of(CASES["gpt2"], seen(), kind, full)[0].least is None


# ---------------------------------------------------------------- runs


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param("gpt2", marks=pytest.mark.long), "bert_large_512_packed"])
def test_steps_of_ours_alone(name: str) -> None:
    settings = gpu_step.Settings(configs=(name,), peers=(), **TINY)
    result = gpu_step.run(settings)
    facts = result.facts[name]
    assert facts["errors"] == {} and set(facts["ours"]["first_step"]) == {"cold", "warm"}
    assert facts["ours"]["bytes"] > 0 and np.log(256) - 1 < facts["ours"]["loss"] < np.log(256) + 1.5
    assert result.comparisons[name]["repeats"] == 4
    assert all(row.least is None and row.value > 0 for row in result.rows)
    json.dumps(document("gpu_step", settings.model_dump(mode="json"), result, look_around(0.01)))


class Fake:
    """A side that fails in the update it is told to fail in."""

    def __init__(self, name: str, fails_at: int | None = None, loss: float = 5.0):
        self.name, self.facts, self.stopped = name, {"loss": loss}, False
        self._fails_at, self._updates = fails_at, 0

    def start(self) -> None:
        self.update()

    def update(self) -> int:
        self._updates += 1
        if self._updates == self._fails_at:
            raise MemoryError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes\nand a long story")
        return self._updates

    def wait(self, handle: int) -> None:
        assert handle <= self._updates

    def stop(self) -> None:
        self.stopped = True


@pytest.mark.parametrize("fails_at", [1, 3, 6])
def test_a_side_that_fails_leaves_the_others(fails_at: int) -> None:
    errors: dict[str, str] = {}
    sides = [Fake("ours", fails_at), Fake("peer")]
    times = gpu_step._take_turns(sides, gpu_step.Settings(peers=(), block=3, blocks=2), errors)
    assert set(times) == {"peer"} and times["peer"].shape == (6,) and all(side.stopped for side in sides)
    assert errors == {"ours": "MemoryError: RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes"}
    failed = rows_of(CASES["gpt2"], Measured(times, {"errors": errors}), "NVIDIA H200", True)
    assert len(failed) == 1 and not failed[0].met and "FAILED: MemoryError" in failed[0].measure


def test_times_are_between_ends_and_one_is_queued_ahead() -> None:
    side = Fake("ours")
    assert timed(side, 5).shape == (5,) and side._updates == 5


def test_a_config_that_fails_is_marked_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def sides(config: Any, *_: Any) -> list[Fake]:
        if config.model.kind == "bert":
            raise RuntimeError("no such kernel")
        return [Fake("ours"), Fake("peer", loss=6.0)]

    monkeypatch.setattr(gpu_step, "_sides", sides)
    monkeypatch.setattr(gpu_step, "rows_of", lambda *_: [])
    result = gpu_step.run(gpu_step.Settings(configs=("bert_base", "gpt2_xl"), peers=(), **TINY))
    assert result.facts["bert_base"]["errors"] == {"ours": "RuntimeError: no such kernel"}
    assert set(result.comparisons) == {"gpt2_xl"} and result.ratios == {}
    assert "over 1% apart" in result.facts["gpt2_xl"]["errors"]["peer"], "a side with another loss does other work"


def test_what_there_is_no_time_for_is_left_out() -> None:
    result = gpu_step.run(gpu_step.Settings(configs=("gpt2",), peers=(), minutes=1e-9, **TINY))
    assert "left out" in result.rows[0].measure and result.comparisons == {}
    result = gpu_ablation.run(gpu_ablation.Settings(ladders=("bert_base",), minutes=1e-9, trial=TRIAL))
    assert all("left out" in row.measure for row in result.rows)


def test_published_sizes_are_refused_on_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="needs a GPU"):
        gpu_step.run(gpu_step.Settings(peers=()))
    with pytest.raises(ConfigError, match="needs a GPU"):
        gpu_ablation.run(gpu_ablation.Settings())
    monkeypatch.setattr(gpu_step, "require", lambda *_, **__: None)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(ConfigError, match="XLA_PYTHON_CLIENT_PREALLOCATE is not 'false'"):
        gpu_step.check(gpu_step.Settings(trial=TRIAL))


# ---------------------------------------------------------------- ablation


@pytest.mark.parametrize(
    ("name", "rung"),
    [pytest.param("gpt2", 2, marks=pytest.mark.long), pytest.param("bert_base", 1, marks=pytest.mark.slow)],
)
def test_techniques_change_no_loss(name: str, rung: int) -> None:
    """Every rung computes the same function, BERT's with the head everywhere the same sum."""
    ladder = LADDERS[name]
    result = gpu_ablation.run(gpu_ablation.Settings(ladders=(name,), block=2, blocks=2, dtype="float32", trial=TRIAL))
    losses = [result.facts[name][rung.name]["loss"] for rung in ladder]
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-5)
    found, predicted = result.facts[name][ladder[rung].name], ladder[rung - 1].predicted / ladder[rung].predicted
    assert found["predicted_gain"] == pytest.approx(predicted) and {"gain", "missed", "bytes"} <= set(found)
    assert sum("gain" in row.measure for row in result.rows) == len(ladder) - 1


def test_what_is_taken_out_trains_alike_and_is_put_back() -> None:
    before = layers.layer_norm, blocks.Attention
    plain, ours = Rung("plain", None, {}, plain_norm=True, fused=True), Rung("ours", None, {})
    with without(plain):
        assert layers.layer_norm is plain_layer_norm and blocks.Attention is FusedAttention
    assert (layers.layer_norm, blocks.Attention) == before
    sides = [OnOneBatch(TRIAL.of(CASES["gpt2"]), rung, "float32") for rung in (plain, ours)]
    programs = [side._step.as_text() for side in sides]
    assert programs[0] != programs[1], "else nothing was taken out"
    losses = [[float(side.update()) for _ in range(3)] for side in sides]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and losses[0][2] < losses[0][0]


def test_a_gain_that_is_not_as_predicted_is_missed() -> None:
    rungs = (Rung("a", 100, {}), Rung("b", 50, {}), Rung("c", 40, {}), Rung("d", 30, {}))
    found: dict[str, Any] = {"a": {"ms": 90.0}, "b": {"ms": 60.0}, "c": {"ms": 48.0}, "d": {"error": "no memory"}}
    rows = gpu_ablation.rows_of("x", rungs, found, held=True)
    assert [row.met for row in rows if "gain" in row.measure] == [False, True]
    assert (found["b"]["missed"], found["c"]["missed"]) == (True, False) and "FAILED: no memory" in rows[-1].measure
    assert all(row.met for row in gpu_ablation.rows_of("x", rungs[:3], found, held=False)), "bars are of the H200"


# ---------------------------------------------------------------- ceilings and the command


def test_ceilings_from_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "ceilings.json"
    arguments = ["size=64", "chain=2", "copy_mib=1", "reduce_mib=1", "rounds=2", "warmup=1"]
    assert main(["ceilings", *arguments, "--platform", "cpu", "--allow-loaded", "--json", str(out)]) == 0
    record = json.loads(out.read_text())
    assert [row["unit"] for row in record["rows"]] == ["TFLOP/s", "GB/s", "GB/s"], "eight devices add up"
    assert all(row["value"] > 0 for row in record["rows"]) and "all-reduce" in capsys.readouterr().out
    assert os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"


def test_ceilings_compute_what_they_say() -> None:
    settings = ceilings.Settings(size=64, chain=3, copy_mib=1, reduce_mib=1)
    _, _, work, side = ceilings.gemm(settings)
    assert work == pytest.approx(3 * 2 * 64**3 / 1e12)
    x, w = (np.asarray(a, np.float32) for a in side.prepare())
    assert np.asarray(side.step(side.prepare()), np.float32) == pytest.approx(x @ w @ w @ w, abs=0.15)
    _, _, work, side = ceilings.copy(settings)
    original = side.prepare()
    copied = side.step(original)
    assert work == pytest.approx(2 * 2**20 / 1e9) and np.array_equal(copied, original)
    assert copied.unsafe_buffer_pointer() != original.unsafe_buffer_pointer()
    _, _, work, side = ceilings.all_reduce(settings)
    devices = len(jax.devices())
    assert work == pytest.approx(2 * (devices - 1) / devices * 2**20 / 1e9)
    assert (np.asarray(side.step(side.prepare())) == devices).all()


# ---------------------------------------------------------------- peers


def peers_of(name: str, compiled: bool, directory: Path) -> list[Any]:
    case = TRIAL.of(CASES[name])._replace(vocabulary=256)
    config = run_config(case, FP32, made_up_corpus(case, 3000, directory))
    return gpu_step._sides(config, open_batches(config, directory), ["compile" if compiled else "eager"])


@pytest.mark.parity
@pytest.mark.parametrize("name", ["gpt2", "bert_base"])
def test_peers_train_as_we_do(name: str, tmp_path: Path) -> None:
    """The same parameters, batches, optimizer and clipping: in fp32 every loss agrees."""
    pytest.importorskip("torch", reason="torch is not installed; pip install -e '.[parity]'")
    pytest.importorskip("transformers", reason="transformers is not installed; pip install -e '.[parity]'")
    ours, peer = peers_of(name, False, tmp_path)
    ours._restart = False
    ours.start()
    peer.start()
    for _ in range(2):  # the peer has warmed up
        ours.update()
    losses = [[float(ours.update()), float(peer.update()[0])] for _ in range(2)]
    assert peer.facts["loss"] == pytest.approx(ours.facts["loss"], rel=1e-5)
    assert losses == pytest.approx(np.repeat([[a] for a, _ in losses], 2, axis=1), rel=1e-4)
    ours.stop()
    peer.stop()


@pytest.mark.parity
@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2_xl", pytest.param("bert_large", marks=pytest.mark.long)])
def test_peers_compiled_layer_by_layer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed; pip install -e '.[parity]'")
    pytest.importorskip("transformers", reason="transformers is not installed; pip install -e '.[parity]'")
    monkeypatch.setattr(gpu_peers, "WHOLE_LAYERS", 0)
    torch._dynamo.utils.counters.clear()
    trial = Trial(**TRIAL.model_dump() | {"layers": 3})
    result = gpu_step.run(gpu_step.Settings(configs=(name,), **TINY | {"trial": trial}))
    facts = result.facts[name]
    assert facts["errors"] == {} and facts["compile"]["compiled"] == "layer by layer"
    assert set(result.ratios) == {"compile"}
    assert facts["compile"]["loss"] == pytest.approx(facts["ours"]["loss"], rel=0.01)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs <= 4, f"a layer is compiled once for all, not {graphs} times"
