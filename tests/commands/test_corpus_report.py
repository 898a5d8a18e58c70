"""`tools/corpus_report.py`: numbers of a corpus counted by hand, examples of a config, text, JSON and picture."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from bertgpt_jax.commands.corpus_report import main
from bertgpt_jax.config import to_json
from bertgpt_jax.corpus.builder import prepare_corpus
from bertgpt_jax.corpus.config import CharactersConfig, CorpusConfig, FiltersConfig, HashSplit, WordPieceConfig
from bertgpt_jax.models.bert import BertConfig
from bertgpt_jax.objectives.masked_lm_nsp import MaskedLMNSP
from bertgpt_jax.training.run_config import RunConfig, StageConfig

OWN = {"held_out": HashSplit(fraction=0.0), "workers": 0}


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four documents of 3, 3, 8 and 1 characters, the first two equal, one of two sentences; English and German."""
    directory = tmp_path_factory.mktemp("by_hand")
    rows = [("abc", "en"), ("abc", "en"), ("aaaa\naaa", "de"), ("b", "en"), ("zz", "fr")]
    text = "".join(json.dumps({"text": text, "lang": lang}) + "\n" for text, lang in rows)
    (directory / "four.jsonl").write_text(text)
    filters = FiltersConfig(language_field="lang", languages=("en", "de"))
    config = CorpusConfig(
        path=str(directory / "four.jsonl"), tokenizer=CharactersConfig(), sentences="line", filters=filters, **OWN
    )
    return prepare_corpus(config, directory / "corpus", progress=False)


def test_a_corpus_counted_by_hand(by_hand: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("matplotlib")
    assert (
        main([str(by_hand), "--length", "8", "--json", str(tmp_path / "r.json"), "--out", str(tmp_path / "r.png")]) == 0
    )
    assert (tmp_path / "r.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    report = json.loads((tmp_path / "r.json").read_text())
    found = report["corpora"]["corpus"]
    sentences = found["sentence_tokens"]
    assert found["documents"] == 4 and found["sentences"] == 5
    assert found["duplicate_share"] == 0.25 and found["unknown_share"] == 0
    assert found["languages"] == {"en": 0.75, "de": 0.25} and list(found["sources"].values()) == [1.0]
    lengths = found["document_tokens"]
    assert sum(lengths["histogram"].values()) == 4 and lengths["histogram"]["1"] == 1 and lengths["histogram"]["2"] == 2
    assert lengths["max"] == found["tokens"] - 7 and lengths["mean"] == found["tokens"] / 4
    assert sum(sentences["histogram"].values()) == 5 and sentences["mean"] == found["tokens"] / 5
    top = {row["token"]: row["count"] for row in found["top_tokens"]}
    assert top["a"] == 9 and top["b"] == 3 and sum(row["share"] for row in found["top_tokens"]) == pytest.approx(1)
    left_out = [e["examples"] for e in report["examples"] if "left_out" in e]
    assert "sentence_pairs" in left_out  # 8 tokens are too few for a pair
    printed = capsys.readouterr().out
    assert (
        "duplicates  25.000%" in printed and "languages   en 75.0%, de 25.0%" in printed and "not possible" in printed
    )


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config of pairs over 200 documents, in two stages."""
    directory, rng = tmp_path_factory.mktemp("config"), random.Random(0)
    words = "the cat sat on a mat while some dogs ran after every bird they saw near old stone walls".split()
    documents = (
        "\n".join(" ".join(rng.choices(words, k=rng.randint(3, 9))) for _ in range(rng.randint(2, 9)))
        for _ in range(200)
    )
    (directory / "text.txt").write_text("\n\n".join(documents))
    tokenizer = WordPieceConfig(vocab_size=87)
    made = RunConfig(
        corpus=CorpusConfig(path=str(directory / "text.txt"), sentences="line", tokenizer=tokenizer, **OWN),
        model=BertConfig(num_layers=1, hidden_size=16, num_heads=2, intermediate_size=16, max_positions=64),
        objective=MaskedLMNSP(),
        stages=tuple(StageConfig(name=f"t{t}", steps=4, sequence_length=t, batch_size=8) for t in (32, 64)),
    )
    (directory / "config.json").write_text(to_json(made))
    return directory / "config.json"


def test_the_examples_of_a_config(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = [str(config), "--corpora", str(config.parent / "corpora"), "--json", str(tmp_path / "r.json")]
    assert main(arguments) == 0
    first, second = json.loads((tmp_path / "r.json").read_text())["examples"]
    assert (first["stage"], first["sequence_length"], second["sequence_length"]) == ("t32", 32, 64)
    for found in (first, second):
        assert found["rows"] == found["rows_per_epoch"]  # all are counted, so that both measures must agree
        assert found["padding_share"] == pytest.approx(1 - found["packing_efficiency"])
        assert 0.13 < found["masked_share"] < 0.17 and 0.5 < found["random_next_share"] < 0.7
        # half of the pairs that could have a next sentence have a random one, and all that could not
        alone = found["one_sentence_share"]
        assert alone > 0.05 and found["random_next_share"] == pytest.approx(alone + 0.5 * (1 - alone), abs=0.05)
        assert sum(found["masks"].values()) == pytest.approx(1) and 0.7 < found["masks"]["mask"] < 0.9
    assert f"({first['one_sentence_share']:.2%} of the pairs are of one sentence" in capsys.readouterr().out
    assert main([*arguments, "objective.examples.kind=packed_pairs"]) == 0
    packed = json.loads((tmp_path / "r.json").read_text())["examples"][1]
    assert packed["packing_efficiency"] > second["packing_efficiency"] and packed["segments_per_row"] > 1
    assert packed["one_sentence_share"] == second["one_sentence_share"]
    assert main([*arguments, "objective.examples.task=sentence_order"]) == 0
    swapped = json.loads((tmp_path / "r.json").read_text())["examples"][1]
    assert 0.4 < swapped["swapped_share"] < 0.6 and not {"random_next_share", "one_sentence_share"} & swapped.keys()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["no/such/corpus"], 78, "no/such/corpus"),
        (["{corpus}", "--out", "x.pdf"], 64, "x.pdf"),
        (["{corpus}", "--length", "2"], 64, "--length 2"),
        (["{corpus}", "--top", "0"], 64, "--top 0"),
        (["{corpus}", "seed=1"], 64, "seed=1"),
        (["{empty}"], 65, "no finished corpus"),
    ],
)
def test_bad_arguments(
    by_hand: Path, tmp_path: Path, capsys: pytest.CaptureFixture, arguments: list[str], code: int, words: str
) -> None:
    assert main([a.format(corpus=by_hand, empty=tmp_path) for a in arguments]) == code
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
