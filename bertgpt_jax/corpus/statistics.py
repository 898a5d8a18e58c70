"""What a tokenised corpus holds: lengths, unknown and frequent tokens, duplicates, languages, sources."""

from __future__ import annotations

from typing import Any

import numpy as np

from bertgpt_jax.corpus.cleaning import LANGUAGE
from bertgpt_jax.corpus.reader import CorpusReader
from bertgpt_jax.corpus.view import SENTENCE_START


def corpus_statistics(reader: CorpusReader, top: int = 20) -> dict[str, Any]:
    """The statistics of a corpus, read shard by shard. Shares are of 1; terminators count nowhere.

    Args:
        top: how many of the most frequent tokens, and of the largest sources, are listed.

    Returns:
        `documents`, `held_out_documents`, `tokens`, `bytes`, `sentences`; `document_tokens`, `sentence_tokens`: see
        `spread`; `unknown_share` of tokens (None: no such token); `duplicate_share` of documents that equal an earlier
        one, by hash of their text; `languages`: share of documents where the source was filtered by language, else {};
        `sources`: share of tokens; `top_tokens`: `token`, `id`, `count`, `share`.
    """
    vocabulary = np.zeros(reader.vocab_size, np.int64)
    by_source = np.zeros(len(reader.manifest["sources"]["name"]), np.int64)
    documents, sentences, hashes = [], [], []
    for index in range(reader.num_shards):
        shard = reader.shard(index)
        ends, flags = shard.read("doc_end"), shard.read("flags")
        starts = np.concatenate([np.zeros(1, np.int64), ends[:-1] + 1])[: len(ends)]
        vocabulary += np.bincount(np.delete(shard.read("tokens"), ends), minlength=reader.vocab_size)
        documents.append(ends - starts)
        by_source += np.bincount(shard.read("doc_source"), ends - starts, len(by_source)).astype(np.int64)
        hashes.append(shard.read("doc_hash"))
        begins = np.flatnonzero(flags & SENTENCE_START)
        edges = np.union1d(begins, ends)
        sentences.append(edges[np.searchsorted(edges, begins, "right")] - begins)
    totals, count, tokens = reader.manifest["totals"], int(reader.documents.sum()), int(vocabulary.sum())
    unknown = reader.special.unk
    return {
        "documents": count,
        "held_out_documents": count - int(reader.train_documents.sum()),
        "tokens": tokens,
        "bytes": int(totals["bytes"]),
        "sentences": int(totals["sentences"]),
        "document_tokens": spread(np.concatenate(documents)),
        "sentence_tokens": spread(np.concatenate(sentences)),
        "unknown_share": None if unknown is None else int(vocabulary[unknown]) / max(tokens, 1),
        "duplicate_share": 1 - len(np.unique(np.concatenate(hashes))) / max(count, 1),
        "languages": languages(reader.manifest["cleaning"]),
        "sources": _largest(dict(zip(reader.manifest["sources"]["name"], by_source.tolist(), strict=True)), top),
        "top_tokens": _top_tokens(reader, vocabulary, top),
    }


def spread(lengths: np.ndarray) -> dict[str, Any]:
    """`mean`, `p10`, `median`, `p90`, `max` and `histogram`: {lower edge: count}, edges 0 and the powers of two."""
    if not len(lengths):
        return {"mean": 0.0, "p10": 0, "median": 0, "p90": 0, "max": 0, "histogram": {}}
    powers = np.where(lengths > 0, np.floor(np.log2(np.maximum(lengths, 1))).astype(np.int64), -1)
    found, counts = np.unique(powers, return_counts=True)
    p10, median, p90 = (int(v) for v in np.percentile(lengths, (10, 50, 90), method="lower"))
    return {
        "mean": float(lengths.mean()),
        "p10": p10,
        "median": median,
        "p90": p90,
        "max": int(lengths.max()),
        "histogram": {
            int(2**power) if power >= 0 else 0: int(n) for power, n in zip(found.tolist(), counts.tolist(), strict=True)
        },
    }


def languages(cleaning: dict[str, int]) -> dict[str, float]:
    """Language to its share of the documents kept, from the counts of cleaning."""
    counts = {name.removeprefix(LANGUAGE): n for name, n in cleaning.items() if name.startswith(LANGUAGE)}
    return _largest(counts, len(counts))


def _largest(counts: dict[str, int], top: int) -> dict[str, float]:
    """The largest of some counts as shares of all."""
    whole = max(sum(counts.values()), 1)
    return {name: n / whole for name, n in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:top] if n}


def _top_tokens(reader: CorpusReader, vocabulary: np.ndarray, top: int) -> list[dict[str, Any]]:
    order = np.argsort(-vocabulary, kind="stable")[:top]
    whole = max(int(vocabulary.sum()), 1)
    return [
        {"token": reader.tokenizer.token(i), "id": i, "count": int(vocabulary[i]), "share": int(vocabulary[i]) / whole}
        for i in order.tolist()
        if vocabulary[i]
    ]
