"""Continues text with a GPT; the code is bertgpt_jax/commands/generate.py."""

import sys

from bertgpt_jax.commands.generate import main

if __name__ == "__main__":
    sys.exit(main())
