"""Plans a run for a TPU pod without one; the code is bertgpt_jax/commands/plan.py."""

import sys

from bertgpt_jax.commands.plan import main

if __name__ == "__main__":
    sys.exit(main())
