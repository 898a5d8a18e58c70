"""What a tokenised corpus is made of: source, cleaning, sentences, split, tokenizer."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from bertgpt_jax.config import ADDED, EXECUTION, Config

# ---------------------------------------------------------------- tokenizers


class WordPieceConfig(Config):
    """BERT's tokenizer: words cut greedily, longest piece first; continuations are written `##piece`.

    Lower-casing and accent stripping are separate switches: BERT's "uncased" does both, and stripping also loses the
    vowel signs of many scripts (`tools/tokenizer.py check` counts the loss).
    """

    kind: Literal["wordpiece"] = "wordpiece"
    vocab_size: int = Field(30_000, gt=6)
    lowercase: bool = True
    strip_accents: bool = True
    character_coverage: float = Field(0.9995, gt=0, le=1)
    """Share of the training text's characters the alphabet covers; words with others become [UNK]."""
    path: Annotated[str, EXECUTION] = ""
    """A published `vocab.txt` or `tokenizer.json`, or a directory with one; "" trains on the corpus."""
    sample_bytes: int = Field(100_000_000, gt=0)
    """At most this much text is trained on."""


class ByteBPEConfig(Config):
    """GPT-2's tokenizer: byte-level byte-pair encoding; every string has an encoding and decodes to itself."""

    kind: Literal["byte_bpe"] = "byte_bpe"
    vocab_size: int = Field(32_000, ge=262)
    path: Annotated[str, EXECUTION] = ""
    """A directory with `encoder.json` + `vocab.bpe`, `vocab.json` + `merges.txt` or `tokenizer.json`; "" trains."""
    sample_bytes: int = Field(100_000_000, gt=0)


class SentencePieceConfig(Config):
    """SentencePiece: unigram language model or BPE over text with the spaces kept as `▁`."""

    kind: Literal["sentencepiece"] = "sentencepiece"
    vocab_size: int = Field(32_000, gt=6)
    model_type: Literal["unigram", "bpe"] = "unigram"
    character_coverage: float = Field(0.9995, gt=0, le=1)
    path: Annotated[str, EXECUTION] = ""
    """A published `.model` file, or a directory with one; "" trains on the corpus."""
    sample_bytes: int = Field(100_000_000, gt=0)


class CharactersConfig(Config):
    """One token a character: the vocabulary is the set of characters of the training text, in code point order."""

    kind: Literal["characters"] = "characters"
    path: Annotated[str, EXECUTION] = ""
    """A saved `characters.json`, or a directory with one; "" takes the characters of the corpus."""
    sample_bytes: int = Field(1_000_000_000, gt=0)


TokenizerConfig = Annotated[
    WordPieceConfig | ByteBPEConfig | SentencePieceConfig | CharactersConfig, Field(discriminator="kind")
]

# ---------------------------------------------------------------- documents


class CleaningConfig(Config):
    """The named steps between a file and its documents; the manifest counts what each changed or dropped."""

    bom: bool = True
    """Removes byte order marks (U+FEFF) at the start of a document."""
    newlines: bool = True
    """CR LF and lone CR become LF."""
    control_characters: bool = True
    """Removes NUL and the other control characters except tab and newline."""
    html_entities: bool = True
    """`&lt;` becomes `<`, once (WikiExtractor leaves them)."""
    gutenberg: bool = True
    """Removes the licence before and after a Project Gutenberg book."""
    title_stubs: bool = True
    """Drops wiki documents that hold nothing but their title."""
    min_characters: int = Field(1, ge=1)
    """Drops documents with fewer characters that are not white space."""
    invalid_utf8: Literal["replace", "error"] = "replace"
    """What to do with bytes that are no UTF-8 and with lone surrogates: U+FFFD and a count, or stop."""


