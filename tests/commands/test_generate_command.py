"""The commands generate and fill_mask: what they print, and what they refuse in one line before compiling."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bertgpt_jax.commands import fill_mask, generate
from bertgpt_jax.corpus.characters import Characters
from bertgpt_jax.models.bert import BertConfig
from bertgpt_jax.models.gpt import GptConfig
from bertgpt_jax.transfer.import_model import import_model
from bertgpt_jax.transfer.source import Source, parameter_shapes

LETTERS = Characters("abcdefgh \n")
SIZES = dict(num_layers=1, hidden_size=12, num_heads=2, intermediate_size=16, max_positions=40)


def save(config, tokenizer, path: Path) -> Path:
    """The workdir of a model with random parameters."""
    rng, leaves = np.random.default_rng(0), parameter_shapes(config)
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, (_, shape) in leaves.items()}
    read = lambda paths: {name: arrays[name] for name in paths}  # noqa: E731
    import_model(Source(config, tokenizer, leaves, read, "random", None, {}), str(path))
    return path


@pytest.fixture(scope="module")
def gpt(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("models") / "gpt"
    return str(save(GptConfig(**SIZES, vocab_size=LETTERS.vocab_size + 3), LETTERS, path))


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("models") / "bert"
    return str(save(BertConfig(**SIZES, vocab_size=LETTERS.vocab_size), LETTERS, path))


@pytest.fixture
def run(capsys):
    """Runs a command: (exit code, stdout, stderr)."""

    def call(command, *argv: str) -> tuple[int, str, str]:
        code = command.main(list(argv))
        caught = capsys.readouterr()
        return code, caught.out, caught.err

    return call


# ---------------------------------------------------------------- generate


def test_one_prompt_is_continued_as_it_comes(gpt, run) -> None:
    code, out, err = run(generate, gpt, "--prompt", "abc", "--max-new", "8", "--ignore-end", "--seed", "1")
    assert code == 0 and out.startswith("abc") and len(out) > len("abc\n")
    assert "finished: 8 new tokens" in err and "step 0" in err
    assert run(generate, gpt, "--prompt", "abc", "--max-new", "8", "--ignore-end", "--seed", "1")[1] == out


def test_a_file_of_prompts_as_json(gpt, run, tmp_path) -> None:
    """Rows do not depend on the batch; each says what it was made of."""
    file = tmp_path / "prompts.txt"
    file.write_text("abc\n\nh\n")
    argv = (gpt, "--file", str(file), "--samples", "2", "--max-new", "8", "--ignore-end", "--json")
    code, out, _ = run(generate, *argv)
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [(r["prompt"], r["sample"]) for r in rows] == [("abc", 0), ("abc", 1), ("h", 0), ("h", 1)]
    assert all(row["tokens"] == 8 for row in rows) and rows[0]["text"] != rows[1]["text"]
    assert run(generate, *argv, "--batch-size", "3")[1] == out


def test_stop_strings(gpt, run) -> None:
    argv = (gpt, "--prompt", "abc", "--max-new", "12", "--ignore-end", "--temperature", "0", "--json")
    text = json.loads(run(generate, *argv)[1])["text"]
    stop = text[3:5]
    row = json.loads(run(generate, *argv, "--stop", stop)[1])
    assert row["text"] == text[: text.index(stop)] and row["stop"] == stop


def test_beams(gpt, run) -> None:
    code, out, _ = run(generate, gpt, "--prompt", "abc", "--beams", "3", "--samples", "2", "--max-new", "4", "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and len(rows) == 2 and rows[0]["score"] >= rows[1]["score"]


def test_ids_and_the_start_of_a_document(gpt, run) -> None:
    code, out, _ = run(generate, gpt, "--ids", "6 7", "--ids", "8", "--max-new", "3", "--ignore-end")
    assert code == 0 and "--- prompt 2, sample 1" in out
    code, _, err = run(generate, gpt, "--unconditional", "--max-new", "3", "--ignore-end")
    assert code == 0 and "finished: 3 new tokens" in err


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (("--prompt", ""), 64, "prompt 1 ('') is empty"),
        (("--prompt", "abz"), 65, "no tokens for 'z'; the model would read [UNK]"),
        (("--prompt", "abc", "--max-new", "39"), 64, "prompt 1 has 3 tokens, with 39 new ones"),
        (("--prompt", "abc", "--max-new", "0"), 64, "--max-new 0: must be at least 1"),
        (("--prompt", "abc", "--temperature", "-1"), 78, "temperature = -1"),
        (("--prompt", "abc", "--top-p", "1.5"), 78, "top_p = 1.5"),
        (("--prompt", "abc", "--top-k", "0"), 78, "top_k = 0"),
        (("--prompt", "abc", "--stop", ""), 64, "--stop ''"),
        (("--prompt", "abc", "--seed", "-1"), 64, "--seed -1"),
        (("--prompt", "abc", "--alpha", "1"), 64, "--alpha 1.0: is of beam search"),
        (("--prompt", "abc", "--beams", "2", "--top-k", "3"), 64, "--top-k is not for beam search"),
        (("--prompt", "abc", "--beams", "2", "--samples", "3"), 64, "--samples 3: 2 beams"),
        (("--prompt", "abc", "--beams", "2", "--slide"), 64, "--slide"),
        (("--prompt", "abc", "--mesh", "tensor=5"), 78, "does not multiply to 8 devices"),
        (("--ids", "6 99"), 64, "'99' is no id of the vocabulary"),
        (("--file", "nowhere.txt"), 74, "nowhere.txt: cannot be read"),
        (("--prompt", "abc", "--which", "5"), 78, "5"),
        ((), 64, "one of the arguments"),
    ],
)
def test_bad_arguments(gpt, run, argv: tuple[str, ...], code: int, said: str) -> None:
    found, out, err = run(generate, gpt, *argv)
    assert (found, out, err.count("\n")) == (code, "", 1) and said in err, err


def test_a_file_without_a_prompt(gpt, run, tmp_path) -> None:
    (tmp_path / "empty").write_text("\n \n")
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    for name, code, said in (("empty", 64, "no prompt in it"), ("latin", 65, "not UTF-8 (byte 3)")):
        found, out, err = run(generate, gpt, "--file", str(tmp_path / name))
        assert (found, out) == (code, "") and said in err and err.count("\n") == 1


def test_a_prompt_that_fits_exactly(gpt, run) -> None:
    code, _, err = run(generate, gpt, "--prompt", "a" * 39, "--ignore-end", "--max-new", "2")
    assert code == 0 and "2 new tokens" in err
    code, _, err = run(generate, gpt, "--prompt", "a" * 50, "--max-new", "4", "--ignore-end", "--slide")
    assert code == 0 and "4 new tokens" in err


# ---------------------------------------------------------------- both


@pytest.mark.parametrize("command", [generate, fill_mask])
def test_models_that_cannot(command, gpt, bert, run, tmp_path) -> None:
    """Of the other kind, without a tokenizer, with one that is too large, and none at all."""
    text = ("--prompt", "abc") if command is generate else ("a[MASK]",)
    other = bert if command is generate else gpt
    code, _, err = run(command, other, *text)
    assert code == 78 and err.count("\n") == 1 and ("fill_mask" if command is generate else "generate") in err
    kind = GptConfig if command is generate else BertConfig
    path = save(kind(**SIZES, vocab_size=16), None, tmp_path / "mute")
    code, _, err = run(command, str(path), *text)
    assert code == 65 and "no tokenizer" in err and err.count("\n") == 1
    code, _, err = run(command, "bert-base-uncased", *text)
    assert code == 78 and "hf download bert-base-uncased" in err


def test_a_tokenizer_of_another_model(gpt, run, tmp_path) -> None:
    import shutil

    workdir = Path(shutil.copytree(gpt, tmp_path / "gpt"))
    Characters("abcdefghijklmnopqrstuvwxyz").save(workdir / "tokenizer")
    code, _, err = run(generate, str(workdir), "--prompt", "abc")
    assert code == 65 and "tokenizer" in err and err.count("\n") == 1


# ---------------------------------------------------------------- fill_mask


def test_guesses_with_probabilities(bert, run) -> None:
    code, out, _ = run(fill_mask, bert, "ab[MASK]d <mask>", "--top-k", "3", "--json")
    masks = json.loads(out)["masks"]
    assert code == 0 and len(masks) == 2 and all(len(mask) == 3 for mask in masks)
    code, out, _ = run(fill_mask, bert, "ab[MASK]d <mask>", "--top-k", "3")
    assert code == 0 and f"{masks[0][0]['probability']:8.4f}" in out and "mask 2:" in out


def test_text_and_why_it_is_none(bert, run) -> None:
    for method in (("--method", "unmask"), ("--method", "gibbs", "--sweeps", "2")):
        code, out, _ = run(fill_mask, bert, "ab", "--generate", "5", *method, "--json")
        found = json.loads(out)
        assert code == 0 and found["text"].startswith("ab") and len(found["text"]) == 7
        assert found["log_p"]["forward"] != pytest.approx(found["log_p"]["backward"], abs=1e-3)
    code, out, _ = run(fill_mask, bert, "ab", "--generate", "5")
    assert code == 0 and "from right to left" in out and "filled in this order" in out


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (("abc",), 64, "'abc' has no mask; write [MASK]"),
        ((), 64, "no text"),
        (("z[MASK]",), 65, "no tokens for 'z'"),
        (("a" * 40 + "[MASK]",), 64, "43 tokens, more than the model's context of 40"),
        (("a[MASK]", "--top-k", "0"), 64, "--top-k 0"),
        (("a", "--generate", "0"), 64, "--generate 0"),
        (("a", "--generate", "60"), 64, "63 tokens, more than the model's context"),
        (("a", "--generate", "2", "--sweeps", "2"), 64, "--sweeps 2: is of"),
        (("a", "--generate", "2", "--temperature", "-1"), 78, "temperature = -1"),
        (("a[MASK]", "--temperature", "1"), 64, "--temperature 1.0"),
    ],
)
def test_bad_fill_mask_arguments(bert, run, argv: tuple[str, ...], code: int, said: str) -> None:
    found, out, err = run(fill_mask, bert, *argv)
    assert (found, out, err.count("\n")) == (code, "", 1) and said in err, err
