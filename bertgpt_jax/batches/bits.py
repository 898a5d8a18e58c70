"""Random bits as a pure function of (seed, purpose, index): Philox4x32-10 and a keyed permutation, vectorised.

Everything random about a batch is drawn from here. There is no generator and no state: the words of an index are the
same whoever asks for them, in whatever order. Only integer operations are used, so NumPy versions and machines agree.

Philox: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011); constants from their Random123.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np

Key = tuple[int, int]
"""Two 32-bit words that select a Philox stream."""

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_LOW = np.uint64(0xFFFFFFFF)
_HIGH = np.uint64(32)
_LANES = 1 << 13
"""Counters worked on at a time: six buffers of 64 KiB stay in cache."""

_FEISTEL_ROUNDS = 8


def stream(seed: int, *purpose: str | int) -> Key:
    """The key of the stream for a purpose: `stream(seed, "masks", epoch)`; other purposes are independent."""
    digest = hashlib.sha256("/".join(map(str, (seed, *purpose))).encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def philox4x32(key: Key, counters: np.ndarray) -> np.ndarray:
    """Philox4x32-10: uint32 counters [..., 4] to uint32 random words [..., 4]."""
    flat = counters.reshape(-1, 4)
    out = np.empty(flat.shape, np.uint32)
    for begin in range(0, len(flat), _LANES):
        lanes = slice(begin, begin + _LANES)
        _philox(key, [flat[lanes, i].astype(np.uint64) for i in range(4)], out[lanes])
    return out.reshape(counters.shape)


def _philox(key: Key, counter: list[np.ndarray], out: np.ndarray) -> None:
    """Writes the words of four counter words, uint64[...] each and overwritten, to `out` uint32[..., 4].

    Everything happens in six buffers that stay in cache: fresh arrays for each operation took three times as long.
    """
    c0, c1, c2, c3 = counter
    p0, p1 = np.empty_like(c0), np.empty_like(c0)
    k0, k1 = key
    for _ in range(_ROUNDS):
        np.multiply(c0, np.uint64(_MULTIPLIERS[0]), out=p0)
        np.multiply(c2, np.uint64(_MULTIPLIERS[1]), out=p1)
        np.right_shift(p1, _HIGH, out=c0)
        c0 ^= c1
        c0 ^= np.uint64(k0)
        np.right_shift(p0, _HIGH, out=c2)
        c2 ^= c3
        c2 ^= np.uint64(k1)
        p1 &= _LOW
        p0 &= _LOW
        c1, p1 = p1, c1
        c3, p0 = p0, c3
        k0 = (k0 + _WEYL[0]) & 0xFFFFFFFF
        k1 = (k1 + _WEYL[1]) & 0xFFFFFFFF
    for i, word in enumerate((c0, c1, c2, c3)):
        out[..., i] = word


def words(key: Key, index: np.ndarray, count: int, sub: np.ndarray | int = 0) -> np.ndarray:
    """`count` random uint32 words for each index.

    Args:
        key: from `stream`.
        index: non-negative int64 [R], below 2^64.
        count: words an index.
        sub: a second index below 2^32, [R] or one for all.

    Returns:
        uint32 [R, count]; a smaller count gives a prefix of a larger one.
    """
    index = np.asarray(index).astype(np.uint64)
    rows, blocks = len(index), -(-count // 4)
    low, high = (index & _LOW)[:, None], (index >> _HIGH)[:, None]
    second = np.broadcast_to(np.asarray(sub).astype(np.uint64), rows)[:, None]
    out = np.empty((rows, blocks, 4), np.uint32)
    step = max(1, _LANES // max(1, blocks))
    for begin in range(0, rows, step):
        some = slice(begin, begin + step)
        counter = [np.empty(out[some].shape[:2], np.uint64) for _ in range(4)]
        counter[0][:] = np.arange(blocks, dtype=np.uint64)
        counter[1][:], counter[2][:], counter[3][:] = second[some], low[some], high[some]
        _philox(key, counter, out[some])
    return out.reshape(rows, 4 * blocks)[:, :count]


def below(random: np.ndarray, bound: np.ndarray | int) -> np.ndarray:
    """Random uint32 words to int64 in [0, bound), bound <= 2^32 (bias at most bound / 2^32)."""
    return ((random.astype(np.uint64) * np.asarray(bound).astype(np.uint64)) >> _HIGH).astype(np.int64)


def happens(random: np.ndarray, probability: float) -> np.ndarray:
    """Random uint32 words to bool, True with `probability` (exactly never at 0, always at 1)."""
    return random.astype(np.uint64) < np.uint64(round(probability * 2**32))


def coin_sums(key: Key, index: np.ndarray, flips: np.ndarray, sub: np.ndarray | int = 0) -> np.ndarray:
    """Heads among `flips` fair coins for each index: int64 [R], a binomial draw that reads exactly `flips` bits."""
    flips = np.asarray(flips, np.int64)
    heads = np.zeros(len(flips), np.int64)
    some = np.flatnonzero(flips)
    if not len(some):
        return heads
    blocks = -(-flips[some] // 128)
    owner = np.repeat(np.arange(len(some)), blocks)
    first = np.cumsum(blocks) - blocks
    block = np.arange(len(owner)) - first[owner]
    counters = np.empty((len(owner), 4), np.uint32)
    wide = np.asarray(index).astype(np.uint64)[some][owner]
    counters[:, 0] = block
    counters[:, 1] = np.broadcast_to(sub, flips.shape)[some][owner]
    counters[:, 2] = wide & _LOW
    counters[:, 3] = wide >> _HIGH
    used = flips[some][owner, None] - 128 * block[:, None] - 32 * np.arange(4)
    keep = (np.uint64(1) << np.clip(used, 0, 32).astype(np.uint64)) - np.uint64(1)
    ones = np.bitwise_count(philox4x32(key, counters) & keep.astype(np.uint32))
    heads[some] = np.add.reduceat(ones.sum(1, dtype=np.int64), first)
    return heads


def permuted(key: Key, size: int, positions: np.ndarray) -> np.ndarray:
    """Images of `positions` under a keyed permutation of [0, size), in O(1) memory a position.

    A Feistel network over the two digits of a number in mixed radix a x b, a ~ b ~ sqrt(size), with cycle walking over
    the few numbers that exceed size (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).

    Args:
        positions: int64 [R], each in [0, size).

    Returns:
        int64 [R].
    """
    positions = np.asarray(positions, np.int64)
    if positions.size and not (0 <= positions.min() and positions.max() < size):
        raise IndexError(f"position {positions.min()}..{positions.max()} is outside the permutation of [0, {size})")
    radix = math.isqrt(max(size - 1, 0)) + 1
    radices = np.uint64(-(-size // radix) or 1), np.uint64(radix)
    keys = words(key, np.arange(_FEISTEL_ROUNDS), 2).astype(np.uint64)
    keys = (keys[:, 0] << _HIGH) | keys[:, 1]
    image = _feistel(keys, radices, positions.astype(np.uint64))
    outside = np.flatnonzero(image >= np.uint64(size))
    while len(outside):
        image[outside] = _feistel(keys, radices, image[outside])
        outside = outside[image[outside] >= np.uint64(size)]
    return image.astype(np.int64)


def _feistel(keys: np.ndarray, radices: tuple[np.uint64, np.uint64], value: np.ndarray) -> np.ndarray:
    """One pass of the network over uint64 values below the product of the radices."""
    left, right = np.divmod(value, radices[1])
    for i, key in enumerate(keys):
        if i % 2:
            right = (right + _mix(left, key)) % radices[1]
        else:
            left = (left + _mix(right, key)) % radices[0]
    return left * radices[1] + right


def _mix(value: np.ndarray, key: np.uint64) -> np.ndarray:
    """A 32-bit hash of uint64 values (the finaliser of splitmix64), small enough to be added without overflow."""
    x = value + key
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    return x >> _HIGH
