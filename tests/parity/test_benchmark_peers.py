"""The benchmarks' peers at tiny sizes: losses that agree are compared, others are refused."""

from __future__ import annotations

import os

import numpy as np
import pytest

from bertgpt_jax.benchmarks import cpu_bert, cpu_gpt, data, decode
from bertgpt_jax.benchmarks.data_peers import Rows, features
from bertgpt_jax.benchmarks.updates import agreed_losses
from bertgpt_jax.errors import DataError

torch = pytest.importorskip("torch", reason="torch is not installed; pip install -e '.[parity]'")
transformers = pytest.importorskip("transformers", reason="transformers is not installed; pip install -e '.[parity]'")
pytestmark = pytest.mark.parity

TINY = dict(layers=1, hidden=24, heads=3, vocabulary=150, length=16, rows=2, peers=("eager",), rounds=1, warmup=0)


@pytest.mark.slow
def test_updates_of_bert_with_and_without_the_gather():
    result = cpu_bert.run(cpu_bert.Settings(**TINY))
    losses = result.facts["losses"]
    assert set(losses) == {"ours", "full_head", "eager"} and losses["ours"][2] < losses["ours"][0]
    assert set(result.ratios) == set(result.facts["ratios_without_gather"]) == {"eager"}
    assert result.facts["gflop"]["full_head"] > result.facts["gflop"]["ours"]


@pytest.mark.slow
def test_updates_of_gpt():
    result = cpu_gpt.run(cpu_gpt.Settings(**TINY))
    assert set(result.facts["losses"]) == {"ours", "eager"} and set(result.ratios) == {"eager"}


@pytest.mark.slow
def test_decoding_and_what_its_techniques_give():
    """Both sides write the same tokens; the head, the cache, the loop and threads are each measured alone."""
    sizes = dict(layers=2, hidden=24, heads=3, vocabulary=150, positions=64, prompt=8, new=6)
    result = decode.run(decode.Settings(**sizes, batches=(1, 2), rounds=1, technique_tokens=2))
    for batch in (1, 2):
        assert result.facts[f"batch {batch}"]["rows_with_equal_tokens"] == 1.0
        said = " | ".join(row.measure for row in result.rows if f"batch {batch}," in row.measure)
        for part in ("prefill of 8 tokens", "decoding over transformers", "transposed copy of the head",
                     "cache as [B, S, N, H]", "a call a token", "stacked layers"):  # fmt: skip
            assert part in said, said
        if len(os.sched_getaffinity(0)) > 1:
            assert "prefill: with one thread" in said and "decoding: with one thread" in said
    assert all(np.isfinite(row.value) for row in result.rows)
    assert [row.least for row in result.rows if "decoding over transformers" in row.measure] == [1.6, None]


class Fixed:
    """A trainer with the same loss every time."""

    def __init__(self, name: str, loss: float):
        self.name, self._loss = name, loss

    def update(self) -> float:
        return self._loss


def test_sides_that_do_other_work_are_refused():
    agreed_losses([Fixed("ours", 5.0), Fixed("peer", 5.0004)])
    for loss in (5.01, float("nan")):
        with pytest.raises(DataError, match=r"'peer'.*'ours'.*not compared"):
            agreed_losses([Fixed("ours", 5.0), Fixed("peer", loss)])


def test_the_collators_of_transformers(tmp_path):
    rng = np.random.default_rng(0)
    words = "the cat sat on mats while some dogs ran after every bird they saw near old walls".split()
    documents = ["\n".join(" ".join(rng.choice(words, 8)) + "." for _ in range(6)) for _ in range(40)]
    (tmp_path / "text.txt").write_text("\n\n".join(documents))
    settings = data.Settings(
        text=str(tmp_path / "text.txt"), cache=str(tmp_path / "cache"), parts=("collator",),
        vocab_size=60, length=16, tokens=1024, batches=1, rounds=1, warmup=0,
    )  # fmt: skip
    result = data.run(settings)
    assert set(result.ratios) == {"mlm_pt", "mlm_np", "whole_word_pt", "whole_word_np"}
    assert all(ratio > 0 for ratio in result.ratios.values())


def test_the_whole_word_collator_sees_our_words():
    starts = np.array([[1, 1, 0, 0, 1, 1, 0, 1]], bool)
    special = np.array([[1, 0, 0, 0, 0, 0, 0, 1]], bool)
    row = features(Rows(np.arange(8)[None], special, starts), whole_words=True)[0]
    collator = transformers.DataCollatorForLanguageModeling
    numbers, _ = collator._calc_word_ids_and_prob_mask(
        np.array([row["offset_mapping"]]), np.array([row["special_tokens_mask"]])
    )
    assert numbers.tolist() == [[-1, 1, 1, 1, 2, 3, 3, -1]]
