"""Shows how runs stand; the code is bertgpt_jax/commands/status.py."""

import sys

from bertgpt_jax.commands.status import main

if __name__ == "__main__":
    sys.exit(main())
