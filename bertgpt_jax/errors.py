"""What a user can do wrong or a machine can do to us, each with the exit code its command ends with.

Codes follow sysexits.h where it has one, so that a scheduler can tell "start me again" (75, 76) from "do not" (77, 78).
Every message is one line that names the thing, the value, the rule and the fix.
"""

from __future__ import annotations


class UserError(ValueError):
    """An error whose message is written for the user; commands print it without a traceback."""

    exit_code = 1


class UsageError(UserError):
    """The command line is wrong (64, EX_USAGE)."""

    exit_code = 64


class DataError(UserError):
    """A text, tokenizer, corpus or checkpoint holds something it must not (65, EX_DATAERR)."""

    exit_code = 65


class StorageError(UserError):
    """A path cannot be read or written (74, EX_IOERR)."""

    exit_code = 74


class Preempted(UserError):
    """The run was asked to stop, saved, and can be started again by the same command (75, EX_TEMPFAIL)."""

    exit_code = 75


class MachineBusy(UserError):
    """Something else uses the machine that is to be measured; try again later (75, EX_TEMPFAIL)."""

    exit_code = 75


class PeerError(UserError):
    """Another process of the run died, hung or did not come (76, EX_PROTOCOL)."""

    exit_code = 76


class Diverged(UserError):
    """The loss or the gradients stopped being finite; starting again would repeat it (77)."""

    exit_code = 77


class ConfigError(UserError):
    """A setting is unknown, out of range, or contradicts another or the workdir (78, EX_CONFIG)."""

    exit_code = 78
