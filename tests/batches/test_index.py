"""Document windows and the index over their rows."""

from __future__ import annotations

import dataclasses
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bertgpt_jax.batches import index
from bertgpt_jax.batches.index import Memo, RowIndex, document_windows, read_table, write_table
from bertgpt_jax.corpus.view import InMemoryCorpus


@dataclasses.dataclass(frozen=True)
class Rows:
    rows: int
    tally: int = 1

    def __len__(self) -> int:
        return self.rows


def row_index(sizes: list[int], cache_dir=None, kept: int = 8, made: list | None = None) -> RowIndex[Rows]:
    """An index over windows of the given sizes, one row more in each later epoch; notes what it plans in `made`."""

    def plan(epoch: int, window: int) -> Rows:
        if made is not None:
            made.append((epoch, window))
        return Rows(sizes[window] + epoch)

    return RowIndex(len(sizes), plan, 0, "test", cache_dir, kept)


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=60),
    st.lists(st.integers(0, 30), max_size=20),
    st.integers(1, 3),
    st.integers(1, 9),
    st.integers(20, 80),
)
def test_windows_part_each_shards_split(train, held_out, shards, most, tokens):
    documents = [[[[7] * n] for n in sizes] for sizes in (train, held_out)]
    corpus = InMemoryCorpus(documents[0], 10, held_out=documents[1], shards=shards)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index, "DOCUMENTS_PER_WINDOW", most)
        patch.setattr(index, "TOKENS_PER_WINDOW", tokens * most)
        for split in ("train", "held_out"):
            windows = document_windows(corpus, split)
            for shard, lo, hi in corpus.split_documents(split):
                mine = windows[windows[:, 0] == shard]
                assert mine[0, 1] == lo and mine[-1, 2] == hi
                assert (mine[1:, 1] == mine[:-1, 2]).all()
                assert (mine[:, 2] > mine[:, 1]).all() and (mine[:, 2] - mine[:, 1] <= most).all()
                starts, ends = corpus.document_spans(shard, lo, hi)
                for _, a, b in mine:
                    size = (ends - starts)[a - lo : b - lo]
                    assert size.sum() <= tokens * most + size.max()
            assert len(windows) == 0 or set(windows[:, 0]) == {s for s, _, _ in corpus.split_documents(split)}


@settings(deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=200), st.integers(0, 2))
def test_an_epochs_order_is_a_permutation_block_by_block(sizes, epoch):
    rows = row_index(sizes)
    count = rows.count(epoch)
    assert count == sum(sizes) + epoch * len(sizes)
    order = rows.order(epoch, np.arange(count))
    assert np.array_equal(np.sort(order), np.arange(count))
    window, local = rows.locate(epoch, order)
    assert (local < np.array(sizes)[window] + epoch).all() and (local >= 0).all()
    block = window // index.WINDOWS_PER_BLOCK
    assert (np.diff(block) != 0).sum() <= len(sizes) // index.WINDOWS_PER_BLOCK


def test_epochs_have_their_own_order_of_blocks_and_rows():
    rows = row_index([3] * 640)
    orders = [rows.order(epoch, np.arange(1920)) for epoch in (0, 1)]
    assert not np.array_equal(orders[0], orders[1])
    blocks = [rows.locate(epoch, orders[epoch][::192])[0].tolist() for epoch in (0, 1)]
    assert blocks[0] != blocks[1]


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 79)), min_size=1, max_size=30), st.integers(1, 5))
def test_what_was_asked_before_changes_nothing(questions, kept):
    sizes = list(range(1, 81))
    used = row_index(sizes, kept=kept)
    for epoch, rank in questions:
        row = used.order(epoch, np.array([rank]))
        fresh = row_index(sizes)
        assert row.tolist() == fresh.order(epoch, np.array([rank])).tolist()
        window = int(used.locate(epoch, row)[0][0])
        assert used.plan(epoch, window) == fresh.plan(epoch, window)


def test_rows_are_measured_once_and_kept(tmp_path):
    made: list = []
    first = row_index([4, 0, 7], tmp_path / "cache", made=made)
    assert (first.count(0), first.count(1), first.tally(0)) == (11, 14, 3) and len(made) == 6
    again: list = []
    second = row_index([4, 0, 7], tmp_path / "cache", made=again)
    assert (second.count(0), second.count(1), second.tally(0)) == (11, 14, 3) and not again


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "longer"])
def test_a_damaged_table_is_made_anew(tmp_path, damage):
    made: list = []
    row_index([4, 0, 7], tmp_path).count(0)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    flipped = whole[:40] + bytes([whole[40] ^ 1]) + whole[41:]
    path.write_bytes({"flip": flipped, "cut": whole[:-5], "empty": b"", "longer": whole + b"\0" * 8}[damage])
    assert row_index([4, 0, 7], tmp_path, made=made).count(0) == 11
    assert len(made) == 3 and path.read_bytes() == whole


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path):
    (tmp_path / "file").write_text("")
    assert row_index([4, 0, 7], tmp_path / "file" / "cache").count(0) == 11
    assert read_table(tmp_path / "absent", 3) is None
    write_table(tmp_path / "t", np.array([[1, 2]], np.int32))
    assert read_table(tmp_path / "t", 1).tolist() == [[1, 2]] and read_table(tmp_path / "t", 2) is None


def test_memo_makes_a_value_once_among_threads():
    memo: Memo[int, int] = Memo(4)
    made = []

    def make() -> int:
        time.sleep(0.02)
        made.append(1)
        return 5

    got: list[int] = []
    threads = [threading.Thread(target=lambda: got.append(memo.get(1, make))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [5] * 6 and len(made) == 1


def test_memo_forgets_the_value_used_longest_ago_and_errors_at_once():
    memo: Memo[int, int] = Memo(2)
    made: list[int] = []

    def get(key: int) -> int:
        return memo.get(key, lambda: made.append(key) or key * 10)

    assert [get(k) for k in (1, 2, 1, 3, 1, 2)] == [10, 20, 10, 30, 10, 20]
    assert made == [1, 2, 3, 2]
    with pytest.raises(ZeroDivisionError):
        memo.get(9, lambda: 1 // 0)
    assert memo.get(9, lambda: 4) == 4
