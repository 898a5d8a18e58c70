"""What a run was trained on: the totals in the manifests of its corpora, as long as these are still there."""

from __future__ import annotations

from typing import Any

from etils import epath

from bertgpt_jax.corpus.mixture import CorpusMixture, open_prepared
from bertgpt_jax.errors import UserError
from bertgpt_jax.training import storage

Totals = dict[str, dict[str, int]]
"""Name of a corpus in its mixture (empty for one alone) -> documents, tokens, bytes, and those trained on."""

COUNTS = ("documents", "train_documents", "tokens", "train_tokens", "bytes", "train_bytes")


def corpus_totals(workdir: epath.Path, meta: dict[str, Any]) -> Totals:
    """The totals of the corpora of a checkpoint; {} where they are gone or hold something else by now.

    Args:
        meta: of the checkpoint; its data fingerprint must be the corpora's.
    """
    recorded = storage.read_json(workdir / "corpus.json")
    if meta.get("data_fingerprint") is None or not isinstance(recorded, dict):
        return {}
    try:
        corpus = open_prepared(recorded.get("path", ""))
    except UserError:
        return {}
    if corpus.fingerprint != meta["data_fingerprint"]:
        return {}
    readers = corpus.readers if isinstance(corpus, CorpusMixture) else {"": corpus}
    return {name: {n: reader.manifest["totals"][n] for n in COUNTS} for name, reader in readers.items()}
