"""BERT's WordPiece, through the `tokenizers` library."""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from bertgpt_jax.corpus.backed import BackedTokenizer, check_trained, read_pipeline, spellings_by_id, without_long_runs
from bertgpt_jax.corpus.config import WordPieceConfig
from bertgpt_jax.corpus.special import SPECIAL_TOKENS, TRAINED_IDS, SpecialIds
from bertgpt_jax.corpus.tokenizer import CONFIG_FILE, config_file, find_special, read_file
from bertgpt_jax.corpus.view import ragged_index
from bertgpt_jax.corpus.word_table import LONGEST, WordTable
from bertgpt_jax.errors import DataError

MAX_WORD_CHARACTERS = 200
"""Longer words become [UNK] (google-research/bert tokenization.py, WordpieceTokenizer)."""

_IDEOGRAPHS = "\u3400-\u4dbf\u4e00-\u9fff"
"""The blocks that hold nearly all of those BERT sets apart; a word with a rarer one is cut by the library."""
_IDEOGRAPH = re.compile(f"[{_IDEOGRAPHS}]")
_WORDS = re.compile(rf"[{_IDEOGRAPHS}]|[^\s{_IDEOGRAPHS}]+")
_MARKS = r"!-/:-@\[-`{-~"
"""ASCII punctuation: each mark is a word of its own."""
_PARTS = re.compile(rf"[^{_MARKS}]+|[{_MARKS}]")
_SPACE, _MARK, _LETTER, _WIDE = range(4)


def _byte_classes() -> bytes:
    """The class of every byte of UTF-8; all that are not ASCII are `_WIDE`."""
    classes = bytearray([_LETTER] * 128 + [_WIDE] * 128)
    for characters, kind in ((" \t\n\r\x0b\x0c\x1c\x1d\x1e\x1f", _SPACE), (string.punctuation, _MARK)):
        for character in characters:
            classes[ord(character)] = kind
    return bytes(classes)


_CLASSES = _byte_classes()


