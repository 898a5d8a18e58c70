"""Checks that packed documents do not see each other; the code is bertgpt_jax/commands/check_leak.py."""

import sys

from bertgpt_jax.commands.check_leak import main

if __name__ == "__main__":
    sys.exit(main())
