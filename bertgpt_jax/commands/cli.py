"""`bertgpt VERB ...`: one table from verb to module; the module is imported when its verb is called."""

from __future__ import annotations

import difflib
import importlib
import sys
from typing import NoReturn

import bertgpt_jax
from bertgpt_jax.commands.common import leave
from bertgpt_jax.errors import UsageError

VERBS = {
    "train": "pretrain a model: bertgpt train CONFIG [key=value ...] --workdir DIR",
    "evaluate": "held-out loss, perplexity and accuracies of a workdir",
    "tokenizer": "train a tokenizer; encode, decode or check text with it",
    "prepare": "turn text into a tokenised corpus",
    "bert_exact": "the instances of BERT's own script, as JSON lines",
    "curve": "draw learning curves to a PNG",
    "corpus_report": "a corpus in numbers: lengths, unknown tokens, duplicates, masks, padding",
    "plan": "whether a run fits a pod and how fast it is there, compiled without the pod",
    "replay": "what a step was made of: documents, sources, text, masks",
    "benchmark": "measure a speed beside its peers",
    "launch_local": "start a command as several processes over loopback",
    "status": "how runs stand, for people and for what watches them",
    "check_leak": "perturb single documents and see that nothing reaches any other",
    "generate": "continue text with a GPT",
    "fill_mask": "guess masked tokens with a BERT",
    "export": "write a model for transformers, NumPy or StableHLO, and prove it",
    "import_model": "make a workdir of a Hugging Face directory",
    "inspect_checkpoint": "steps, validity, sizes, metrics, tree; differences; conversion",
    "doctor": "versions, devices, storage, and what to install",
}
"""Verb to its line of help; the code of `verb` is `bertgpt_jax/commands/verb.py`."""


def main(argv: list[str] | None = None) -> int:
    """Runs `argv` (default: the process's arguments) and returns its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage(), file=sys.stdout if argv else sys.stderr)
        return 0 if argv else UsageError.exit_code
    if argv[0] == "--version":
        print(f"bertgpt_jax {bertgpt_jax.__version__}")
        return 0
    if argv[0] not in VERBS:
        close = difflib.get_close_matches(argv[0], VERBS, 1, 0.4)
        advice = f"did you mean '{close[0]}'?" if close else f"known: {', '.join(VERBS)}"
        print(f"error: unknown command '{argv[0]}'; {advice}", file=sys.stderr)
        return UsageError.exit_code
    return importlib.import_module(f"bertgpt_jax.commands.{argv[0]}").main(argv[1:])


def entry() -> NoReturn:
    """What `bertgpt` calls."""
    leave(main())


def usage() -> str:
    """The table of verbs."""
    lines = [f"  {verb:10} {text}" for verb, text in VERBS.items()]
    return "\n".join(["usage: bertgpt VERB ...", "", *lines, "", "bertgpt VERB --help says more; bertgpt --version"])
