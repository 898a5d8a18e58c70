"""Starts a command as several processes of one job on this machine, over loopback, and keeps them together."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from bertgpt_jax.commands.common import command_parser, run_command
from bertgpt_jax.errors import PeerError, Preempted, UsageError

EPILOG = """\
examples:
  %(prog)s -n 2 --devices 4 -- python tools/train.py configs/quickstart.py --workdir runs/two
  %(prog)s -n 4 --max-restarts 10 -- bertgpt train bert/base corpus.path='wiki/*.gz'

Each process gets JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, which training reads. Their lines are
printed with the process number. When one fails the others have some seconds to end by themselves and are then stopped.
The exit code is that of the process that failed first; of one that a signal ended, 128 + the signal, but 76 for
SIGABRT, with which jax ends a process whose peers are gone. With --max-restarts, the job starts again after 75 (stopped
on request), 76 (a process was lost) and signals, as the supervisor of a pod would; other codes need a person.
"""

GRACE_SECONDS = 20.0
"""How long the others may take to notice, save and end when one has failed, before they are killed."""

RESTARTED = frozenset({Preempted.exit_code, PeerError.exit_code})
"""Exit codes after which the same command is worth starting again."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `tools/launch_local.py` and `bertgpt launch_local`."""
    parser = command_parser("launch_local", __doc__, EPILOG)
    parser.add_argument("-n", "--processes", type=int, required=True, help="how many processes")
    parser.add_argument("--devices", type=int, metavar="D", help="make D CPU devices in each process")
    parser.add_argument("--max-restarts", type=int, default=0, help="start the job again at most this often")
    argv = list(sys.argv[1:] if argv is None else argv)
    split = argv.index("--") if "--" in argv else len(argv)
    command = argv[split + 1 :]

    def launch(args: argparse.Namespace) -> int:
        if not command:
            raise UsageError("nothing to start; write the command after '--'")
        if args.processes < 1 or args.max_restarts < 0 or (args.devices or 1) < 1:
            raise UsageError("-n and --devices start at 1, --max-restarts at 0")
        return supervise(command, args.processes, args.devices, args.max_restarts)

    return run_command(launch, parser, argv[:split])


def supervise(command: Sequence[str], processes: int, devices: int | None, max_restarts: int) -> int:
    """Runs the job, again where its exit code asks for it; returns the last run's exit code."""
    restarts = 0
    while True:
        job = Job(command, processes, devices)
        code = job.wait()
        again = (code in RESTARTED or code > 128) and not job.stopped
        if not again or restarts == max_restarts:
            left = f" after {restarts} restarts" if restarts else ""
            print(f"{processes} processes ended with exit code {code}{left}", file=sys.stderr)
            return code
        restarts += 1
        print(f"exit code {code}: restart {restarts} of {max_restarts}", file=sys.stderr)


class Job:
    """The processes of one start of the command.

    Attributes:
        stopped: whether this process was asked to stop and passed that on.
    """

    def __init__(self, command: Sequence[str], processes: int, devices: int | None):
        self.stopped = False
        address = f"127.0.0.1:{_free_port()}"
        self._children = [
            subprocess.Popen(
                list(command),
                env=os.environ | process_environment(address, processes, rank, devices),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,  # Ctrl-C reaches them through us, once
            )
            for rank in range(processes)
        ]
        width = len(str(processes - 1))
        self._readers = [
            threading.Thread(target=_copy_lines, args=(child, f"[{rank:{width}}] "), daemon=True)
            for rank, child in enumerate(self._children)
        ]
        for reader in self._readers:
            reader.start()

    def wait(self) -> int:
        """The job's exit code, once all processes have ended."""
        with self._signals_passed_on():
            codes = self._wait_for_all()
        for reader in self._readers:
            reader.join(timeout=10)
        failed = [shell_code(code) for code in codes if code != 0]
        causes = [code for code in failed if code != PeerError.exit_code]  # "another one failed" is not the reason
        return next(iter(causes or failed), 0)

    def _wait_for_all(self) -> list[int]:
        """Exit codes in the order in which the processes ended."""
        running, codes, deadline = list(self._children), [], None
        while running:
            ended = [child for child in running if child.poll() is not None]
            running = [child for child in running if child not in ended]
            codes += [child.returncode for child in ended]
            if deadline is None and any(codes):
                deadline = time.monotonic() + GRACE_SECONDS
            if deadline is not None and time.monotonic() > deadline:
                codes += [PeerError.exit_code] * len(running)  # what they would have ended with, had they noticed
                for child in running:
                    child.kill()
                    child.wait()
                running = []
            time.sleep(0.05)
        return codes

    @contextmanager
    def _signals_passed_on(self) -> Iterator[None]:
        def pass_on(number: int, _: object) -> None:
            self.stopped = True
            for child in self._children:
                if child.poll() is None:
                    child.send_signal(number)

        before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def process_environment(address: str, processes: int, rank: int, devices: int | None) -> dict[str, str]:
    """What tells a process its place in the job; with `devices`, also how many CPU devices to make."""
    environment = {
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": str(processes),
        "JAX_PROCESS_ID": str(rank),
        "PYTHONUNBUFFERED": "1",
    }
    if devices:
        flags = os.environ.get("XLA_FLAGS", "").split()
        kept = [flag for flag in flags if "host_platform_device_count" not in flag]
        environment["XLA_FLAGS"] = " ".join([*kept, f"--xla_force_host_platform_device_count={devices}"])
        environment["JAX_PLATFORMS"] = "cpu"
    return environment


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _copy_lines(child: subprocess.Popen, prefix: str) -> None:
    for line in child.stdout:
        sys.stdout.write(prefix + line)
        sys.stdout.flush()


def shell_code(code: int) -> int:
    """What a process's end is to a supervisor: 128 + a signal's number, but SIGABRT (jax lost a peer) is 76."""
    if code in (-signal.SIGABRT, 128 + signal.SIGABRT):
        return PeerError.exit_code
    return code if code >= 0 else 128 - code
