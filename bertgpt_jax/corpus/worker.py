"""A process that works on shards: `python -m bertgpt_jax.corpus.worker PLAN OUT`.

Commands come as JSON lines on standard input, answers go as JSON lines to standard output:

    {"hash": 3}                                        ->  {"done": 3}
    {"sample": 3, "bytes": 100000, "documents": 1000}  ->  {"texts": [...]}
    {"tokenise": 3}                                    ->  {"progress": 512000} ... {"done": 3}

`{"error": message, "exit_code": 65}` answers a command that failed. The process ends at the end of its input, that is
also when its parent dies. It is started anew rather than forked or spawned by multiprocessing, which would import the
parent's main module and with it jax.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback

from bertgpt_jax.corpus.duplicates import hash_shard
from bertgpt_jax.corpus.kinds import load_tokenizer
from bertgpt_jax.corpus.memory import peak_resident_bytes
from bertgpt_jax.corpus.places import Place, find_place
from bertgpt_jax.corpus.plan import Plan, plan_from_json
from bertgpt_jax.corpus.shards import sample_shard, tokenise_shard
from bertgpt_jax.corpus.tokenizer import Tokenizer
from bertgpt_jax.errors import UserError


def main() -> int:
    """Answers commands until the input ends."""
    plan: Plan | None = None
    plan_file, out = map(find_place, sys.argv[1:3])
    gc.disable()  # a third of the time: it goes through lists of words again and again, and nothing here makes cycles
    parent = os.getppid()
    tokenizer: Tokenizer | None = None
    for line in sys.stdin:
        command = json.loads(line)
        plan = plan or plan_from_json(plan_file)
        try:
            if "tokenise" in command:
                tokenizer = tokenizer or load_tokenizer(out / "tokenizer")
                _tokenise(plan, command["tokenise"], tokenizer, out, parent)
            elif "hash" in command:
                hash_shard(plan, command["hash"], out)
                _answer({"done": command["hash"]})
            else:
                _answer({"texts": sample_shard(plan, command["sample"], command["bytes"], command["documents"])})
        except UserError as error:
            _answer({"error": str(error), "exit_code": error.exit_code})
        except Exception:
            _answer({"error": traceback.format_exc(), "exit_code": 1})
    return 0


def _tokenise(plan: Plan, index: int, tokenizer: Tokenizer, out: Place, parent: int) -> None:
    def progress(size: int) -> None:
        if os.getppid() != parent:
            os._exit(0)
        _answer({"progress": size})

    tokenise_shard(plan, index, tokenizer, out, progress)
    gc.collect()
    _answer({"done": index, "peak_bytes": peak_resident_bytes()})


def _answer(value: dict) -> None:
    try:
        sys.stdout.write(json.dumps(value) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:  # the parent was killed
        os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
