"""Totals of a run's corpora for its exports."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from etils import epath

from bertgpt_jax.corpus.builder import prepare_corpus
from bertgpt_jax.corpus.config import CharactersConfig, CorpusConfig
from bertgpt_jax.corpus.mixture import open_prepared
from bertgpt_jax.transfer.trained_on import corpus_totals


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    """The corpus.json of a run, and beside it the corpus it names."""
    (tmp_path / "text.txt").write_text("\n\n".join(f"line {i}" for i in range(30)))
    setting = CorpusConfig(path=str(tmp_path / "text.txt"), tokenizer=CharactersConfig(), workers=0)
    prepare_corpus(setting, tmp_path / "corpus", progress=False)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "corpus.json").write_text(json.dumps({"path": str(tmp_path / "corpus")}))
    return tmp_path / "run"


def test_the_totals_are_those_of_the_corpus_that_was_trained_on(workdir: Path) -> None:
    corpus = open_prepared(str(workdir.parent / "corpus"))
    totals = corpus_totals(epath.Path(workdir), {"data_fingerprint": corpus.fingerprint})[""]
    assert (totals["documents"], totals["bytes"]) == (30, sum(len(f"line {i}") for i in range(30)))
    assert totals["train_tokens"] == int(corpus.train_tokens.sum()) < totals["tokens"]
    for meta in ({"data_fingerprint": "of another"}, {"data_fingerprint": None}, {}):
        assert corpus_totals(epath.Path(workdir), meta) == {}
    both = {name: str(workdir.parent / "corpus") for name in ("a", "b")}
    (workdir / "corpus.json").write_text(json.dumps({"path": both}))
    fingerprint = open_prepared(both).fingerprint
    assert corpus_totals(epath.Path(workdir), {"data_fingerprint": fingerprint}) == {"a": totals, "b": totals}


def test_a_corpus_that_is_gone_is_left_out(workdir: Path) -> None:
    corpus = open_prepared(str(workdir.parent / "corpus"))
    (workdir.parent / "corpus" / "manifest.json").unlink()
    assert corpus_totals(epath.Path(workdir), {"data_fingerprint": corpus.fingerprint}) == {}
