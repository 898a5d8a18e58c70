"""Worker processes and the commands they are given."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from bertgpt_jax import errors
from bertgpt_jax.corpus.places import Place
from bertgpt_jax.errors import PeerError, UserError

_PACKAGE_ROOT = str(Path(__file__).parents[2])


class Pool:
    """Processes that answer commands (`corpus/worker.py`); a context manager that ends them.

    They read the plan at their first command, so they may be started while it is made.
    """

    def __init__(self, plan_file: Place, out: Place):
        environment = dict(os.environ, TOKENIZERS_PARALLELISM="false", PYTHONIOENCODING="utf-8")
        environment["PYDANTIC_DISABLE_PLUGINS"] = "__all__"  # looking for them takes a tenth of a worker's start
        inherited = [environment["PYTHONPATH"]] if environment.get("PYTHONPATH") else []
        environment["PYTHONPATH"] = os.pathsep.join([_PACKAGE_ROOT, *inherited])
        self._environment = environment
        self._command = [sys.executable, "-m", "bertgpt_jax.corpus.worker", str(plan_file), str(out)]
        self._processes: list[subprocess.Popen[str]] = []

    def start(self, workers: int) -> None:
        """Starts processes until there are so many."""
        for _ in range(workers - len(self._processes)):
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            self._processes.append(subprocess.Popen(self._command, env=self._environment, **pipes))

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream:
                    stream.close()

    def run(self, commands: Iterable[dict[str, Any]], last: Callable[[dict[str, Any]], bool]) -> Iterator[Any]:
        """Gives commands to idle processes; yields (command, answer) as answers come.

        A process gets its next command after an answer for which `last` holds. The first error ends the run.

        Raises:
            UserError: of the kind the worker raised; PeerError: a worker died.
        """
        todo: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        for command in commands:
            todo.put(command)
        answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for process in self._processes:
            threading.Thread(target=_serve, args=(process, todo, answers, last), daemon=True).start()
        running = len(self._processes)
        while running:
            item = answers.get()
            if item is None:
                running -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield item


def _serve(
    process: subprocess.Popen[str],
    todo: queue.SimpleQueue[dict[str, Any]],
    answers: queue.SimpleQueue[Any],
    last: Callable[[dict[str, Any]], bool],
) -> None:
    """Feeds one process; runs in a thread of its own."""
    assert process.stdin is not None and process.stdout is not None
    while True:
        try:
            command = todo.get_nowait()
        except queue.Empty:
            answers.put(None)
            return
        try:
            process.stdin.write(json.dumps(command) + "\n")
            process.stdin.flush()
            answer: dict[str, Any] = {}
            while not last(answer):
                line = process.stdout.readline()
                if not line:
                    raise BrokenPipeError
                answer = json.loads(line)
                if "error" in answer:
                    answers.put(_error(answer))
                    return
                answers.put((command, answer))
        except (OSError, ValueError):
            answers.put(PeerError(_death(process, command)))
            return


def _error(answer: dict[str, Any]) -> Exception:
    """The error a worker reported, of its own class if it is one of ours."""
    for kind in vars(errors).values():
        if isinstance(kind, type) and issubclass(kind, UserError) and kind.exit_code == answer["exit_code"] != 1:
            return kind(answer["error"])
    return RuntimeError(f"a worker failed:\n{answer['error']}")


def _death(process: subprocess.Popen[str], command: dict[str, Any]) -> str:
    code = process.wait()
    reason = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
    advice = "out of memory? lower corpus.workers or corpus.shard_bytes" if code == -9 else "its output is above"
    return f"a worker died on {json.dumps(command)[:80]} ({reason}; {advice}); the same command continues"
