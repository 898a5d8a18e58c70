"""Our tokenizers as Hugging Face's files, and back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from bertgpt_jax.corpus.backed import BackedTokenizer
from bertgpt_jax.corpus.byte_bpe import load_byte_bpe
from bertgpt_jax.corpus.characters import Characters
from bertgpt_jax.corpus.sentence_piece import SentencePiece, load_sentencepiece
from bertgpt_jax.corpus.special import SPECIAL_TOKENS, SpecialIds
from bertgpt_jax.corpus.tokenizer import CONFIG_FILE, Tokenizer
from bertgpt_jax.corpus.wordpiece import load_wordpiece
from bertgpt_jax.errors import ConfigError, DataError
from bertgpt_jax.transfer.tensors import read_json

PIPELINE = "tokenizer.json"
SPACE = "▁"


# ---------------------------------------------------------------- out


def write_tokenizer(tokenizer: Tokenizer, directory: Path, max_length: int, *, encoder: bool) -> None:
    """Writes tokenizer.json, tokenizer_config.json, special_tokens_map.json and the files of its kind.

    Args:
        max_length: positions of the model.
        encoder: [CLS] and [SEP] are put around a text, as BERT and RoBERTa expect; a decoder's texts stay as they are.
    """
    for name, content in tokenizer.files.items():
        if name not in (CONFIG_FILE, "characters.json"):
            (directory / name).write_bytes(content)
    backend = Backend.from_str(pipeline(tokenizer))
    special = tokenizer.special
    backend.add_special_tokens([_added(tokenizer, i) for i in special.ids()])
    if encoder:
        backend.post_processor = _template(tokenizer)
    (directory / PIPELINE).write_text(backend.to_str(pretty=True), "utf-8")
    roles = roles_of(special, encoder=encoder)
    named = {f"{role}_token": tokenizer.token(i) for role, i in roles.items()}
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", *(["token_type_ids"] if encoder else []), "attention_mask"],
        **named,
    }
    _write_json(directory / "tokenizer_config.json", config)
    _write_json(directory / "special_tokens_map.json", named)


def roles_of(special: SpecialIds, *, encoder: bool) -> dict[str, int]:
    """What transformers calls our special ids."""
    roles = {"pad": special.pad, "unk": special.unk, "mask": special.mask if encoder else None}
    roles |= {"cls": special.cls, "sep": special.sep} if encoder else {"bos": special.eot, "eos": special.eot}
    return {role: i for role, i in roles.items() if i is not None}


def _write_json(path: Path, tree: Any) -> None:
    path.write_text(json.dumps(tree, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _added(tokenizer: Tokenizer, i: int) -> AddedToken:
    # a masked byte-level piece begins with its space: "is <mask>" has to lose the one before the mask
    eats_space = tokenizer.kind == "byte_bpe" and i == tokenizer.special.mask
    return AddedToken(tokenizer.token(i), special=True, normalized=False, lstrip=eats_space)


def _template(tokenizer: Tokenizer) -> processors.TemplateProcessing | None:
    special = tokenizer.special
    if special.cls is None or special.sep is None:
        return None
    cls, sep = tokenizer.token(special.cls), tokenizer.token(special.sep)
    known = [(cls, special.cls), (sep, special.sep)]
    return processors.TemplateProcessing(f"{cls} $A {sep}", f"{cls} $A {sep} $B:1 {sep}:1", known)


def pipeline(tokenizer: Tokenizer) -> str:
    """The JSON of a `tokenizers` pipeline that gives the same ids, without special tokens around a text."""
    if isinstance(tokenizer, BackedTokenizer):
        return tokenizer.pipeline()
    if isinstance(tokenizer, Characters):
        return _characters(tokenizer).to_str()
    if isinstance(tokenizer, SentencePiece):
        return _sentencepiece(tokenizer).to_str()
    raise ConfigError(f"a tokenizer of kind '{tokenizer.kind}' has no tokenizer.json")


def _characters(tokenizer: Characters) -> Backend:
    """Every character is a word of its own; what is not in the list is [UNK]."""
    vocabulary = {tokenizer.token(i): i for i in range(tokenizer.vocab_size)}
    backend = Backend(models.WordLevel(vocabulary, unk_token=SPECIAL_TOKENS[1]))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return backend


def _sentencepiece(tokenizer: SentencePiece) -> Backend:
    """A SentencePiece model as unigram or merges; DataError if its settings have no counterpart."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(tokenizer.files["spiece.model"])
    rules, trainer = proto.normalizer_spec, proto.trainer_spec
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    if trainer.model_type == trainer.UNIGRAM:
        model = models.Unigram(pieces, unk_id=trainer.unk_id, byte_fallback=trainer.byte_fallback)
    elif trainer.model_type == trainer.BPE:
        unknown = pieces[trainer.unk_id][0]
        ids = {piece: i for i, (piece, _) in enumerate(pieces)}
        model = models.BPE(
            ids, _merges(ids, pieces), unk_token=unknown, fuse_unk=True, byte_fallback=trainer.byte_fallback
        )
    else:
        raise DataError("this SentencePiece model is neither unigram nor BPE; it has no tokenizer.json")
    backend = Backend(model)
    steps: list[normalizers.Normalizer] = []
    if rules.precompiled_charsmap:
        steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if steps:
        backend.normalizer = normalizers.Sequence(steps)
    prefix = "always" if rules.add_dummy_prefix else "never"
    backend.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prefix, split=False)
    backend.decoder = decoders.Metaspace(SPACE, prefix, split=False)
    return backend


