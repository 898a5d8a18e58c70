"""One shard: its documents read, cleaned, split, tokenised, ordered and written; pure in plan and shard number."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from bertgpt_jax.corpus.chinese import join_words
from bertgpt_jax.corpus.cleaning import LANGUAGE, clean
from bertgpt_jax.corpus.config import CorpusConfig, HashSplit
from bertgpt_jax.corpus.files import check_unchanged
from bertgpt_jax.corpus.places import Place
from bertgpt_jax.corpus.plan import Plan
from bertgpt_jax.corpus.sentences import split_sentences
from bertgpt_jax.corpus.sources import WRAPPED_FORMATS, RawDocument, read_documents
from bertgpt_jax.corpus.store import shard_name, token_dtype, write_shard
from bertgpt_jax.corpus.tokenizer import Tokenizer
from bertgpt_jax.corpus.view import ragged_index
from bertgpt_jax.errors import DataError

_BATCH_CHARACTERS = 500_000
"""Text tokenised at a time."""
_BLOCK_TOKENS = 1 << 20
_MASK = (1 << 64) - 1


class Document:
    """A cleaned document on one side of the split.

    Attributes:
        text, sentences: the text, and its cut into sentences.
        held_out: which side.
        source, offset: row of the plan's files and position there.
        hash: first 8 bytes of the blake2b of the text.
    """

    __slots__ = ("hash", "held_out", "offset", "sentences", "source", "text")

    def __init__(self, text: str, held_out: bool, source: int, offset: int, sentences: list[str], hash: int):
        self.text, self.held_out, self.source, self.offset = text, held_out, source, offset
        self.sentences, self.hash = sentences, hash


def text_hash(text: str) -> int:
    """First 8 bytes of the blake2b of a text, as an unsigned integer."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def mix(value: int, key: int) -> int:
    """A keyed 64-bit hash of an integer (two rounds of the splitmix64 finaliser, Steele et al. 2014)."""
    x = (value + 0x9E3779B97F4A7C15 * (key + 1)) & _MASK
    for _ in range(2):
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
        x ^= x >> 31
    return x


def shard_documents(plan: Plan, index: int, counts: Counter[str]) -> Iterator[Document]:
    """The documents of a shard in the order of its sources; `counts` gets what cleaning did and `documents_read`."""
    config, dropped = plan.config, _dropped(plan, index)
    for number, source, raw, text in cleaned_documents(plan, index, counts):
        if number in dropped:
            counts["duplicates"] += 1
            continue
        if config.filters.languages:
            counts[f"{LANGUAGE}{raw.language}"] += 1
        wrapped = plan.files[source].format in WRAPPED_FORMATS
        for part, held_out, part_hash in _sides(text, config):
            sentences = split_sentences(part, config.sentences, wrapped)
            yield Document(part, held_out, source, raw.offset, sentences, part_hash)


def cleaned_documents(plan: Plan, index: int, counts: Counter[str]) -> Iterator[tuple[int, int, RawDocument, str]]:
    """(number in the shard, row of the plan's files, as it is there, text) of the documents that cleaning and filters
    leave, but for duplicates."""
    filters = plan.config.filters
    for number, (source, raw) in enumerate(_raw_documents(plan, index)):
        counts["documents_read"] += 1
        if filters.languages and raw.language not in filters.languages:
            counts["language"] += 1
            continue
        try:
            text = clean(raw, plan.config.cleaning, counts)
        except DataError as error:
            raise DataError(f"{plan.files[source].path}: {error}") from None
        if text is not None and len(text) > (filters.max_characters or len(text)):
            counts["max_characters"] += 1
        elif text is not None:
            yield number, source, raw, text


def _raw_documents(plan: Plan, index: int) -> Iterator[tuple[int, RawDocument]]:
    """(row of the plan's files, document) of a shard as its files have them."""
    config = plan.config
    for piece in plan.shards[index]:
        file, fields = plan.files[piece.file], (config.text_field, config.separator, config.filters.language_field)
        try:
            for raw in read_documents(file, piece.lo, piece.hi, *fields):
                yield piece.file, raw
        except DataError:
            check_unchanged(file)  # a file that something writes to may look damaged
            raise


