"""Exports a model to another program's format; the code is bertgpt_jax/commands/export.py."""

import sys

from bertgpt_jax.commands.export import main

if __name__ == "__main__":
    sys.exit(main())
