"""What a run keeps in and beside its workdir, other than checkpoints and metrics."""

from __future__ import annotations

import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

import jax
from etils import epath

import bertgpt_jax
from bertgpt_jax.config import to_json
from bertgpt_jax.corpus.mixture import CorpusMixture, open_any
from bertgpt_jax.corpus.reader import CorpusReader
from bertgpt_jax.errors import StorageError
from bertgpt_jax.parallel import distributed
from bertgpt_jax.training import processes, resume, storage
from bertgpt_jax.training.run_config import RunConfig


def cache_root(workdir: epath.Path) -> Path:
    """Where prepared corpora and row indexes are kept: beside the workdir, or in the user's cache for a remote one."""
    if storage.is_local(workdir):
        return Path(workdir).parent / "corpora"
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "bertgpt_jax" / "corpora"


def open_run_corpus(config: RunConfig, workdir: epath.Path) -> CorpusReader | CorpusMixture:
    """The run's tokenised corpora, prepared by the first process where they are not there yet.

    Raises:
        ConfigError: processes that opened different ones, naming one that differs.
    """
    root = cache_root(workdir)
    if jax.process_count() > 1:
        processes.on_primary(lambda: open_any(config.corpus, root).fingerprint)
    corpus = processes.everywhere(open_any, config.corpus, root)
    distributed.agree({"tokenizer": corpus.tokenizer.sha256, "corpus": corpus.fingerprint})
    return corpus


def use_compilation_cache(config: RunConfig, workdir: epath.Path) -> Path | None:
    """Keeps compiled programs beside a local workdir, or where the config says; directories of ours are private.

    `auto` leaves a directory that jax was told of (JAX_COMPILATION_CACHE_DIR) as it is.

    Returns:
        where whole programs of this run may lie (`kept`): in a local directory that nobody else may write, if jax may
        use it. They are run as they are read.
    """
    where = config.execution.compilation_cache
    chosen = where not in ("auto", "off")
    if where == "off" or not chosen and (jax.config.jax_compilation_cache_dir or not storage.is_local(workdir)):
        return None
    path = storage.workdir_path(where) if chosen else epath.Path(Path(workdir).parent / ".compiled")
    if storage.is_local(path):
        path = Path(path)  # epath has no mode
        try:
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:  # a run does not need it, unless it was asked for
            if chosen:
                raise StorageError(f"execution.compilation_cache = '{where}' cannot be made: {error}") from None
            return None
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    mine = isinstance(path, Path) and _is_mine(path)
    return path / "programs" if mine and jax.config.jax_enable_compilation_cache else None


def _is_mine(directory: Path) -> bool:
    """Whether a directory belongs to this user and nobody else may write into it."""
    found = directory.stat()
    return hasattr(os, "getuid") and found.st_uid == os.getuid() and not found.st_mode & 0o022


def write_description(
    workdir: epath.Path, config: RunConfig, identity: dict[str, Any], corpus: CorpusReader | CorpusMixture
) -> None:
    """config.json, identity.json, corpus.json, env.json and the tokenizer."""
    readers = corpus.readers if isinstance(corpus, CorpusMixture) else {"": corpus}
    paths = {name: str(reader.path) for name, reader in readers.items()}
    storage.write_text(workdir / resume.CONFIG_FILE, to_json(config))
    storage.write_json(workdir / resume.IDENTITY_FILE, identity)
    storage.write_json(
        workdir / "corpus.json",
        {"path": paths.get("", paths), "fingerprint": corpus.fingerprint, "tokenizer_sha256": corpus.tokenizer.sha256},
    )
    for name, content in corpus.tokenizer.files.items():
        storage.write_bytes(workdir / "tokenizer" / name, content)
    storage.write_json(workdir / "env.json", environment())


def environment() -> dict[str, Any]:
    """Versions, devices and the command line, credentials in addresses removed."""
    return {
        "bertgpt_jax": bertgpt_jax.__version__,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "devices": [str(device) for device in jax.devices()[:8]],
        "device_count": jax.device_count(),
        "process_count": jax.process_count(),
        "command": [re.sub(r"//[^/@\s]+@", "//***@", word) for word in sys.argv],
    }
