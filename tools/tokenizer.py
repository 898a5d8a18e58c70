"""Trains and tries tokenizers; the code is bertgpt_jax/commands/tokenizer.py."""

import sys

from bertgpt_jax.commands.tokenizer import main

if __name__ == "__main__":
    sys.exit(main())
