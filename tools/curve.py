"""Draws learning curves; the code is bertgpt_jax/commands/curve.py."""

import sys

from bertgpt_jax.commands.curve import main

if __name__ == "__main__":
    sys.exit(main())
