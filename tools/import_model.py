"""Imports a model of another program; the code is bertgpt_jax/commands/import_model.py."""

import sys

from bertgpt_jax.commands.import_model import main

if __name__ == "__main__":
    sys.exit(main())
