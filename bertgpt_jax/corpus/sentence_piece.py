"""SentencePiece models, trained and loaded."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import sentencepiece

from bertgpt_jax.corpus.config import SentencePieceConfig
from bertgpt_jax.corpus.special import SPECIAL_TOKENS, TRAINED_IDS
from bertgpt_jax.corpus.tokenizer import (
    CONFIG_FILE,
    UNKNOWN_SPELLING,
    Tokenizer,
    config_file,
    find_special,
    piece_classes,
    read_file,
)
from bertgpt_jax.errors import DataError

TRAINER_THREADS = 4
"""Fixed: partial sums of the expectation step, hence the model, depend on their number."""

_LONGEST_LINE = 10_000


class SentencePiece(Tokenizer):
    """A SentencePiece model given as the bytes of its file."""

    kind = "sentencepiece"

    def __init__(self, model: bytes, source: str):
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise DataError(f"{source}: not a SentencePiece model, or damaged ({_last_line(error)})") from None
        self.vocab_size = self._processor.vocab_size()
        unknown = self._processor.unk_id()

        def find(piece: str) -> int | None:
            i = self._processor.piece_to_id(piece)
            return i if i != unknown or piece == self._processor.id_to_piece(unknown) else None

        self.special = find_special(find)
        if self.special.eot is None:
            raise DataError(f"{source}: no [EOT], <eod> or </s> piece to end documents with")
        self.files = {"spiece.model": model, CONFIG_FILE: config_file(self.kind, self.special)}

    def encode_batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        rows = self._processor.encode(list(texts), out_type=int, num_threads=1)
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        return np.fromiter(chain.from_iterable(rows), np.int32, int(lengths.sum())), lengths

    def begins(self, texts: Sequence[str]) -> np.ndarray:
        from sentencepiece.sentencepiece_pb2 import SentencePieceText

        found = [np.zeros(0, np.int64)]
        for text in texts:
            parsed = SentencePieceText.FromString(self._processor.encode(text, out_type="serialized_proto"))
            sizes = [len(c.encode()) for c in text]
            byte = np.cumsum([0, *sizes])
            found.append(np.searchsorted(byte, [piece.begin for piece in parsed.pieces], "right") - 1)
        return np.concatenate(found)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        parts: list[str] = []
        run: list[int] = []
        for i in self.check_ids(ids):
            if self._processor.is_control(i):
                parts += [self._processor.decode(run)] if run else []
                parts.append(self._processor.id_to_piece(i))
                run = []
            else:
                run.append(i)
        return " ".join([*parts, *([self._processor.decode(run)] if run else [])])

    def lost_characters(self, text: str) -> Counter[str]:
        found = Counter(text).items()
        return Counter({c: n for c, n in found if not c.isspace() and not self._processor.normalize(c).strip("▁ ")})

    def token(self, id: int) -> str:
        return self._processor.id_to_piece(self.check_ids([id])[0])

    def pieces(self) -> tuple[np.ndarray, np.ndarray]:
        ids = list(range(self.vocab_size))
        asked = (self._processor.id_to_piece, self._processor.is_byte, self._processor.is_unknown)
        rows = zip(*(ask(ids) for ask in (*asked, self._processor.is_control)), strict=True)
        return piece_classes([_spelling(*row) for row in rows])


def _spelling(piece: str, byte: bool, unknown: bool, control: bool) -> bytes:
    """The UTF-8 that a piece stands for, where words are looked for; `<0xE3>` is a byte."""
    if byte:
        return bytes([int(piece[3:5], 16)])
    if unknown:
        return UNKNOWN_SPELLING
    return b"." if control else piece.encode()


def load_sentencepiece(path: Path) -> SentencePiece:
    """A published `.model` file, or a directory with exactly one."""
    if path.is_dir():
        found = sorted(path.glob("*.model"))
        if len(found) != 1:
            raise DataError(f"tokenizer.path: {path} holds {len(found)} .model files; name the one to load")
        path = found[0]
    return SentencePiece(read_file(path), str(path))


def train_sentencepiece(texts: Iterable[str], config: SentencePieceConfig) -> SentencePiece:
    """Trains a model whose ids 0..5 are our special tokens."""
    lines = [part for text in texts for line in text.split("\n") for part in _parts(line)]
    if not lines:
        raise DataError("tokenizer: the training text is empty")
    target = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=target,
            vocab_size=config.vocab_size,
            model_type=config.model_type,
            character_coverage=config.character_coverage,
            pad_id=0, pad_piece=SPECIAL_TOKENS[0],
            unk_id=1, unk_piece=SPECIAL_TOKENS[1],
            bos_id=2, bos_piece=SPECIAL_TOKENS[2],
            eos_id=3, eos_piece=SPECIAL_TOKENS[3],
            control_symbols=list(SPECIAL_TOKENS[4:]),
            required_chars="".join(sorted({c for line in lines for c in set(line) if "!" <= c <= "~"})),
            max_sentence_length=4 * _LONGEST_LINE,
            num_threads=TRAINER_THREADS,
            minloglevel=2,
        )  # fmt: skip
    except RuntimeError as error:
        message = _last_line(error)
        limit = re.search(r"<= (\d+)", message)
        least = re.search(r"smaller than required_chars\. \d+ vs (\d+)", message)
        advice = f"this text supports at most {limit[1]}; set vocab_size={limit[1]}" if limit else message
        advice = f"too small, the special tokens and the alphabet of this text take {least[1]}" if least else advice
        raise DataError(f"tokenizer.vocab_size = {config.vocab_size}: {advice}") from None
    tokenizer = SentencePiece(target.getvalue(), "trained")
    assert tokenizer.special == TRAINED_IDS, tokenizer.special
    return tokenizer


def _parts(line: str) -> list[str]:
    """A line in pieces the trainer does not refuse for their length."""
    return [line[i : i + _LONGEST_LINE] for i in range(0, len(line), _LONGEST_LINE)] if line.strip() else []


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
