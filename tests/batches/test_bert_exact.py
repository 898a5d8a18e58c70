"""BERT's own instances: the original's output, line by line, and what holds for any text."""

from __future__ import annotations

import gzip
import hashlib
import json
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bertgpt_jax.batches.bert_exact import ExactSettings, Instance, exact_instances, read_exact_documents
from bertgpt_jax.corpus.exact_wordpiece import ExactWordPiece, read_exact_vocabulary, text_lines
from bertgpt_jax.corpus.wordpiece import load_wordpiece
from bertgpt_jax.errors import DataError

GOLDEN = Path(__file__).parent / "golden" / "bert_exact.json"
VOCABULARY = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdef", *(f"##{c}" for c in "abcdef"), ".", "ab", "##cd")


def json_lines(instances: list[Instance]) -> list[str]:
    return [json.dumps(instance._asdict(), ensure_ascii=False, sort_keys=True) for instance in instances]


def instances_of(text: bytes, vocabulary: dict[str, int], cased: bool = False, **changes) -> list[Instance]:
    documents = read_exact_documents(text_lines(text, "text"), ExactWordPiece(vocabulary, cased))
    return exact_instances(documents, list(vocabulary), ExactSettings(**changes))


# ---------------------------------------------------------------- the original's output


@pytest.mark.parametrize("whole_word", [False, True])
@pytest.mark.parametrize("seed", [12345, 1, 2])
@pytest.mark.parametrize("name", ["sample_text", "sample_text_no_unicode"])
def test_the_published_sample(shared_data, name, seed, whole_word):
    text = (shared_data / "lm" / "bert-sample-text" / f"{name}.txt").read_bytes()
    vocabulary = read_exact_vocabulary(shared_data / "vocab" / "bert-base-uncased" / "vocab.txt")
    found = json_lines(instances_of(text, vocabulary, dupe_factor=5, seed=seed, whole_word=whole_word))
    suffix = ".whole_word" if whole_word else ""
    file = shared_data / "golden" / "bert_exact" / f"{name}.L128.mp20.dupe5.seed{seed}{suffix}.jsonl.gz"
    expected = gzip.decompress(file.read_bytes()).decode().splitlines()
    assert len(expected) > 50
    for number, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert ours == theirs, f"instance {number}"


@pytest.mark.parametrize("number", range(10))
def test_odd_texts_and_settings(number, tmp_path):
    """Control characters, accents, ideographs, right to left, CR, long words, a vocabulary with repeated tokens..."""
    golden = json.loads(GOLDEN.read_text("utf-8"))
    case = golden["cases"][number]
    (tmp_path / "vocab.txt").write_text("\n".join(golden["vocabulary"].split(" ")) + "\n", "utf-8")
    found = instances_of(golden["text"].encode(), read_exact_vocabulary(tmp_path / "vocab.txt"), **case["settings"])
    for name, value in case["first"].items():
        assert getattr(found[0], name) == value
    assert len(found) == case["instances"]
    assert hashlib.sha256("".join(f"{line}\n" for line in json_lines(found)).encode()).hexdigest() == case["sha256"]


# ---------------------------------------------------------------- what holds for any text

sentences = st.lists(st.text("abcdef. ", min_size=1, max_size=40), min_size=1, max_size=12)
texts = st.lists(sentences, min_size=1, max_size=6).map(lambda d: "\n\n".join("\n".join(s) for s in d))


@settings(max_examples=150)
@given(
    texts.filter(str.strip),
    st.integers(5, 70),
    st.integers(0, 20),
    st.sampled_from([0.0, 0.1, 1.0]),
    st.sampled_from([0.0, 0.15, 0.7]),
    st.booleans(),
    st.integers(0, 1000),
)
def test_instances_are_well_formed(text, length, most, short, rate, whole_word, seed):
    vocabulary = {token: i for i, token in enumerate(VOCABULARY)}
    tokenizer = ExactWordPiece(vocabulary, cased=False)
    documents = read_exact_documents(text_lines(text.encode(), "text"), tokenizer)
    given_settings = ExactSettings(
        max_seq_length=length,
        max_predictions=most,
        dupe_factor=2,
        short_seq_prob=short,
        masked_lm_prob=rate,
        whole_word=whole_word,
        seed=seed,
    )
    found = exact_instances(documents, VOCABULARY, given_settings)
    assert len(found) >= 2 * len(documents)
    streams = [[token for sentence in document for token in sentence] for document in documents]
    for tokens, segments, is_random, positions, labels in found:
        assert 5 <= len(tokens) == len(segments) <= length
        plain = list(tokens)
        for position, label in zip(positions, labels, strict=True):
            plain[position] = label
        middle = segments.index(1)
        assert plain[0] == "[CLS]" and plain[middle - 1] == plain[-1] == "[SEP]" and plain.count("[SEP]") == 2
        assert segments == [0] * middle + [1] * (len(plain) - middle)
        first, second = plain[1 : middle - 1], plain[middle:-1]
        homes = [{i for i, stream in enumerate(streams) if contains(stream, part)} for part in (first, second)]
        assert homes[0] and homes[1]
        if not is_random:
            assert any(contains(streams[i], first, second) for i in homes[0] & homes[1])
        # Python's round, [CLS] and [SEP] counted, never more than there are
        wanted = min(most, max(1, int(round(len(plain) * rate))), len(plain) - 3)
        assert positions == sorted(set(positions)) and not {0, middle - 1, len(plain) - 1} & set(positions)
        assert len(positions) <= wanted if whole_word else len(positions) == wanted


