"""Reading tokenised corpora."""

from __future__ import annotations

from bertgpt_jax.corpus.view import SENTENCE_START, WORD_START, Corpus, InMemoryCorpus

__all__ = ["SENTENCE_START", "WORD_START", "Corpus", "InMemoryCorpus"]
