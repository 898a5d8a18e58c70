"""Continues prompts of different lengths: prefill, then some tokens a call of one compiled loop, until all rows end."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from bertgpt_jax.errors import UsageError
from bertgpt_jax.generation.decode import Decoder
from bertgpt_jax.generation.loop import State, advance, begin
from bertgpt_jax.generation.sampling import Sampling, row_keys
from bertgpt_jax.parallel import sharding
from bertgpt_jax.shapes import Array, PyTree

COLUMNS = 32
"""Prompts are padded to a multiple of this, caches too: few programs are compiled, and little is computed in vain."""

TOKENS_A_CALL = 16
"""Tokens between two looks at stop strings; the host's part of a call is shared by them."""


@dataclasses.dataclass(frozen=True)
class Continuation:
    """Continues token sequences.

    Attributes:
        decoder: of the model.
        params: in the decoder's layout.
        sampling: how tokens are chosen.
        max_new: tokens to draw a row, at least 1.
        stop_ids: tokens that end a row.
        slide: when a row reaches the context's end, read its last half again and go on; otherwise refuse at once.
        seed: of all draws.
        tokens_a_call: see `TOKENS_A_CALL`; 1 shows every token as it comes.
        mesh: of the parameters; rows are split over it as in training.
    """

    decoder: Decoder
    params: PyTree
    sampling: Sampling
    max_new: int
    stop_ids: tuple[int, ...] = ()
    slide: bool = False
    seed: int = 0
    tokens_a_call: int = TOKENS_A_CALL
    mesh: Mesh | None = None

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        numbers: Sequence[tuple[int, int]] | None = None,
        watch: Callable[[int, list[int]], bool] | None = None,
    ) -> list[list[int]]:
        """The new tokens of each prompt, a stop token not included.

        Args:
            prompts: ids, at least one each.
            numbers: (prompt, sample) of each row among all that are asked for; with the seed and the row's own text
                they are all that its draws depend on. None: (0, 0), (1, 0), ...
            watch: (row, new tokens) -> whether the row shall end here; called as tokens come.

        Raises:
            UsageError: a prompt with its continuation is longer than the context, and `slide` is off.
        """
        if not self.slide:
            check_lengths(prompts, self.max_new, self.decoder.max_positions)
        rows = len(prompts)
        numbers = [(row, 0) for row in range(rows)] if numbers is None else numbers
        texts, new = [list(map(int, prompt)) for prompt in prompts], [[] for _ in prompts]
        ended, begins = [False] * rows, [0] * rows
        state, capacity, drawn = None, 0, 0
        with contextlib.nullcontext() if self.mesh is None else sharding.mesh_context(self.mesh):
            while drawn < self.max_new and not all(ended):
                if capacity == 0:
                    state, first, capacity = self._begin(texts, begins, numbers, drawn)
                    tokens_BN = first[:, None]
                else:
                    count = min(self.tokens_a_call, capacity, self.max_new - drawn)
                    state, tokens_BN = self._advance(state, count)
                    tokens_BN, capacity = tokens_BN[:rows], capacity - tokens_BN.shape[1]
                drawn += tokens_BN.shape[1]
                for row in range(rows):
                    if not ended[row]:
                        fresh, ended[row] = _until(tokens_BN[row], self.stop_ids)
                        texts[row] += fresh
                        new[row] += fresh
                        if watch is not None and watch(row, fresh):
                            ended[row] = True
        return new

    def _begin(
        self, texts: list[list[int]], begins: list[int], numbers: Sequence[tuple[int, int]], drawn: int
    ) -> tuple[State, np.ndarray, int]:
        """Reads the texts from `begins` on: (state, first drawn token of each row, how many more fit).

        Args:
            begins: where the context begins in each text; moved on where it is full.
        """
        limit = self.decoder.max_positions
        for row, text in enumerate(texts):  # each by its own length: whoever shares the batch changes nothing
            if len(text) - begins[row] > limit:
                begins[row] = len(text) - max(limit // 2, 1)
        read = [text[begin:] for text, begin in zip(texts, begins, strict=True)]
        room = min(limit - max(map(len, read)), self.max_new - drawn - 1)
        rows = self._padded(len(texts))
        read = [read[row % len(read)] for row in range(rows)]  # rows that only fill the mesh repeat the others
        tokens_BT, starts_B = right_aligned(read)
        seen_BV = None
        if self.sampling.remembers:
            seen_BV = np.zeros((rows, self.decoder.vocab_size), bool)
            for row in range(rows):
                seen_BV[row, texts[row % len(texts)]] = True
        state = begin(
            self.decoder,
            self.sampling,
            tokens_BT.shape[1] + rounded(room),
            self.params,
            self._placed(tokens_BT),
            self._placed(starts_B),
            row_keys(self.seed, np.resize(np.array(numbers, np.uint32), (rows, 2))),
            None if seen_BV is None else self._placed(seen_BV),
            np.int32(drawn),
            self._stops(),
        )
        return state, np.asarray(state.tokens_B)[: len(texts)], room

    def _advance(self, state: State, count: int) -> tuple[State, np.ndarray]:
        """Draws up to `count` tokens a row, fewer if all rows end: (state, tokens [B, n])."""
        before = int(state.number)
        state, tokens_BN = advance(
            self.decoder, self.sampling, self.tokens_a_call, self.params, state, np.int32(count), self._stops()
        )
        return state, np.asarray(tokens_BN)[:, : int(state.number) - before]

    def _padded(self, rows: int) -> int:
        """Rows of the arrays: a multiple of what the mesh divides them by."""
        step = 1 if self.mesh is None else sharding.axis_size(self.mesh, sharding.ROWS[0])
        return -(-rows // step) * step

    def _stops(self) -> np.ndarray:
        """Never empty: one program for no stop token and for one."""
        return np.array(self.stop_ids or (-1,), np.int32)

    def _placed(self, array: np.ndarray) -> Array:
        return jnp.asarray(array) if self.mesh is None else jax.device_put(array, sharding.batch_sharding(self.mesh))


def check_lengths(prompts: Sequence[Sequence[int]], max_new: int, context: int) -> None:
    """Raises UsageError where a prompt and its continuation exceed the context; the last token needs no place."""
    for i, prompt in enumerate(prompts, start=1):
        if len(prompt) + max_new - 1 > context:
            raise UsageError(
                f"prompt {i} has {len(prompt):,} tokens, with {max_new:,} new ones more than the model's context of "
                f"{context:,}; shorten it, ask for fewer (--max-new), or let the context slide (--slide)"
            )


def rounded(columns: int) -> int:
    """The next multiple of `COLUMNS`."""
    return -(-columns // COLUMNS) * COLUMNS


def right_aligned(rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """(tokens int32 [B, T], columns int32 [B] at which they begin) of rows of ids, T a multiple of `COLUMNS`."""
    columns = rounded(max(map(len, rows)))
    tokens_BT = np.zeros((len(rows), columns), np.int32)
    starts_B = np.array([columns - len(ids) for ids in rows], np.int32)
    for row, start, ids in zip(tokens_BT, starts_B, rows, strict=True):
        row[start:] = ids
    return tokens_BT, starts_B


def _until(tokens: np.ndarray, stop_ids: Collection[int]) -> tuple[list[int], bool]:
    """(tokens before the first stop token, whether there is one)."""
    ids = tokens.tolist()
    for i, token in enumerate(ids):
        if token in stop_ids:
            return ids[:i], True
    return ids, False
