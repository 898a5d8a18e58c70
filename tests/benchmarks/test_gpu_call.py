"""The one call for a GPU, at tiny sizes on the CPU: its checks tell right from wrong, its parts keep to their time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bertgpt_jax.benchmarks import gpu, gpu_checks
from bertgpt_jax.benchmarks.gpu_cases import Trial
from bertgpt_jax.benchmarks.gpu_checks import LEAST, WORST, LeftOut, Outputs, errors_of, judged
from bertgpt_jax.commands.benchmark import main
from bertgpt_jax.errors import ConfigError

TINY = gpu_checks.Settings(rows=4, length=128, heads=1, widths=(64,), hidden=32, vocabulary=128)
TRIAL = Trial(layers=1, hidden=32, heads=2, vocabulary=256, length=32, rows=4)


# ---------------------------------------------------------------- judging


def test_an_error_is_that_of_a_vector_over_its_length() -> None:
    exact = np.array([[3.0, 4.0], [6.0, 8.0]])
    found, plain = exact.copy(), exact.copy()
    found[1] += [0.6, 0.8]
    plain[0] += [0.03, 0.04]
    errors = errors_of(found, exact, plain)
    assert errors["largest"] == pytest.approx(0.1), "1 of 10"
    assert errors["plain"] == pytest.approx(0.05 / np.sqrt((25 + 100) / 2)), "short vectors count as average ones"
    assert errors["allowed"] == pytest.approx(max(4 * errors["plain"], LEAST))
    found[0, 0] = np.nan
    assert errors_of(found, exact, plain)["largest"] == WORST
    assert errors_of(np.array(2.0), np.array(1.0), np.array(1.0))["largest"] == 1.0


def outputs(off: float) -> Outputs:
    exact = [np.ones((2, 3)), np.ones(4)]
    return Outputs(("output", "gradient"), [exact[0], exact[1] + off], exact, [x + 1e-3 for x in exact])


def test_checks_pass_fail_break_or_are_left_out() -> None:
    def left_out() -> Outputs:
        raise LeftOut("there is no such kernel")

    def broken() -> Outputs:
        raise RuntimeError("CUDNN_STATUS_NOT_SUPPORTED\nand a long story")

    assert judged(lambda: outputs(0.01))["status"] == "passed"
    failed = judged(lambda: outputs(0.05))
    assert failed["status"] == "failed" and failed["why"].startswith("gradient is off by 0.05, over 0.016")
    assert set(failed["errors"]) == {"output", "gradient"}
    assert judged(left_out) == {"status": "left out", "why": "there is no such kernel"}
    assert judged(broken) == {"status": "failed", "why": "RuntimeError: CUDNN_STATUS_NOT_SUPPORTED"}


def test_what_failed_is_told_after_everything_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checks = [("a kernel", lambda: outputs(0.05)), ("another", lambda: outputs(0.0))]
    monkeypatch.setattr(gpu_checks, "checks", lambda _: iter(checks))
    out = tmp_path / "checks.json"
    assert main(["gpu_checks", "--platform", "cpu", "--allow-loaded", "--json", str(out)]) == 1
    found = json.loads(out.read_text())
    assert found["facts"]["another"]["status"] == "passed" and found["failures"][0].startswith("a kernel: gradient")
    assert [row["value"] for row in found["rows"]] == [1, pytest.approx(0.05 / LEAST), 0.0]
    said = capsys.readouterr()
    assert "error: benchmark gpu_checks found failures: a kernel" in said.err and "MISSED" in said.out


# ---------------------------------------------------------------- what is checked


@pytest.fixture(scope="module")
def all_checks() -> dict[str, Any]:
    """What becomes of every check on the CPU."""
    return gpu_checks.run(TINY).facts


def test_what_needs_a_gpu_is_left_out_with_its_reason(all_checks: dict[str, Any]) -> None:
    kinds = {name.rpartition("heads of 64, ")[2]: found for name, found in all_checks.items() if "cudnn" in name}
    assert set(kinds) == set(gpu_checks.masks(TINY))
    assert all(found["status"] == "left out" and "runs on gpu, not on cpu" in found["why"] for found in kinds.values())
    eight = all_checks["products of 8-bit operands"]
    assert eight["status"] == "left out" and "compute capability 8.9" in eight["why"]


def test_the_head_in_chunks_is_checked_anywhere(all_checks: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    found = all_checks["vocabulary head in chunks"]
    assert found["status"] == "passed" and len(found["errors"]) == 3
    right = gpu_checks.linear_cross_entropy

    def wrong(x: Any, table: Any, *rest: Any, **more: Any) -> Any:
        return right(x, table * 1.1, *rest, **more)

    monkeypatch.setattr(gpu_checks, "linear_cross_entropy", wrong)
    found = judged(lambda: gpu_checks.chunked_head(TINY))
    assert found["status"] == "failed" and "gradient of x" in found["why"]


def test_masks_have_rows_of_nothing() -> None:
    masks = gpu_checks.masks(TINY)
    assert masks["padded rows"].lengths_B[0] == 128 and masks["padded rows"].lengths_B[-1] == 0
    packed = np.asarray(masks["packed rows"].q_segments_BT)
    assert packed[0].min() == 1 and packed.max() == 3 and not packed[-1].any()
    blind = ~np.asarray(masks["queries without a key"].to_array(128, 128)).any(-1)
    assert blind.any() and not blind.all()


@pytest.mark.slow
@pytest.mark.parametrize("what", ["padded rows", "packed rows, causal", "queries without a key"])
def test_an_emulated_kernel_passes_and_a_wrong_one_fails(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = TINY.model_copy(update={"emulate": True})
    assert judged(lambda: gpu_checks.attention(settings, "splash", 64, what))["status"] == "passed"
    right = gpu_checks.dot_product_attention

    def wrong(q: Any, k: Any, v: Any, mask: Any, choice: Any) -> Any:
        out = right(q, k, v, mask, choice=choice._replace(wanted="reference"))
        return out if choice.wanted == "reference" else out.at[0, 10].multiply(1.1)

    monkeypatch.setattr(gpu_checks, "dot_product_attention", wrong)
    found = judged(lambda: gpu_checks.attention(settings, "splash", 64, what))
    assert found["status"] == "failed" and found["why"].startswith("output is off by 0.")


def test_products_of_8_bits_equal_their_emulation_or_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_checks, "check_fp8", lambda *_: None)
    found = judged(lambda: gpu_checks.eight_bits(TINY))
    assert found["status"] == "passed" and found["errors"]["product"]["largest"] > 0
    right, calls = gpu_checks.products, []

    def wrong(*arguments: Any) -> Any:
        calls.append(arguments)
        product, *gradients = right(*arguments)
        return [product.at[3].multiply(2), *gradients] if len(calls) == 1 else [product, *gradients]

    monkeypatch.setattr(gpu_checks, "products", wrong)
    found = judged(lambda: gpu_checks.eight_bits(TINY))
    assert found["status"] == "failed" and found["why"].startswith("product is off by")


# ---------------------------------------------------------------- the call


def test_what_does_not_fit_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, asked = [0.0], {}

    def called(part: gpu.Part, _: Path, left: float) -> dict[str, Any]:
        asked[part.name] = part.settings
        clock[0] += {"gpu_checks": 40.0, "ceilings": 20.0, "gpu_step": 480.0}[part.name]
        return {"rows": [{"measure": part.name, "value": 1.0, "unit": "s"}], "ratios": {"a": 2.0}, "seconds": 1.0}

    monkeypatch.setattr(gpu, "called", called)
    monkeypatch.setattr(gpu, "now", lambda: clock[0])
    result = gpu.run(gpu.Settings(trial=TRIAL, step={"peers": ()}))
    assert list(asked) == ["gpu_checks", "ceilings", "gpu_step"] and asked["gpu_step"].trial == TRIAL
    assert asked["gpu_step"].minutes == pytest.approx((500 - 10 - 130 - 60) / 60), "the ablation's time is kept for it"
    assert result.facts["gpu_ablation"] == {"left_out": "20 of 560 seconds were left"} and result.failures == ()
    assert result.rows[-1].measure == "gpu_ablation: LEFT OUT" and result.ratios == {"a": 2.0}


def test_all_parts_fit_into_ten_minutes() -> None:
    settings = gpu.Settings()
    assert settings.seconds < 600
    left = settings.seconds - 80
    step = gpu.plan(settings, left)[2]
    left -= gpu.START + 60 * step.settings.minutes + gpu.LONGEST
    ablation = gpu.plan(settings, left)[3]
    assert left >= ablation.least and step.settings.minutes > 4 and ablation.settings.minutes >= 1


def test_a_part_that_breaks_or_fails_leaves_the_others() -> None:
    step = {"rows": [], "comparisons": {"gpt2": {}}, "ratios": {"gpt2: compile": 1.2}, "facts": {"a": 1}}
    checks = {"rows": [], "failures": ["a kernel: it is off"], "seconds": 1.0}
    result = gpu.joined({"gpu_checks": checks, "ceilings": {"error": "ended with -11: so it goes"}, "gpu_step": step})
    assert result.failures == ("gpu_checks: a kernel: it is off", "ceilings ended with -11: so it goes")
    assert set(result.comparisons) == {"gpu_step: gpt2"} and result.facts["gpu_step"]["facts"] == {"a": 1}
    assert result.ratios == {"gpt2: compile": 1.2} and result.rows[0].measure == "ceilings: FAILED"


def test_a_process_that_dies_or_hangs_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = gpu.Part("ceilings", gpu.Settings().ceilings, 1.0)
    monkeypatch.setattr(gpu, "BENCHMARK", "print('so it goes'); raise SystemExit(3)")
    assert gpu.called(part, tmp_path, 60.0)["error"] == "ended with 3: so it goes"
    monkeypatch.setattr(gpu, "BENCHMARK", "import time; print('wait', flush=True); time.sleep(60)")
    assert gpu.called(part, tmp_path, 2.0)["error"] == "cut off after 2 seconds: wait"


def test_published_sizes_are_refused_on_cpus() -> None:
    with pytest.raises(ConfigError, match="needs a GPU"):
        gpu.run(gpu.Settings(step={"peers": ()}))


@pytest.mark.slow
def test_one_call_does_it_all(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    trial = [f"trial.{name}={value}" for name, value in TRIAL.model_dump().items()]
    small = ["checks.length=32", "checks.hidden=32", "checks.vocabulary=128", "checks.widths=[64]", "ceilings.size=64"]
    small += ["ceilings.copy_mib=1", "ceilings.reduce_mib=1", "ceilings.rounds=2", "step.peers=[]", "step.block=2"]
    small += ['step.configs=["gpt2"]', "step.words=3000", 'ablation.ladders=["bert_base"]', "ablation.block=2"]
    arguments = ["gpu", *trial, *small, "--platform", "cpu", "--allow-loaded", "--json", str(out)]
    assert main(arguments) == 0
    found = json.loads(out.read_text())
    parts = found["facts"]
    assert list(parts) == ["gpu_checks", "ceilings", "gpu_step", "gpu_ablation"] and found["failures"] == []
    assert all("facts" in part and part["seconds"] > 0 for part in parts.values())
    assert parts["gpu_checks"]["facts"]["vocabulary head in chunks"]["status"] == "passed"
    assert {"ceilings: gemm", "gpu_step: gpt2", "gpu_ablation: bert_base"} <= set(found["comparisons"])
    assert any(row["unit"] == "TFLOP/s" for row in found["rows"])
