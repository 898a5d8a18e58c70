"""Every kind of tokenizer as Hugging Face's files: the same ids, and the same tokenizer when they are read again."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend

from bertgpt_jax.corpus.config import ByteBPEConfig, CharactersConfig, SentencePieceConfig, WordPieceConfig
from bertgpt_jax.corpus.kinds import train_tokenizer
from bertgpt_jax.transfer.hf_tokenizer import encode_as_written, read_tokenizer, write_tokenizer
from bertgpt_jax.transfer.proof import TEXTS

LINES = [line for line in Path(textwrap.__file__).read_text().splitlines() if line.strip(" -#")][:200]
HARD = [*TEXTS, "a  b   c", " lead", "trail ", "\n\n", "x\ty", "\ufb01ne \u2167", "\uff10\uff11", "e\u0301", "\u4e2da"]
KINDS = {
    "wordpiece": (WordPieceConfig(vocab_size=300), {"vocab.txt"}),
    "cased": (WordPieceConfig(vocab_size=300, lowercase=False), {"vocab.txt"}),
    "byte_bpe": (ByteBPEConfig(vocab_size=300), {"vocab.json", "merges.txt"}),
    "unigram": (SentencePieceConfig(vocab_size=300), {"spiece.model"}),
    "merges": (SentencePieceConfig(vocab_size=300, model_type="bpe"), {"spiece.model"}),
    "characters": (CharactersConfig(), set()),
}
COMMON = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}


@pytest.mark.parametrize("name", KINDS)
def test_the_files_hold_the_same_tokenizer(name: str, tmp_path: Path) -> None:
    config, files = KINDS[name]
    tokenizer = train_tokenizer([*LINES, *TEXTS], config)
    write_tokenizer(tokenizer, tmp_path, 77, encoder=True)
    assert {path.name for path in tmp_path.iterdir()} == COMMON | files
    for text, ids in zip([*HARD, *LINES], encode_as_written(tmp_path, [*HARD, *LINES]), strict=True):
        assert ids == tokenizer.encode(text).tolist(), text
    assert read_tokenizer(tmp_path).sha256 == tokenizer.sha256
    special = tokenizer.special
    pair = Backend.from_file(str(tmp_path / "tokenizer.json")).encode("abc", "wrap")
    first, second = tokenizer.encode("abc").tolist(), tokenizer.encode("wrap").tolist()
    assert pair.ids == [special.cls, *first, special.sep, *second, special.sep]
    assert pair.type_ids == [0] * (len(first) + 2) + [1] * (len(second) + 1)
    named = json.loads((tmp_path / "special_tokens_map.json").read_text())
    assert named["mask_token"] == tokenizer.token(special.mask) and "eos_token" not in named
