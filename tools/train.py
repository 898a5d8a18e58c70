"""Pretrains a model; the code is bertgpt_jax/commands/train.py."""

import sys

from bertgpt_jax.commands.train import main

if __name__ == "__main__":
    sys.exit(main())
