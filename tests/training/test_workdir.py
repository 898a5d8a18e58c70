"""What a run keeps beside its workdir."""

from __future__ import annotations

from pathlib import Path

import jax
import pytest
from etils import epath

from bertgpt_jax.config import load_config
from bertgpt_jax.training.run_config import RunConfig
from bertgpt_jax.training.workdir import use_compilation_cache

TINY = str(Path(__file__).parent.parent / "faults" / "tiny.py")

pytestmark = pytest.mark.usefixtures("cache_untold")


def chosen(workdir: str | Path, *changes: str) -> str | None:
    use_compilation_cache(load_config(TINY, RunConfig, list(changes)), epath.Path(str(workdir)))
    return jax.config.jax_compilation_cache_dir


def test_programs_are_kept_beside_the_workdir_where_nobody_else_can_put_any(tmp_path: Path) -> None:
    kept = tmp_path / "runs" / ".compiled"
    assert chosen(tmp_path / "runs" / "one") == str(kept)
    assert kept.is_dir() and kept.stat().st_mode & 0o777 == 0o700
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 0.5


def test_a_cache_that_jax_was_told_of_is_left_alone(tmp_path: Path) -> None:
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "theirs"))
    assert chosen(tmp_path / "run") == str(tmp_path / "theirs")
    assert not list(tmp_path.iterdir())


def test_a_remote_workdir_and_off_have_none(tmp_path: Path) -> None:
    assert chosen("gs://bucket/run") is None
    assert chosen(tmp_path / "run", "execution.compilation_cache=off") is None
    assert not list(tmp_path.iterdir())


def test_a_directory_that_cannot_be_made_stops_no_run_that_did_not_ask_for_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert chosen(tmp_path / "file" / "run") is None


def programs(directory: Path) -> Path | None:
    config = load_config(TINY, RunConfig, [f"execution.compilation_cache={directory}"])
    return use_compilation_cache(config, epath.Path(str(directory.parent / "run")))


def test_whole_programs_lie_only_where_nobody_else_may_write(tmp_path: Path, with_the_cache: None) -> None:
    assert programs(tmp_path / "mine") == tmp_path / "mine" / "programs"
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours").chmod(0o775)
    assert programs(tmp_path / "ours") is None and jax.config.jax_compilation_cache_dir == str(tmp_path / "ours")
    jax.config.update("jax_enable_compilation_cache", False)  # as on meshes that may read no program
    assert programs(tmp_path / "mine") is None
