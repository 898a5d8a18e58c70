"""Evaluates a workdir on held-out text; the code is bertgpt_jax/commands/evaluate.py."""

import sys

from bertgpt_jax.commands.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
