"""Opening mixtures: one tokenizer for all, trained, lent or given; another one is refused."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from bertgpt_jax.config import identity
from bertgpt_jax.corpus.builder import open_corpus, prepare_corpus
from bertgpt_jax.corpus.config import CharactersConfig, CorpusConfig, HashSplit, WordPieceConfig
from bertgpt_jax.corpus.mixture import CorpusMixture, MixtureConfig, MixturePart, open_any, open_prepared
from bertgpt_jax.corpus.reader import CorpusReader
from bertgpt_jax.errors import ConfigError

OWN = {"workers": 0, "sentences": "none", "held_out": HashSplit(fraction=0.2)}


@pytest.fixture
def texts(tmp_path: Path) -> dict[str, CorpusConfig]:
    """Two texts; the second has fewer letters."""
    for name, letters in (("first", "abcdef"), ("second", "abc")):
        (tmp_path / f"{name}.txt").write_text("\n\n".join(letters * (i + 3) for i in range(20)))
    return {name: CorpusConfig(path=str(tmp_path / f"{name}.txt"), **OWN) for name in ("first", "second")}


def mixture(parts: dict[str, CorpusConfig], **more) -> MixtureConfig:
    described = tuple(MixturePart(name=name, corpus=part, weight=1 / len(parts)) for name, part in parts.items())
    return MixtureConfig(parts=described, **{"tokenizer": CharactersConfig(), **more})


def prepared(config: CorpusConfig, out: Path, tokenizer) -> CorpusConfig:
    own = CorpusConfig.model_validate(config.model_dump() | {"tokenizer": tokenizer})
    return CorpusConfig(path=str(prepare_corpus(own, out, progress=False)))


def test_the_tokenizer_is_trained_on_the_first_part(texts, tmp_path: Path) -> None:
    opened = open_any(mixture(texts), tmp_path / "cache", progress=False)
    assert isinstance(opened, CorpusMixture) and list(opened.readers) == ["first", "second"]
    letters = [opened.tokenizer.token(i) for i in range(opened.vocab_size)]
    assert set("abcdef") <= set(letters)
    assert opened.readers["second"].tokenizer.sha256 == opened.tokenizer.sha256
    alone = open_corpus(texts["second"].model_copy(update={"tokenizer": CharactersConfig()}), tmp_path / "c", False)
    assert alone.tokenizer.sha256 != opened.tokenizer.sha256, "the second text has other characters"
    assert (opened.special, opened.vocab_size) == (opened.readers["first"].special, opened.readers["first"].vocab_size)


def test_opening_again_changes_nothing(texts, tmp_path: Path) -> None:
    first = open_any(mixture(texts), tmp_path / "cache", progress=False)
    lines: list[str] = []
    again = open_any(mixture(texts), tmp_path / "cache", progress=lines.append)
    assert lines == [] and again.fingerprint == first.fingerprint
    elsewhere = open_prepared({name: str(reader.path) for name, reader in first.readers.items()})
    assert elsewhere.fingerprint == first.fingerprint
    renamed = open_any(mixture({"x": texts["first"], "second": texts["second"]}), tmp_path / "cache", progress=False)
    assert renamed.fingerprint != first.fingerprint
    assert isinstance(open_prepared(str(first.first.path)), CorpusReader)


def test_a_prepared_first_part_lends_its_tokenizer(texts, tmp_path: Path) -> None:
    first = prepared(texts["first"], tmp_path / "prepared", CharactersConfig())
    config = mixture({"first": first, "second": texts["second"]}, tokenizer=WordPieceConfig())
    opened = open_any(config, tmp_path / "cache", progress=False)
    assert opened.tokenizer.kind == "characters"
    assert opened.readers["second"].tokenizer.sha256 == CorpusReader(first.path).tokenizer.sha256
    both = {"first": first, "second": CorpusConfig(path=str(opened.readers["second"].path))}
    assert open_any(mixture(both), tmp_path / "none", progress=False).fingerprint == opened.fingerprint
    assert not (tmp_path / "none").exists()


def test_another_tokenizer_is_refused_with_both_hashes(texts, tmp_path: Path) -> None:
    parts = {name: prepared(text, tmp_path / name, CharactersConfig()) for name, text in texts.items()}
    with pytest.raises(ConfigError) as caught:
        open_any(mixture(parts), tmp_path / "cache", progress=False)
    message = str(caught.value)
    for name, part in parts.items():
        assert CorpusReader(part.path).tokenizer.sha256[:12] in message and f"'{name}'" in message
    assert "\n" not in message and f"tokenizer.path={tmp_path / 'first' / 'tokenizer'}" in message
    with pytest.raises(ConfigError, match="second"):  # the first one is trained, the second has another
        open_any(mixture({"first": texts["first"], "second": parts["second"]}), tmp_path / "cache", progress=False)


def test_a_given_tokenizer_is_that_of_all(texts, tmp_path: Path) -> None:
    lender = prepared(texts["second"], tmp_path / "lender", CharactersConfig())
    given = CharactersConfig(path=f"{lender.path}/tokenizer")
    opened = open_any(mixture(texts, tokenizer=given), tmp_path / "cache", progress=False)
    assert opened.tokenizer.sha256 == CorpusReader(lender.path).tokenizer.sha256
    other = prepared(texts["first"], tmp_path / "other", CharactersConfig())
    with pytest.raises(ConfigError, match=r"tokenizer\.path.*not the tokenizer"):
        open_any(mixture({"first": other}, tokenizer=given), tmp_path / "cache", progress=False)


def test_a_single_corpus_is_what_it_was(texts, tmp_path: Path) -> None:
    """Neither its identity nor what is read back of it knows of kinds."""
    assert "kind" not in identity(texts["first"])
    old = texts["first"].model_dump(mode="json")
    del old["kind"]
    assert CorpusConfig.model_validate(old) == texts["first"]
    config = texts["first"].model_copy(update={"tokenizer": CharactersConfig()})
    opened = open_any(config, tmp_path / "cache", progress=False)
    assert isinstance(opened, CorpusReader)
    assert opened.fingerprint == open_corpus(config, tmp_path / "cache", progress=False).fingerprint


def test_a_source_that_two_parts_split_differently_is_warned_of(texts, tmp_path: Path, caplog) -> None:
    again = CorpusConfig(path=texts["first"].path, **OWN | {"held_out": HashSplit(fraction=0.5)})
    with caplog.at_level(logging.WARNING):
        open_any(mixture(texts | {"copy": texts["first"]}), tmp_path / "cache", progress=False)
        assert caplog.messages == []
        for _ in range(2):
            open_any(mixture(texts | {"again": again}), tmp_path / "cache", progress=False)
    (line,) = caplog.messages
    assert "'first' and 'again' share 1 source files (first.txt), but not held_out: " in line