def check_sources(plan: Plan, index: int) -> None:
    """DataError if a file of a shard is not what it was when the build was planned."""
    for source in sorted({piece.file for piece in plan.shards[index]}):
        check_unchanged(plan.files[source])


def _dropped(plan: Plan, index: int) -> frozenset[int]:
    """Numbers of the documents of a shard that equal an earlier one of the source."""
    if not plan.duplicates:
        return frozenset()
    path = Path(plan.duplicates) / shard_name(index, len(plan.shards))
    return frozenset(np.frombuffer(path.read_bytes(), "<i8").tolist())


def _sides(text: str, config: CorpusConfig) -> list[tuple[str, bool, int]]:
    """The parts of a text, whether each is held out, and its `text_hash`."""
    split = config.held_out
    if isinstance(split, HashSplit):
        whole = text_hash(text)
        return [(text, mix(whole, config.seed) < split.fraction * 2.0**64, whole)]
    cut = int((1 - split.fraction) * len(text))
    parts = ((text[:cut], False), (text[cut:], True))
    return [(part, held, text_hash(part)) for part, held in parts if part.strip()]


def sample_shard(plan: Plan, index: int, max_bytes: int, max_documents: int) -> list[str]:
    """Train documents from the start of a shard, for training a tokenizer: at least one if there is any."""
    texts: list[str] = []
    size = 0
    for document in shard_documents(plan, index, Counter()):
        if size >= max_bytes or len(texts) >= max_documents:
            break
        if not document.held_out:
            texts.append(document.text)
            size += len(document.text.encode())
    return texts


def tokenise_shard(
    plan: Plan, index: int, tokenizer: Tokenizer, out: Place, progress: Callable[[int], None] = lambda size: None
) -> None:
    """Writes shard `index` of the corpus `out`, with its counts in `done.json`.

    `progress` is called with the UTF-8 bytes of text done since its last call.
    """
    counts: Counter[str] = Counter()
    rows = _Rows(tokenizer, plan.config.chinese_words == "jieba")
    batch: list[Document] = []
    size = 0
    for document in shard_documents(plan, index, counts):
        batch.append(document)
        size += len(document.text)
        if size >= _BATCH_CHARACTERS:
            progress(rows.add(batch))
            batch, size = [], 0
    progress(rows.add(batch))
    check_sources(plan, index)
    arrays = rows.arrays(_order(rows.held_out, index, plan.config))
    cleaning = {name: count for name, count in sorted(counts.items()) if count}
    row = _row(arrays, rows, tokenizer.special.unk) | {"request": plan.request, "cleaning": cleaning}
    write_shard(out / shard_name(index, len(plan.shards)), arrays, row)


def _order(held_out: list[bool], shard: int, config: CorpusConfig) -> np.ndarray:
    """Train documents first, then held-out ones; each side shuffled by a keyed hash of the document's number."""
    key = mix(shard, config.seed)
    keys = [mix(i, key) if config.shuffle_documents else i for i in range(len(held_out))]
    return np.array(sorted(range(len(held_out)), key=lambda i: (held_out[i], keys[i])), np.int64)


def _row(arrays: dict[str, np.ndarray], rows: _Rows, unknown: int | None) -> dict[str, int]:
    """The counts of a shard."""
    train = len(rows.held_out) - sum(rows.held_out)
    ends, sizes = arrays["doc_end"], arrays["doc_bytes"]
    return {
        "documents": len(rows.held_out),
        "train_documents": train,
        "tokens": len(arrays["tokens"]),
        "train_tokens": int(ends[train - 1]) + 1 if train else 0,
        "bytes": int(sizes.sum()),
        "train_bytes": int(sizes[:train].sum()),
        "sentences": rows.sentences,
        "unknown": int((arrays["tokens"] == unknown).sum()) if unknown is not None else 0,
    }