class WordPiece(BackedTokenizer):
    """BERT's tokenizer over a vocabulary in id order."""

    kind = "wordpiece"
    not_cut = "\x0b\x0c\x1c\x1d\x1e\x1f\x85"  # control characters: BERT removes them, and what is around them joins

    def __init__(self, vocabulary: Sequence[str], special: SpecialIds, lowercase: bool, strip_accents: bool):
        self.vocab_size, self.special = len(vocabulary), special
        self._spellings = list(vocabulary)
        self._lowercase, self._strips = lowercase, strip_accents
        self.files = {
            "vocab.txt": "".join(f"{token}\n" for token in vocabulary).encode(),
            CONFIG_FILE: config_file(self.kind, special, lowercase=lowercase, strip_accents=strip_accents),
        }
        assert special.unk is not None
        ids = {token: i for i, token in enumerate(vocabulary)}
        self._backend = Backend(
            models.WordPiece(ids, unk_token=vocabulary[special.unk], max_input_chars_per_word=MAX_WORD_CHARACTERS)
        )
        self._backend.normalizer = _bert_normalizer(lowercase, strip_accents)
        self._backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        self._backend.decoder = decoders.WordPiece(cleanup=False)

    def words(self, text: str) -> list[str]:
        """White space parts BERT's words whatever it is, and ideographs stand alone; nothing looks across either."""
        if text.isascii() or not _IDEOGRAPH.search(text):
            return text.split()
        return _WORDS.findall(text)

    def word_parts(self, word: str) -> list[str]:
        return [word] if word.isalnum() else _PARTS.findall(word)

    def spelled(self, part: str) -> str | None:
        if not (part.isascii() and part.isalnum()):
            return None
        return part.lower() if self._lowercase else part

    @cached_property
    def _word_table(self) -> WordTable:
        return WordTable(self.encode_parts)

    def encode_pieces(self, pieces: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Short ASCII words, nearly all in most scripts with spaces, are looked up together; others one by one."""
        text = "\n".join(pieces)
        if "\0" in text:  # `WordTable` could not tell it from the end of a word
            return super().encode_pieces(pieces)
        data = text.encode()
        starts, lengths, plain = _find_words(data)
        ids, counts = self._word_table.encode(data, starts[plain], lengths[plain])
        others = np.flatnonzero(~plain)
        spans = zip(starts[others].tolist(), (starts[others] + lengths[others]).tolist(), strict=True)
        other_ids, other_counts = super().encode_pieces([data[lo:hi].decode() for lo, hi in spans])
        totals = np.zeros(len(starts) + 1, np.int64)
        totals[1:][plain], totals[1:][others] = counts, other_counts
        totals = totals.cumsum()
        if len(others):
            merged = np.empty(totals[-1], np.int32)
            merged[ragged_index(totals[:-1][plain], counts)] = ids
            merged[ragged_index(totals[:-1][others], other_counts)] = other_ids
            ids = merged
        ends = totals[np.searchsorted(starts, _byte_ends(pieces, data))]
        return ids, np.diff(ends, prepend=0)

    def word_starts(self, ids: np.ndarray, begins: np.ndarray) -> np.ndarray:
        """Every piece that is no `##` continuation (BERT's words: punctuation marks and ideographs are words)."""
        if not hasattr(self, "_starts"):
            self._starts = np.array([not token.startswith("##") for token in self._spellings])
        return self._starts[ids]

    def lost_characters(self, text: str) -> Counter[str]:
        """Accents go with their letter (`é` becomes `e`): what counts is the mark of its decomposition."""
        lost: Counter[str] = Counter()
        normalizer = self._backend.normalizer
        parts = unicodedata.normalize("NFD", text) if self._strips else text
        for character, count in Counter(parts).items():
            if not character.isspace() and not normalizer.normalize_str(character).strip():
                lost[character] = count
        return lost


def _find_words(data: bytes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where the words of UTF-8 start, their lengths in bytes (int64), and whether each is ASCII and short.

    White space and punctuation marks of ASCII part them; a mark is a word. Those that are not ASCII may part further.
    """
    classes = np.frombuffer(data.translate(_CLASSES), np.uint8)
    edges = np.zeros(len(data) + 2, bool)
    inside, marks = np.greater_equal(classes, _LETTER, out=edges[1:-1]), classes == _MARK
    starts = np.flatnonzero((inside & ~edges[:-2]) | marks)
    lengths = np.flatnonzero((inside & ~edges[2:]) | marks) + 1 - starts
    plain = lengths <= LONGEST
    if len(starts) and not data.isascii():
        plain &= np.maximum.reduceat(classes, starts) != _WIDE
    return starts, lengths, plain


def _byte_ends(pieces: Sequence[str], data: bytes) -> np.ndarray:
    """int64: the byte of `data`, the UTF-8 of the pieces with one character between them, at which each one ends."""
    ends = np.cumsum(np.fromiter(map(len, pieces), np.int64, len(pieces)) + 1) - 1
    if data.isascii():
        return ends
    inner = np.flatnonzero((np.frombuffer(data, np.uint8) & 0xC0) == 0x80)  # bytes of a character but its first
    return ends + np.searchsorted(inner - np.arange(len(inner)), ends, "right")


def _bert_normalizer(lowercase: bool, strip_accents: bool) -> normalizers.BertNormalizer:
    return normalizers.BertNormalizer(
        clean_text=True, handle_chinese_chars=True, lowercase=lowercase, strip_accents=strip_accents
    )


def load_wordpiece(path: Path, lowercase: bool, strip_accents: bool) -> WordPiece:
    """A published `vocab.txt`, a `tokenizer.json` (whose own switches count), or a directory with one."""
    if path.is_dir():
        path = path / ("vocab.txt" if (path / "vocab.txt").exists() else "tokenizer.json")
    if path.suffix == ".json":
        tree, model = read_pipeline(path, "WordPiece")
        normalizer = tree.get("normalizer") or {}
        if normalizer.get("type") != "BertNormalizer":
            raise DataError(f"{path}: normalizer {normalizer.get('type')!r} is not BERT's; pass its vocab.txt")
        lowercase = bool(normalizer.get("lowercase"))
        strip = normalizer.get("strip_accents")
        strip_accents = lowercase if strip is None else bool(strip)
        vocabulary = spellings_by_id(model["vocab"], str(path))
    else:
        vocabulary = _vocab_lines(path)
    ids = {token: i for i, token in enumerate(vocabulary)}
    special = find_special(ids.get)
    if special.unk is None:
        raise DataError(f"{path}: no [UNK] among its {len(vocabulary)} tokens; this is no WordPiece vocabulary")
    if special.eot is None:
        raise DataError(f"{path}: neither [SEP] nor [EOT] among its {len(vocabulary)} tokens; add one to end documents")
    return WordPiece(vocabulary, special, lowercase, strip_accents)


def _vocab_lines(path: Path) -> list[str]:
    """Tokens of a vocab.txt, one a line; CR LF is accepted, blank and repeated lines are not."""
    try:
        text = read_file(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start})") from None
    tokens = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
    seen: dict[str, int] = {}
    for number, token in enumerate(tokens, start=1):
        if not token.strip("\r\n\t "):
            raise DataError(f"{path}:{number}: blank line; a line is an id, so every line must hold a token")
        if token in seen:
            raise DataError(f"{path}:{number}: token {token!r} stands in line {seen[token]} already")
        seen[token] = number
    return tokens


def train_wordpiece(texts: Iterable[str], config: WordPieceConfig) -> WordPiece:
    """Trains a vocabulary: our special tokens, then pieces by falling frequency in the texts, equals by bytes.

    The library's WordPieceTrainer numbers `##` pieces in the order of a randomised hash map, and breaks ties between
    equally frequent merges by those numbers; giving it the `##` alphabet beforehand makes the set of pieces
    reproducible, sorting makes their ids so.
    """
    texts = list(without_long_runs(texts))
    normalizer = _bert_normalizer(config.lowercase, config.strip_accents)
    words = _word_counts(texts, normalizer)
    if not words:
        raise DataError("tokenizer: the training text is empty")
    alphabet, inner = _alphabet(words, config.character_coverage)
    fixed = len(SPECIAL_TOKENS) + len(alphabet) + len(inner)
    if config.vocab_size < fixed:
        raise DataError(
            f"tokenizer.vocab_size = {config.vocab_size}: too small, the special tokens and the alphabet of this text "
            f"take {fixed}; raise it, or lower tokenizer.character_coverage = {config.character_coverage}"
        )
    backend = Backend(models.BPE(unk_token="[UNK]", continuing_subword_prefix="##"))
    backend.normalizer, backend.pre_tokenizer = normalizer, pre_tokenizers.BertPreTokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        min_frequency=2,
        special_tokens=[*SPECIAL_TOKENS, *(f"##{c}" for c in inner)],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        continuing_subword_prefix="##",
        max_token_length=64,
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    found = set(backend.get_vocab()) - set(SPECIAL_TOKENS)
    check_trained(len(found) + len(SPECIAL_TOKENS), config.vocab_size)
    ordered = _by_frequency(found, words, config)
    return WordPiece([*SPECIAL_TOKENS, *ordered], TRAINED_IDS, config.lowercase, config.strip_accents)


def _word_counts(texts: Sequence[str], normalizer: normalizers.Normalizer) -> Counter[str]:
    """How often BERT's words (runs of letters and digits, single marks) occur."""
    spaced: Counter[str] = Counter()
    for text in texts:
        spaced.update(text.split())
    split = pre_tokenizers.BertPreTokenizer()
    words: Counter[str] = Counter()
    for text, count in spaced.items():
        for word, _ in split.pre_tokenize_str(normalizer.normalize_str(text)):
            words[word] += count
    return words


def _alphabet(words: Counter[str], coverage: float) -> tuple[list[str], list[str]]:
    """ASCII and the most frequent characters that make up `coverage` of the text; and those that occur inside words."""
    counts: Counter[str] = Counter()
    for word, count in words.items():
        for character in word:
            counts[character] += count
    wanted = coverage * sum(counts.values())
    kept: set[str] = set()
    for character, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if wanted > 0 or character.isascii():
            kept.add(character)
        wanted -= count
    inner = {c for word in words for c in word[1:]} & kept
    return sorted(kept), sorted(inner)


def _by_frequency(pieces: set[str], words: Counter[str], config: WordPieceConfig) -> list[str]:
    """Pieces by falling count of their use in `words`, equals by their UTF-8."""
    draft = sorted(pieces)
    counter = WordPiece([*SPECIAL_TOKENS, *draft], TRAINED_IDS, config.lowercase, config.strip_accents)
    ids, lengths = counter.encode_batch(list(words))
    repeats = np.repeat(np.fromiter(words.values(), np.int64, len(words)), lengths)
    used = np.bincount(ids, weights=repeats, minlength=counter.vocab_size)[len(SPECIAL_TOKENS) :]
    order = sorted(range(len(draft)), key=lambda i: (-used[i], draft[i].encode()))
    return [draft[i] for i in order]