def contains(stream: list[str], first: list[str], second: list[str] | None = None) -> bool:
    """Whether `first` stands in `stream`, and `second` (if given) anywhere behind it."""
    for start in range(len(stream) - len(first) + 1):
        if stream[start : start + len(first)] == first:
            return second is None or contains(stream[start + len(first) :], second)
    return False


def test_every_sentence_is_used_in_every_pass():
    """What a random B replaces is put back: without truncation, A and the true B are the whole text, once a pass."""
    vocabulary = {token: i for i, token in enumerate((*VOCABULARY, *(f"w{i}" for i in range(60))))}
    documents = [[[f"w{10 * d + s}"] for s in range(10)] for d in range(6)]
    found = exact_instances(documents, list(vocabulary), ExactSettings(max_seq_length=8, masked_lm_prob=0, seed=5))
    used: list[str] = []
    for instance in found:
        plain = list(instance.tokens)
        for position, label in zip(instance.masked_lm_positions, instance.masked_lm_labels, strict=True):
            plain[position] = label
        end = plain.index("[SEP]") if instance.is_random_next else len(plain)
        used += [token for token in plain[:end] if token.startswith("w")]
    assert sorted(used) == sorted([f"w{i}" for i in range(60)] * 10)
    assert sum(instance.is_random_next for instance in found) / len(found) > 0.5


# ---------------------------------------------------------------- tokens


def test_where_the_library_agrees_and_where_not(tmp_path):
    """The differences that the docstring of `exact_wordpiece` names, and no other, in the basic planes."""
    letters = [*"abcdefghijklmnopqrstuvwxyz", "ς", "σ", "力", "𫠠"]
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join([*VOCABULARY[:5], *letters, *(f"##{c}" for c in letters)]) + "\n", "utf-8")
    library, exact = load_wordpiece(path, True, True), ExactWordPiece(read_exact_vocabulary(path), cased=False)

    def same(text: str) -> bool:
        return [library.token(i) for i in library.encode(text)] == exact.tokenize(text)

    for text in (
        "Naïve café",
        "e\u0301",
        "a\u200bb",
        "a\x07b\tc\x85d\u2028e",
        "力a力",
        "don't [SEP]",
        "x" * 200,
        "x" * 201,
    ):
        assert same(text), text
    assert exact.tokenize("ΣΑΣ")[-1] == "[UNK]" and exact.tokenize("aΣ") == ["a", "##ς"] and not same("aΣ")
    assert exact.tokenize("a\ue000b") == ["[UNK]"] and not same("a\ue000b")
    assert exact.tokenize("a𫠠b") == ["a", "𫠠", "b"] and not same("a𫠠b")
    old = [c for c in map(chr, range(0x20, 0x3000)) if not same(f"a{c}b")]
    assert len(old) < 200
    assert {unicodedata.category(c)[0] for c in old} <= set("MPCS")


def test_blank_lines_and_documents_without_tokens():
    vocabulary = {token: i for i, token in enumerate(VOCABULARY)}
    text = b"\xef\xbb\xbfa b\r\n\r\n\r\n\xe2\x80\x8b\nc\n \xe3\x80\x80 \n\xe2\x80\x8b\n\n\r\nd"
    documents = read_exact_documents(text_lines(text, "t"), ExactWordPiece(vocabulary, cased=False))
    assert documents == [[["a", "b"]], [["c"]], [["d"]]]


def test_one_document_is_its_own_random_one():
    vocabulary = {token: i for i, token in enumerate(VOCABULARY)}
    found = instances_of(b"a b c", vocabulary, dupe_factor=3)
    assert [instance.is_random_next for instance in found] == [True] * 3
    assert all(instance.segment_ids == [0] * 5 + [1] * 4 for instance in found)


@pytest.mark.parametrize("text", [b"", b"\n\n", b" \xe3\x80\x80\n", b"\xe2\x80\x8b\n"])
def test_a_text_without_documents(text):
    with pytest.raises(DataError, match="no document"):
        instances_of(text, {token: i for i, token in enumerate(VOCABULARY)})


def test_a_vocabulary_that_is_none(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("a\nb\n[UNK]\n[CLS]\n")
    with pytest.raises(DataError, match=r"vocab\.txt: no \[SEP\], \[MASK\] among its 4 tokens"):
        read_exact_vocabulary(path)


def test_bytes_that_are_no_text():
    with pytest.raises(DataError, match="text:2: byte 0xff is not UTF-8"):
        list(text_lines(b"a\n\xff\n", "text"))
