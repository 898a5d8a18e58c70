"""What every test process gets: eight CPU devices, a shared compilation cache, slow tests on demand, the real data."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from bertgpt_jax.training import heap

DEVICES = 8


def _compilation_cache() -> str | None:
    """A directory private to this user (it holds programs that jax runs), or None if its owner is someone else."""
    user = os.getuid() if hasattr(os, "getuid") else "user"
    cache = Path(tempfile.gettempdir()) / f"bertgpt_jax-tests-{user}"
    cache.mkdir(mode=0o700, exist_ok=True)
    if hasattr(os, "getuid") and (cache.stat().st_uid != os.getuid() or cache.stat().st_mode & 0o077):
        return None
    return str(cache)


def _prepare_environment() -> None:
    """Sets what jax reads at import, so that test modules and the processes they start can simply import it."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_force_host_platform_device_count" not in flags:
        # eight devices on two busy cores may keep each other waiting for longer than XLA's 40 seconds
        patience = "--xla_cpu_collective_call_terminate_timeout_seconds=600"
        # half of the tests' CPU time would go into making code fast that runs for milliseconds
        haste = "" if "xla_backend_optimization_level" in flags else "--xla_backend_optimization_level=0"
        mine = f"--xla_force_host_platform_device_count={DEVICES} {patience} {haste}"
        os.environ["XLA_FLAGS"] = f"{flags} {mine}".strip()
    cache = _compilation_cache()
    if cache and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = cache
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")


_prepare_environment()

# Runs change malloc for the life of their process; this one goes on to compile hundreds of programs.
heap.keep_freed_memory = lambda: None

# The same examples in every run, and no verdict on how long one takes: the machines that run this are small and busy.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-slow", action="store_true", help="also run the tests marked slow or long")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselects slow and long tests unless `--run-slow` or a `-m` expression that names a marker asks for a choice."""
    if config.getoption("--run-slow") or re.search(r"\b(slow|long)\b", config.getoption("-m")):
        return
    left_out = [item for item in items if item.get_closest_marker("slow") or item.get_closest_marker("long")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]


@pytest.fixture
def with_the_cache() -> Iterator[None]:
    """The compilation cache is on again afterwards, whatever a mesh did to it (`parallel.mesh.make_mesh`)."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


@pytest.fixture
def cache_untold() -> Iterator[None]:
    """jax as if nobody had told it of a cache; as it was, afterwards."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    names = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()  # jax looks at the setting once
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture
def compiled_afresh(with_the_cache: None) -> None:
    """No program is read from the cache, as on meshes of CPUs that share sequences."""
    from bertgpt_jax.parallel.mesh import MeshConfig, make_mesh

    make_mesh(MeshConfig(context=DEVICES))


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data(repository: Path) -> Path:
    """The directory of real data beside the checkout, or `BERTGPT_TEST_DATA`; skips where there is none."""
    given = os.environ.get("BERTGPT_TEST_DATA")
    folder = Path(given) if given else repository.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set BERTGPT_TEST_DATA")
    return folder


@pytest.fixture(scope="session")
def tfds_data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A TFDS data directory with `made_up/plain:1.0.0` in ArrayRecord files, built here without TensorFlow.

    `train` has 100 examples in 4 files, `test` 10 in 4: {"text": "Example N.\\nIts second line.", "language": "en" or
    "de" by turns, "number": N}, N from 0 on through both; TFDS shuffles them by its own hash.
    """
    import numpy as np
    import tensorflow_datasets as tfds
    from etils import epath

    folder = tmp_path_factory.mktemp("tfds")

    class MadeUp(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="plain", version="1.0.0", description="made up")]
        pkg_dir_path = epath.Path(folder)

        def _info(self):
            text = tfds.features.Text()
            features = {"text": text, "language": text, "number": tfds.features.Scalar(np.int32)}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(0, 100), "test": self._generate_examples(100, 110)}

        def _generate_examples(self, lo, hi):
            for n in range(lo, hi):
                text = f"Example {n}.\nIts second line."
                yield n, {"text": text, "language": ("en", "de")[n % 2], "number": n}

    builder = MadeUp(config="plain", data_dir=folder / "data", file_format="array_record")
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=4))
    return folder / "data"
