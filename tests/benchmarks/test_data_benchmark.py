"""The data benchmark at a tiny size, its collator part in tests/parity; and that Grain does the same work."""

from __future__ import annotations

import numpy as np
import pytest

from bertgpt_jax.batches.masking import Masking, mask_tables
from bertgpt_jax.benchmarks import data
from bertgpt_jax.benchmarks.data_peers import MaskRecord, Rows, features, grain_side, turns

WORDS = "the cat sat on a mat while some dogs ran after every bird they saw near old stone walls".split()


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A file of 60 documents of a few sentences each."""
    rng = np.random.default_rng(0)
    documents = []
    for _ in range(60):
        lengths = rng.integers(4, 12, rng.integers(2, 7))
        documents.append("\n".join(" ".join(rng.choice(WORDS, n)).capitalize() + "." for n in lengths))
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(documents))
    return path


def tiny(text, **more) -> data.Settings:
    sizes = dict(vocab_size=60, length=16, window=16, packed_length=32, tokens=1024, batches=2, rounds=1, warmup=0)
    return data.Settings(text=str(text), cache=str(text.parent / "cache"), **sizes, **more)


def test_grain_and_the_store(text):
    result = data.run(tiny(text, parts=("grain", "store")))
    names = set(result.comparisons["store"]["seconds"])
    assert names == {"windows", "windows_cached", "pairs", "packed_pairs", "packed", "packed_causal"}
    assert len(result.rows) == 7 and all(row.value > 0 for row in result.rows)
    assert set(result.ratios) == {"grain"} and result.facts["corpus"]["documents"] == 60
    assert result.facts["windows_filled"] == 1 and 0.3 < result.facts["pairs_filled"] <= 1


def test_batches_are_never_the_same_twice(text):
    corpus = data.open_sample(tiny(text), text.parent / "cache")
    dataset = data.make(corpus, data.Windows(), None, 16, 64)
    seen: list[int] = []
    built = dataset.batch
    dataset.batch = lambda n: seen.append(n) or built(n)
    side = data.dataset_side("ours", dataset, 3, 0)
    state = side.prepare()
    side.step(state)
    side.step(state)
    assert seen == [0, 1, 2, 3, 4, 5]


def test_rows_for_the_peers_are_unmasked(text):
    corpus = data.open_sample(tiny(text), text.parent / "cache")
    dataset = data.make(corpus, data.FullDocuments(), Masking(), 16, 64)
    rows = data.unmasked(dataset, batches=2)
    assert rows.tokens.shape == (8, 16) and not (rows.tokens == corpus.special.mask).any()
    assert rows.special[:, 0].all() and not rows.special.all()


def test_grains_records_follow_the_same_rules():
    special = np.zeros(100, bool)
    special[:6] = True
    masking = Masking()
    tables = mask_tables(masking, 4, special)
    rng, row = np.random.default_rng(0), np.arange(6, 70, dtype=np.int32)
    row[0], row[-1] = 2, 3
    record, seen = MaskRecord(masking, tables, masking.predictions(64)), []
    for _ in range(300):
        out = record.random_map(row, rng)
        places = out["mask_positions"][out["mask_weights"] > 0]
        assert len(places) == 10 and (np.diff(places) > 0).all() and not special[row[places]].any()
        assert (out["mask_labels"][:10] == row[places]).all()
        others = np.delete(np.arange(64), places)
        assert (out["tokens"][others] == row[others]).all()
        seen.append(out["tokens"][places])
    hidden = np.concatenate(seen)
    assert 0.77 < (hidden == 4).mean() < 0.83 and not np.isin(hidden, [0, 1, 2, 3, 5]).any()


def test_grain_gives_whole_batches_and_features_mark_words():
    special = np.zeros(100, bool)
    special[:6] = True
    tokens = np.random.default_rng(0).integers(6, 100, (8, 16)).astype(np.int32)
    starts = np.ones((8, 16), bool)
    starts[:, 3] = False
    rows = Rows(tokens, special[tokens], starts)
    side = grain_side("grain", rows, Masking(), mask_tables(Masking(), 4, special), 4, 3, 1)
    state = side.prepare()
    assert state[0][0]["tokens"].shape == (4, 16)
    side.step(state)
    assert next(state[1]) == 3, "a step has to move on by its batches"
    offsets = features(rows, whole_words=True)[0]["offset_mapping"]
    gaps = [begin != before for (_, before), (begin, _) in zip(offsets, offsets[1:], strict=False)]
    assert gaps == [True, True, False] + [True] * 12
    chosen = turns(8, 3)
    assert [next(chosen) for _ in range(3)] == [slice(0, 3), slice(3, 6), slice(0, 3)]
