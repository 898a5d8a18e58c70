"""Measures speeds beside their peers; the code is bertgpt_jax/commands/benchmark.py."""

import sys

from bertgpt_jax.commands.benchmark import main

if __name__ == "__main__":
    sys.exit(main())
