"""Guesses masked tokens with a BERT; the code is bertgpt_jax/commands/fill_mask.py."""

import sys

from bertgpt_jax.commands.fill_mask import main

if __name__ == "__main__":
    sys.exit(main())
