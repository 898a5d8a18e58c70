"""Trackers: what Weights & Biases is told, and that its troubles stay its own."""

from __future__ import annotations

import logging
import sys
import types

import pytest
from etils import epath

from bertgpt_jax.errors import ConfigError
from bertgpt_jax.training.metrics import MetricWriter
from bertgpt_jax.training.rows import read_rows
from bertgpt_jax.training.trackers import check_wandb


class FakeRun:
    def __init__(self, fail: bool):
        self.logged, self.metrics, self.finished, self.fail = [], [], False, fail

    def define_metric(self, *names, **settings):
        self.metrics.append((names, settings))

    def log(self, values):
        if self.fail:
            raise ConnectionError("no route to host")
        self.logged.append(values)

    def finish(self):
        self.finished = True


@pytest.fixture
def fake_wandb(monkeypatch):
    """A module `wandb` that records how it is called; `.fail` makes every log raise."""
    module = types.ModuleType("wandb")
    module.fail, module.inits, module.runs = False, [], []

    def init(**settings):
        module.inits.append(settings)
        module.runs.append(FakeRun(module.fail))
        return module.runs[-1]

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def run_once(workdir, restored=None):
    writer = MetricWriter(workdir, restored_step=restored, tensorboard=False, wandb_project="project")
    writer.log(3, {"train/loss": 2.0, "eval/loss": float("nan")}, {"throughput/tokens_per_second": 7.0})
    writer.close()


def test_values_rates_and_the_step_axis_arrive(fake_wandb, tmp_path):
    run_once(epath.Path(tmp_path))
    run = fake_wandb.runs[0]
    assert run.logged == [
        {"train/loss": 2.0, "global_step": 3},
        {"throughput/tokens_per_second": 7.0, "global_step": 3},
    ]
    assert (("*",), {"step_metric": "global_step"}) in run.metrics and run.finished


def test_a_resumed_workdir_is_the_same_run(fake_wandb, tmp_path):
    run_once(epath.Path(tmp_path))
    run_once(epath.Path(tmp_path), restored=2)
    first, second = fake_wandb.inits
    assert first["id"] == second["id"] and second["resume"] == "allow"


def test_its_failure_is_one_warning_and_the_rows_are_whole(fake_wandb, tmp_path, caplog):
    fake_wandb.fail = True
    with caplog.at_level(logging.WARNING):
        run_once(epath.Path(tmp_path))
    assert [r.getMessage() for r in caplog.records if "no route to host" in r.getMessage()][0].endswith("goes on")
    assert read_rows(epath.Path(tmp_path), "metrics")[0]["train/loss"] == 2.0


def test_asking_for_it_without_it_installed_is_refused(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"project.*bertgpt_jax\[wandb\]"):
        check_wandb("project")
    check_wandb(None)
