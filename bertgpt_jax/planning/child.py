"""`python -m bertgpt_jax.planning.child OUT`: compiles the job on stdin and writes what it found to OUT, both JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> None:
    """See `compiled.compile_step`, which starts it."""
    from bertgpt_jax.planning.compiled import compile_here

    Path(sys.argv[1]).write_text(json.dumps(compile_here(json.load(sys.stdin))))


if __name__ == "__main__":
    main()
