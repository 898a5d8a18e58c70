"""What a build says when it ends."""

from __future__ import annotations

import dataclasses
from typing import Any

from bertgpt_jax.corpus.cleaning import CHANGES, DROPS
from bertgpt_jax.corpus.places import Place


@dataclasses.dataclass(frozen=True)
class Work:
    """What tokenising cost this time.

    Attributes:
        shards: those that were tokenised now; the others were finished before.
        seconds: wall time of tokenising them, training of the tokenizer not counted.
        worker_peak, parent_peak: bytes, the most resident memory of a worker (0 without workers) and of this process.
    """

    shards: tuple[int, ...]
    seconds: float
    worker_peak: int
    parent_peak: int


def report_lines(manifest: dict[str, Any], work: Work, out: Place) -> list[str]:
    """The closing report, a line each for documents, what was dropped and changed, sentences, tokens, speed, memory."""
    totals, cleaning, shards = manifest["totals"], manifest["cleaning"], manifest["shards"]
    tokens = totals["tokens"] - totals["documents"]
    held_out = totals["documents"] - totals["train_documents"]
    dropped = [f"{name} {cleaning[name]:,}" for name in DROPS if cleaning.get(name)]
    changed = [f"{name} {cleaning[name]:,}" for name in CHANGES if cleaning.get(name)]
    size, made = (sum(shards[name][i] for i in work.shards) for name in ("bytes", "tokens"))
    seconds = max(work.seconds, 1e-9)
    worker = f"{work.worker_peak / 1e6:,.0f} MB a worker, " if work.worker_peak else ""
    return [
        f"corpus {out}: {manifest['fingerprint'][:12]}, {len(shards['tokens'])} shards",
        f"  documents  {totals['documents']:,} ({held_out:,} held out) of {cleaning.get('documents_read', 0):,} read",
        f"  dropped    {', '.join(dropped) or 'none'}",
        f"  changed    {', '.join(changed) or 'none'}",
        f"  sentences  {totals['sentences']:,}",
        f"  tokens     {tokens:,} ({tokens / max(1, totals['bytes']):.3f} a byte of {totals['bytes']:,})",
        f"  unknown    {totals['unknown']:,} ({totals['unknown'] / max(1, tokens):.3%})",
        f"  speed      {seconds:.1f} s, {size / 1e6 / seconds:.2f} MB/s, {made / seconds:,.0f} tokens/s",
        f"  memory     {worker}{work.parent_peak / 1e6:,.0f} MB this process (peak resident)",
    ]


def nothing_left(path: str | tuple[str, ...], cleaning: dict[str, int]) -> str:
    """The message for a source of which cleaning left no document."""
    dropped = ", ".join(f"{name} {cleaning[name]}" for name in DROPS if cleaning.get(name)) or "none was found"
    read = cleaning.get("documents_read", 0)
    return f"corpus.path = {path!r}: no document is left of {read} read (dropped: {dropped})"
