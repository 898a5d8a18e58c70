"""Discovery, formats, cuts and cleaning."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bertgpt_jax.corpus import sources
from bertgpt_jax.corpus.cleaning import clean
from bertgpt_jax.corpus.config import CleaningConfig, CorpusConfig
from bertgpt_jax.corpus.cuts import cut_file
from bertgpt_jax.corpus.files import SourceFile, find_files
from bertgpt_jax.corpus.sources import RawDocument, read_documents


def documents(path: Path, kind: str = "auto", separator: str = "", target: int | None = None) -> list[RawDocument]:
    """All documents of a source, read whole or in ranges of about `target` bytes."""
    files = find_files(CorpusConfig(path=str(path), format=kind))
    found = []
    for file in files:
        ranges = cut_file(file, target or 1 << 40, separator)
        for lo, hi in ranges:
            found += read_documents(file, lo, hi, "text", separator)
    return found


def texts(found: list[RawDocument]) -> list[str]:
    return [d.text if isinstance(d.text, str) else d.text.decode() for d in found]


def test_blank_lines_part_documents(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\n\none\ntwo\r\n \t\r\nthree\n\n\n\nfour")
    found = documents(path)
    assert texts(found) == ["one\ntwo", "three", "four"]
    assert [path.read_bytes()[d.offset :][:3] for d in found] == [b"one", b"thr", b"fou"]


def test_separator_parts_documents(tmp_path):
    path = tmp_path / "stories.txt"
    path.write_text("\nOnce.\n\nTwice.\n<|endoftext|>\nThrice.\n<|endoftext|>\n")
    assert texts(documents(path, "text", "<|endoftext|>")) == ["Once.\n\nTwice.", "Thrice."]


@pytest.mark.parametrize("target", [1 << 40, 1 << 20])
def test_a_line_of_ten_megabytes(target, tmp_path):
    """A document is never cut, however long its line."""
    line = "word " * 2_000_000
    (tmp_path / "a.txt").write_text(f"before\n\n{line}x\n\nafter\n")
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": line + "x"}) + '\n{"text": "after"}\n')
    assert texts(documents(tmp_path / "a.txt", target=target)) == ["before", line + "x", "after"]
    assert texts(documents(tmp_path / "a.jsonl", target=target)) == [line + "x", "after"]


def test_file_keeps_every_byte(tmp_path):
    path = tmp_path / "play.txt.gz"
    path.write_bytes(gzip.compress(b"First Citizen:\n\nSpeak.\n"))
    assert texts(documents(path, "file")) == ["First Citizen:\n\nSpeak.\n"]


def test_wiki_documents_and_their_offsets(tmp_path):
    path = tmp_path / "wiki_00"
    body = '<doc id="1" title="A">\nA\n\nBody of A.\n</doc>\n<doc id="2" title="B">\nB\n\n\n</doc>\n'
    body += '<doc id="3">\nC\n\nUnclosed'
    path.write_text(body)
    found = documents(path)
    assert texts(found) == ["A\n\nBody of A.", "B", "C\n\nUnclosed"]
    assert all(body[d.offset :].startswith("<doc ") and d.titled for d in found)


def test_jsonl_field(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    rows = [{"text": "one\ntwo", "id": 1}, {"text": "ü"}]
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    assert texts(documents(path)) == ["one\ntwo", "ü"]


def test_directories_are_read_in_order_without_hidden_files(tmp_path):
    for name in ("b/2.txt", "a/1.txt", ".git/x.txt", "b/.hidden"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text of " + name)
    files = find_files(CorpusConfig(path=str(tmp_path)))
    assert [f.name for f in files] == ["a/1.txt", "b/2.txt"]
    assert [f.name for f in find_files(CorpusConfig(path=str(tmp_path / "*/*.txt")))] == ["a/1.txt", "b/2.txt"]


LINES = st.lists(st.sampled_from(["", " ", "word", "two words", "<doc x>", "</doc>", '{"text": "j"}']), max_size=40)


@pytest.mark.parametrize("end", [b"", b"\n", b"\n<doc id=4>\nnever closed", b"</doc>"])
def test_wiki_documents_are_the_same_from_blocks_of_any_size(tmp_path, monkeypatch, end: bytes):
    """Marks that lie across two blocks, documents within one block and over many, marks that are no marks."""
    path = tmp_path / "wiki_00"
    path.write_bytes(
        b"outside\n<doc id=1>\nOne\n\ntext <doc \n</doc>\n</doc>\nlost\n<doc id=2>\n" + b"Two\nlong line " * 9
        + b"\n<doc id=3>\n</doc\n" + end
    )  # fmt: skip
    whole = documents(path, "wiki")
    assert [d.offset for d in whole][:2] == [8, path.read_bytes().index(b"<doc id=2")] and len(whole) >= 3
    assert texts(whole)[0] == "One\n\ntext <doc" and texts(whole)[1].count("Two") == 9
    for size in (1, 2, 5, 13, 64):
        monkeypatch.setattr(sources, "_BLOCK", size)
        assert documents(path, "wiki") == whole
        assert documents(path, "wiki", target=20) == whole


@settings(max_examples=60, deadline=None)
@given(lines=LINES, newline=st.sampled_from(["\n", "\r\n"]), target=st.integers(1, 60), packed=st.booleans())
@pytest.mark.parametrize("kind", ["text", "wiki", "jsonl"])
def test_cuts_neither_lose_nor_repeat_documents(tmp_path_factory, kind, lines, newline, target, packed):
    if kind == "jsonl":
        lines = [line for line in lines if line.startswith("{") or not line.strip()]
    raw = newline.join(lines).encode()
    path = tmp_path_factory.getbasetemp() / f"cut.{kind}{'.gz' if packed else ''}"
    path.write_bytes(gzip.compress(raw) if packed else raw)
    file = SourceFile(str(path), "cut", kind, path.stat().st_size, "")
    ranges = cut_file(file, target, "")
    assert ranges[0][0] == 0 and ranges[-1][1] == len(raw)
    assert all(a[1] == b[0] for a, b in zip(ranges, ranges[1:], strict=False))
    cut = [d for lo, hi in ranges for d in read_documents(file, lo, hi, "text", "")]
    whole = list(read_documents(file, 0, len(raw), "text", ""))
    assert cut == whole


def test_stdlib_is_parsed_not_imported(repository):
    import sys

    files = find_files(CorpusConfig(path="stdlib"))
    wanted = {"this.py", "antigravity.py", "argparse.py", "pydoc_data/topics.py"}
    chosen = [f for f in files if f.name in wanted]
    assert {f.name for f in chosen} == wanted
    before = set(sys.modules)
    found = {f.name: list(read_documents(f, 0, f.size, "text", "")) for f in chosen}
    assert set(sys.modules) - before == set()
    assert found["this.py"] == []
    assert len(found["argparse.py"]) == 1 and found["argparse.py"][0].text.startswith("Command-line parsing library")
    assert len(found["pydoc_data/topics.py"]) > 50


# ---------------------------------------------------------------- cleaning


BOOK = b"x\n*** START OF THIS PROJECT GUTENBERG EBOOK A\nB ***\n\nBook.\n\nEnd of Project Gutenberg's A\nlicence"


@pytest.mark.parametrize(
    ("raw", "text", "name"),
    [
        (b"\xef\xbb\xbfbom", "bom", "bom"),
        (b"a\r\nb\rc", "a\nb\nc", "newlines"),
        (b"a &lt;b&gt; &amp;lt; c", "a <b> &lt; c", "html_entities"),
        (b"a\x00b\x07c\x0cd", "abc\nd", "control_characters"),
        (b"ok \xff\xfe", "ok \ufffd\ufffd", "invalid_utf8"),
        ("lone \ud800", "lone \ufffd", "invalid_utf8"),
        (BOOK, "Book.\n", "gutenberg"),
    ],
)
def test_each_step_changes_and_counts(raw, text, name):
    counts: Counter[str] = Counter()
    assert clean(RawDocument(raw, 0), CleaningConfig(), counts) == text
    assert +counts == Counter({name: 1})
    if name != "invalid_utf8":
        counts.clear()
        off = clean(RawDocument(raw, 0), CleaningConfig(**{name: False}), counts)
        assert off is not None and off != text and not counts[name]


@pytest.mark.parametrize(
    ("document", "config", "reason"),
    [
        (RawDocument(b" \n\t", 0), {}, "empty"),
        (RawDocument(b"\xef\xbb\xbf", 0), {}, "empty"),
        (RawDocument(b"Title", 0, titled=True), {}, "title_stubs"),
        (RawDocument(b"a b c", 0), {"min_characters": 4}, "min_characters"),
    ],
)
def test_drops_are_counted(document, config, reason):
    counts: Counter[str] = Counter()
    assert clean(document, CleaningConfig(**config), counts) is None
    assert counts[reason] == 1


def test_untouched_text_counts_nothing():
    counts: Counter[str] = Counter()
    assert (
        clean(RawDocument("Grüße, 世界 & so on.\n".encode(), 0), CleaningConfig(), counts) == "Grüße, 世界 & so on.\n"
    )
    assert not +counts


def test_real_books_lose_their_licence(shared_data):
    for file in find_files(CorpusConfig(path=str(shared_data / "lm" / "gutenberg"))):
        assert file.format == "file"
        raw = next(read_documents(file, 0, 1 << 40, "text", ""))
        text = clean(raw, CleaningConfig(), Counter())
        assert text is not None and len(text) > 0.9 * len(raw.text) - 25_000
        assert "Literary Archive Foundation" not in text and "*** END" not in text and "\r" not in text


def test_real_wiki_stubs_are_dropped(shared_data):
    counts: Counter[str] = Counter()
    file = find_files(CorpusConfig(path=str(shared_data / "lm" / "enwiki-66M" / "text_AA_wiki_00.gz")))[0]
    found = [clean(raw, CleaningConfig(), counts) for raw in read_documents(file, 0, 1 << 40, "text", "")]
    assert 0.55 < counts["title_stubs"] / len(found) < 0.75
