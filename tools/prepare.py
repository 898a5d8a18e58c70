"""Text to a tokenised corpus; the code is bertgpt_jax/commands/prepare.py."""

import sys

from bertgpt_jax.commands.prepare import main

if __name__ == "__main__":
    sys.exit(main())