class FiltersConfig(Config):
    """Which documents stay after `cleaning`, which has `min_characters`; the report counts those that do not."""

    max_characters: int | None = Field(None, ge=1)
    """Drops documents with more characters."""
    language_field: str = ""
    """The field (jsonl, parquet, arrow, tfds) that holds a document's language."""
    languages: tuple[str, ...] = ()
    """The values of `language_field` that stay, letter for letter; an empty field is none of them."""
    duplicates: Literal["keep", "drop"] = "keep"
    """`drop`: of documents with equal cleaned text only the first of the whole source stays. Reads the source twice."""

    @model_validator(mode="after")
    def _languages_have_a_field(self) -> FiltersConfig:
        if bool(self.language_field) != bool(self.languages):
            raise ValueError(
                f"language_field '{self.language_field}' and languages {list(self.languages)} go together: set both"
            )
        return self


FIELD_SETTINGS = ("corpus.text_field", "corpus.filters.language_field")
"""The settings that name the fields of `CorpusConfig.fields`, in their order."""


class HashSplit(Config):
    """Holds out whole documents, chosen by a hash of their text: equal documents fall on the same side."""

    kind: Literal["hash"] = "hash"
    fraction: float = Field(0.01, ge=0, lt=1)


class PositionSplit(Config):
    """Holds out the end of every document: its first `int((1 - fraction) * characters)` characters are trained on."""

    kind: Literal["position"] = "position"
    fraction: float = Field(0.1, ge=0, lt=1)


class CorpusConfig(Config):
    """A source of text and how it becomes a tokenised corpus; or, as `path`, a corpus already prepared.

    `path` is no part of the identity (the data may move); the corpus's content fingerprint is compared instead.
    """

    kind: Annotated[Literal["single"], EXECUTION] = "single"
    path: Annotated[str | tuple[str, ...], EXECUTION] = ""
    """A file, directory, glob, `stdlib` (Python's own documentation), `tfds:name/config:version`, a tuple of those; or
    `-`, standard input; or a prepared corpus."""
    format: Literal["auto", "text", "file", "jsonl", "wiki", "stdlib", "parquet", "arrow", "tfds"] = "auto"
    """`text`: blank lines part documents; `file`: one a file; `wiki`: WikiExtractor output. Reads `.gz` directly.
    `arrow`: also directories that Hugging Face `datasets` saved to disk."""
    text_field: str = Field("text", min_length=1)
    """The field of the text in a jsonl object, table or TFDS example."""
    split: Annotated[str, ADDED] = Field("train", min_length=1)
    """The split of a TFDS data set, also a slice (`train[:10%]+test`), or of a saved `DatasetDict`."""
    data_dir: Annotated[str, EXECUTION] = ""
    """Where TFDS data sets lie; "" is $TFDS_DATA_DIR or ~/tensorflow_datasets."""
    separator: str = ""
    """format=text: a line that parts documents, instead of blank lines (`<|endoftext|>`)."""
    cleaning: CleaningConfig = CleaningConfig()
    filters: Annotated[FiltersConfig, ADDED] = FiltersConfig()
    sentences: Literal["none", "line", "split"] = "split"
    """Where sentences start: nowhere, at every line, or by punctuation."""
    chinese_words: Annotated[Literal["characters", "jieba"], ADDED] = "characters"
    """What masks of whole words take for a word in Chinese: each character, or what jieba finds (extra `zh`)."""
    held_out: Annotated[HashSplit | PositionSplit, Field(discriminator="kind")] = HashSplit()
    shuffle_documents: bool = True
    """Shuffles the documents of a shard by a keyed hash."""
    shard_bytes: int = Field(64_000_000, ge=1_000)
    """Text of a shard, at most (before compression; one document is never cut)."""
    seed: int = Field(0, ge=0, lt=2**63)
    tokenizer: TokenizerConfig = WordPieceConfig()
    workers: Annotated[int, EXECUTION] = Field(-1, ge=-1)
    """Processes that tokenise: -1 one a core, 0 this process."""

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields that are read of a document that has any: the text, and the language if it is filtered by."""
        return (self.text_field, *([self.filters.language_field] if self.filters.language_field else []))

    @model_validator(mode="after")
    def _lengths_leave_something(self) -> CorpusConfig:
        low, high = self.cleaning.min_characters, self.filters.max_characters
        if high is not None and high < low:
            raise ValueError(f"filters.max_characters {high} is below cleaning.min_characters {low}: nothing is left")
        return self
