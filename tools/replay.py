"""Prints what a step of a run was made of; the code is bertgpt_jax/commands/replay.py."""

import sys

from bertgpt_jax.commands.replay import main

if __name__ == "__main__":
    sys.exit(main())
