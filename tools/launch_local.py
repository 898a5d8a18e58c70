"""Starts a command as several processes on this machine; the code is bertgpt_jax/commands/launch_local.py."""

import sys

from bertgpt_jax.commands.launch_local import main

if __name__ == "__main__":
    sys.exit(main())