def _merges(ids: dict[str, int], pieces: list[tuple[str, float]]) -> list[tuple[str, str]]:
    """SentencePiece BPE joins the pair whose result has the best score; as merges, in that order."""
    found = []
    for piece, score in pieces:
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in ids and right in ids:
                found.append((-score, ids[left], ids[right], (left, right)))
    return [pair for *_, pair in sorted(found)]


def encode_as_written(directory: Path, texts: Sequence[str]) -> list[list[int]]:
    """Ids of texts by the tokenizer.json in a directory, nothing put around them."""
    written = Backend.from_file(str(directory / PIPELINE))
    return [written.encode(text, add_special_tokens=False).ids for text in texts]


# ---------------------------------------------------------------- in


def read_tokenizer(directory: Path) -> Tokenizer | None:
    """The tokenizer of a Hugging Face directory; None if it has none.

    Raises:
        ConfigError: of a kind that is not ours. DataError: damaged.
    """
    models_found = sorted(directory.glob("*.model"))
    if not (directory / PIPELINE).is_file():
        if (directory / "vocab.txt").is_file():
            lowercase, strip = _case(directory)
            return load_wordpiece(directory / "vocab.txt", lowercase, strip)
        if (directory / "vocab.json").is_file() or (directory / "encoder.json").is_file():
            return load_byte_bpe(directory)
        return load_sentencepiece(directory) if models_found else None
    tree = read_json(directory / PIPELINE)
    model = tree.get("model") if isinstance(tree.get("model"), dict) else {}
    kind = model.get("type") or ("BPE" if "merges" in model else "WordPiece")
    if kind == "WordPiece":
        return load_wordpiece(directory / PIPELINE, True, True)
    if kind == "BPE" and "ByteLevel" in json.dumps(tree.get("pre_tokenizer")):
        return load_byte_bpe(directory / PIPELINE)
    if kind == "WordLevel":
        return _read_characters(directory / PIPELINE, model)
    if models_found:
        return load_sentencepiece(directory)
    raise ConfigError(
        f"{directory / PIPELINE}: a {kind} tokenizer of this kind is not ours (WordPiece, byte-level BPE, characters, "
        "or SentencePiece with its .model file); import it without its tokenizer"
    )


def _case(directory: Path) -> tuple[bool, bool]:
    """Whether a directory with nothing but vocab.txt lower-cases and strips accents; BERT's own default is yes."""
    path = directory / "tokenizer_config.json"
    tree = read_json(path) if path.is_file() else {}
    lowercase = bool(tree.get("do_lower_case", True))
    strip = tree.get("strip_accents")
    return lowercase, lowercase if strip is None else bool(strip)


def _read_characters(path: Path, model: dict[str, Any]) -> Characters:
    vocabulary = model.get("vocab")
    if not isinstance(vocabulary, dict):
        raise DataError(f"{path}: no vocabulary")
    tokenizer = Characters("".join(token for token in vocabulary if token not in SPECIAL_TOKENS))
    ours = {tokenizer.token(i): i for i in range(tokenizer.vocab_size)}
    if ours != vocabulary:
        raise ConfigError(f"{path}: its words are not single characters behind {', '.join(SPECIAL_TOKENS)}; not ours")
    return tokenizer
