"""Describes a corpus in numbers; the code is bertgpt_jax/commands/corpus_report.py."""

import sys

from bertgpt_jax.commands.corpus_report import main

if __name__ == "__main__":
    sys.exit(main())
