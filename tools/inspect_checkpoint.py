"""Shows, compares and converts checkpoints; the code is bertgpt_jax/commands/inspect_checkpoint.py."""

import sys

from bertgpt_jax.commands.inspect_checkpoint import main

if __name__ == "__main__":
    sys.exit(main())