class _Rows:
    """Tokens and columns of the documents so far, in reading order; `jieba` says what a Chinese word is."""

    def __init__(self, tokenizer: Tokenizer, jieba: bool):
        self._tokenizer, self._dtype, self._jieba = tokenizer, token_dtype(tokenizer.vocab_size), jieba
        self._ids: list[np.ndarray] = []
        self._flags: list[np.ndarray] = []
        self._lengths: list[np.ndarray] = []
        self._columns: list[tuple[int, int, int, int]] = []
        self.held_out: list[bool] = []
        self.sentences = 0

    def add(self, documents: list[Document]) -> int:
        """Tokenises documents; returns the UTF-8 bytes of their text."""
        if not documents:
            return 0
        texts = [sentence for document in documents for sentence in document.sentences]
        ids, flags, sentence_lengths = self._tokenizer.encode_flagged(texts)
        if self._jieba:
            join_words(self._tokenizer, texts, flags, sentence_lengths)
        if len(ids) and not 0 <= ids.min() <= ids.max() < self._tokenizer.vocab_size:
            size = self._tokenizer.vocab_size
            raise DataError(f"the tokenizer gave ids {ids.min()}..{ids.max()} where vocab_size = {size}")
        counts = np.array([len(document.sentences) for document in documents])
        totals = np.concatenate([np.zeros(1, np.int64), np.cumsum(sentence_lengths)])
        last = np.cumsum(counts)
        self._lengths.append(totals[last] - totals[last - counts])
        self._ids.append(ids.astype(self._dtype))
        self._flags.append(flags)
        self.sentences += int((sentence_lengths > 0).sum())
        size = 0
        for document in documents:
            bytes_ = len(document.text.encode())
            size += bytes_
            self._columns.append((bytes_, document.source, document.offset, document.hash))
            self.held_out.append(document.held_out)
        return size

    def arrays(self, order: np.ndarray) -> dict[str, np.ndarray]:
        """The shard's arrays with the documents in `order`, a terminator after each."""
        lengths = np.concatenate([*self._lengths, np.zeros(0, np.int64)])
        starts = (np.cumsum(lengths) - lengths)[order]
        lengths = lengths[order]
        ends = np.cumsum(lengths + 1) - 1
        eot = self._tokenizer.special.eot
        assert eot is not None
        tokens = _ordered(self._ids, self._dtype, starts, lengths, ends, fill=eot)
        bits = _ordered(self._flags, np.dtype(np.uint8), starts, lengths, ends, fill=0)
        columns = [self._columns[i] for i in order]
        sizes, sources, offsets, hashes = zip(*columns, strict=True) if columns else ((), (), (), ())
        return {
            "tokens": tokens,
            "flags": bits,
            "doc_end": ends.astype(np.int64),
            "doc_bytes": np.array(sizes, np.int64),
            "doc_source": np.array(sources, np.int32),
            "doc_offset": np.array(offsets, np.int64),
            "doc_hash": np.array(hashes, np.uint64),
        }


def _ordered(
    parts: list[np.ndarray], dtype: np.dtype, starts: np.ndarray, lengths: np.ndarray, ends: np.ndarray, fill: int
) -> np.ndarray:
    """Spans of the joined `parts` one after another, `fill` after each; empties `parts` and works in blocks.

    The blocks bound the memory of the indices, which take eight bytes a token.
    """
    values = np.concatenate([*parts, np.zeros(0, dtype)])
    parts.clear()
    ordered = np.full(int(ends[-1]) + 1 if len(ends) else 0, fill, dtype)
    cuts = np.searchsorted(ends, np.arange(0, len(ordered) + _BLOCK_TOKENS, _BLOCK_TOKENS))
    for lo, hi in zip(cuts, cuts[1:], strict=False):
        target = ragged_index(ends[lo:hi] - lengths[lo:hi], lengths[lo:hi])
        ordered[target] = values.take(ragged_index(starts[lo:hi], lengths[lo:hi]))
    return ordered
