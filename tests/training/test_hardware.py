"""8-bit products where there are none: one line before anything is compiled, or emulated when asked."""

from __future__ import annotations

import logging
import types
from pathlib import Path

import jax
import pytest

from bertgpt_jax.commands import train
from bertgpt_jax.config import identity
from bertgpt_jax.corpus.config import CorpusConfig
from bertgpt_jax.errors import ConfigError
from bertgpt_jax.models.gpt import GptConfig
from bertgpt_jax.nn.blocks import ComputeConfig
from bertgpt_jax.objectives.causal_lm import CausalLM
from bertgpt_jax.parallel.mesh import MeshConfig, make_mesh
from bertgpt_jax.training import hardware, setup
from bertgpt_jax.training.hardware import check_fp8, peak_flops, warn_fp8
from bertgpt_jax.training.run_config import ExecutionConfig, RunConfig, StageConfig, execution_here
from bertgpt_jax.training.schedules import Constant


def device(platform: str, kind: str, capability: str | None = None) -> types.SimpleNamespace:
    extra = {} if capability is None else {"compute_capability": capability}
    return types.SimpleNamespace(platform=platform, device_kind=kind, **extra)


def fp8(platform: str, **settings) -> ComputeConfig:
    return ComputeConfig(matmul="fp8", platform=platform, **settings)


@pytest.mark.parametrize(
    ("platform", "where", "reason"),
    [
        ("cpu", device("cpu", "cpu"), "not a CPU"),
        ("tpu", device("tpu", "TPU v6 lite"), "not a TPU"),
        ("gpu", device("gpu", "NVIDIA A100-SXM4-80GB", "8.0"), "this one's is 8.0"),
        ("gpu", device("gpu", "AMD Instinct MI250X", "gfx90a"), "this one's is gfx90a"),
        ("gpu", device("cuda", "NVIDIA something"), "this one's is unknown"),
    ],
    ids=["cpu", "tpu", "a100", "rocm", "unknown"],
)
def test_devices_without_8_bit_products_are_refused(platform: str, where, reason: str) -> None:
    fix = "use same, or set execution.compute.emulate=true"
    with pytest.raises(ConfigError, match=f"matmul = 'fp8' on {where.device_kind}: .*8.9 or later, .*{reason}; {fix}"):
        check_fp8(fp8(platform), where)
    check_fp8(fp8(platform, emulate=True), where)
    check_fp8(ComputeConfig(platform=platform), where)


def test_devices_with_them_and_stand_ins_are_not(caplog: pytest.LogCaptureFixture) -> None:
    for capability in ("8.9", "9.0", "10.0", "12.0"):
        check_fp8(fp8("gpu"), device("gpu", "NVIDIA H200", capability))
    check_fp8(fp8("gpu"), device("cpu", "cpu"))  # a plan's, for GPUs that are not here
    assert not caplog.records


def test_a_small_model_is_warned_once(caplog: pytest.LogCaptureFixture) -> None:
    hardware._warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        for parameters in (124_000_000, 124_000_000, 10**9):
            warn_fp8(fp8("gpu"), parameters)
        warn_fp8(ComputeConfig(), 10**6)
    (record,) = caplog.records
    assert "'fp8' with 124,000,000 parameters: below 1,000,000,000" in record.getMessage()


def test_peaks() -> None:
    assert peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("TPU v5 lite") == 197e12
    assert peak_flops("cpu") is None


# ---------------------------------------------------------------- in a run


def config_of(**compute) -> RunConfig:
    return RunConfig(
        corpus=CorpusConfig(path="unused"),
        model=GptConfig(
            vocab_size=32, max_positions=16, num_layers=2, hidden_size=16, num_heads=2, intermediate_size=32
        ),
        objective=CausalLM(),
        stages=(StageConfig(steps=5, sequence_length=16, batch_size=16, schedule=Constant(peak=1e-3)),),
        execution=ExecutionConfig(compute=ComputeConfig(**{"unroll_layers": False} | compute)),
    )


def test_it_is_refused_before_anything_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "lower_train_step", None)
    with pytest.raises(ConfigError, match="execution.compute.matmul = 'fp8' on cpu"):
        setup.make_program(config_of(matmul="fp8"), make_mesh(MeshConfig(), jax.devices()[:1]))


def test_a_run_stops_with_78_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    workdir = tmp_path / "run"
    code = train.main(["quickstart", "--workdir", str(workdir), "execution.compute.matmul=fp8"])
    said = capsys.readouterr().err
    assert code == 78 and "execution.compute.matmul = 'fp8' on cpu" in said and said.count("\n") == 1
    assert not workdir.exists()


def test_the_dry_run_shows_it(capsys: pytest.CaptureFixture[str]) -> None:
    dry = ["quickstart", "--dry-run", "execution.compute.matmul=fp8", "execution.compute.emulate=true"]
    assert train.main(dry) == 0
    shown = capsys.readouterr().out
    assert "matmul       fp8: the layers' linear maps, emulated where the device has none; the rest in" in shown
    assert train.main(dry[:2]) == 0
    assert "fp8" not in capsys.readouterr().out


def test_it_is_no_part_of_the_identity_and_evaluation_does_without() -> None:
    config = config_of(matmul="fp8")
    assert identity(config) == identity(config_of())
    assert execution_here(config)["compute"] == config_of().execution.compute.model_dump(mode="json")
