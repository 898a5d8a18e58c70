"""Checks this machine; the code is bertgpt_jax/commands/doctor.py."""

import sys

from bertgpt_jax.commands.doctor import main

if __name__ == "__main__":
    sys.exit(main())
