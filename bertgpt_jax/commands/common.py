"""What all commands share: the parser, exit codes of errors, and the platform chosen before jax is imported."""

from __future__ import annotations

import argparse
import dataclasses
import glob
import importlib.util
import logging
import os
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from bertgpt_jax.errors import ConfigError, Preempted, StorageError, UsageError, UserError

INTERNAL_ERROR = 70  # EX_SOFTWARE: an exception nobody wrote a message for
INTERRUPTED = 130  # what a shell reports for Ctrl-C; a training run saves and ends with 75 before it comes to this

# ---------------------------------------------------------------- parsing


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are `UsageError` (exit code 64), and whose positionals and options may mix."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        settings = {"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter, **settings}
        super().__init__(*args, **settings)
        self._has_verbs = False

    def add_subparsers(self, **settings: Any) -> Any:
        self._has_verbs = True
        return super().add_subparsers(**settings)

    def parse(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """Parses `argv`; `CONFIG --workdir DIR key=value` is understood, which plain `parse_args` refuses."""
        return self.parse_args(argv) if self._has_verbs else self.parse_intermixed_args(argv)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")


def command_parser(verb: str, description: str, epilog: str | None = None) -> Parser:
    """The parser of one command, named as the user called it, with `--debug`."""
    called = Path(sys.argv[0]).stem
    prog = f"bertgpt {verb}" if called == "bertgpt" else f"tools/{verb}.py"
    parser = Parser(prog=prog, description=description, epilog=epilog)
    parser.add_argument("--debug", action="store_true", help="show the traceback of every error; check more as it runs")
    return parser


def add_platform(parser: argparse.ArgumentParser) -> None:
    """Adds `--platform`, for commands that compute with jax."""
    parser.add_argument(
        "--platform", choices=sorted(_BACKENDS), default="auto", help="where to compute (auto: the accelerator)"
    )


def check_outputs(*files: Path | None) -> None:
    """Makes the directories of files to be written; for before hours of work whose result would find no place.

    Raises:
        StorageError: a file cannot be written there.
    """
    for file in filter(None, files):
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"'{file}' cannot be written: {error.strerror}: '{error.filename}'") from None
        if file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
            raise StorageError(f"'{file}' cannot be written: it is a directory or not yours; name another")


# ---------------------------------------------------------------- running


def run_command(
    function: Callable[[argparse.Namespace], int | None], parser: Parser, argv: Sequence[str] | None
) -> int:
    """Parses `argv`, calls `function`, and returns the exit code of what happened.

    A `UserError` is one line on stderr (`--debug` adds its traceback). Anything unexpected keeps its traceback.
    """
    debug = "--debug" in (sys.argv[1:] if argv is None else argv)
    _show_log()
    try:
        return function(parser.parse(argv)) or 0
    except UserError as error:
        return _report(error, error.exit_code, debug)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # `... | head` has read enough; python would complain again when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        return _report(error, StorageError.exit_code, debug)
    except Exception:
        traceback.print_exc()
        doctor = "bertgpt doctor" if parser.prog.startswith("bertgpt ") else "tools/doctor.py"
        print(
            f"error: this is a bug in bertgpt_jax; please report the above, your command and what {doctor} prints",
            file=sys.stderr,
        )
        return INTERNAL_ERROR


def leave(code: int) -> NoReturn:
    """Ends the process; at once where it failed and a thread still compiles what nobody will run.

    Python would wait for that thread, for minutes. With several processes it does: the others are told by its end.
    """
    if code and any(thread.name.startswith("compiler") for thread in threading.enumerate()):
        import jax

        if jax.process_count() == 1:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    sys.exit(code)


def _show_log() -> None:
    """What the package logs goes to stderr as plain lines, warnings as such; other packages' warnings too."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Plain())
    handler.addFilter(_is_news)
    logging.basicConfig(handlers=[handler])  # does nothing where someone else has seen to it
    logging.getLogger("bertgpt_jax").setLevel(logging.INFO)


class _Plain(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return f"{record.levelname.lower()}: {text}" if record.levelno >= logging.WARNING else text


def _is_news(record: logging.LogRecord) -> bool:
    """Choices are the same in every process: the first one tells them."""
    if record.levelno >= logging.WARNING or "jax" not in sys.modules:
        return True
    from bertgpt_jax.training.processes import is_primary

    return is_primary()


def _report(error: Exception, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    word = "stopped" if isinstance(error, Preempted) else "error"
    print(f"{word}: {error}", file=sys.stderr)
    return code


# ---------------------------------------------------------------- platform

_BACKENDS = {"auto": "", "cpu": "cpu", "gpu": "cuda,cpu", "tpu": "tpu,cpu"}
_TPU_VENDOR = "0x1ae0"
_TPU_DEVICES = frozenset({"0x0027", "0x0056", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076"})  # v2 to v7x
_TPU_VARIABLES = ("TPU_ACCELERATOR_TYPE", "TPU_WORKER_ID", "TPU_CHIPS_PER_HOST_BOUNDS", "TPU_NAME")


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """Hardware that jax can use once `extra` of this package is installed; `kind` is jax's name of its backend."""

    kind: str
    name: str
    extra: str

    @property
    def install(self) -> str:
        """The command that adds its backend."""
        return f"pip install 'bertgpt_jax[{self.extra}]'"


def visible_accelerators(root: Path = Path("/"), environ: Mapping[str, str] = os.environ) -> list[Accelerator]:
    """GPUs and TPUs this process may use, found from device files alone, without jax or a driver's library."""
    found = []
    gpus = len(_match(root, "dev/nvidia[0-9]*"))
    wsl = (root / "dev/dxg").exists() and bool(_match(root, "usr/lib/wsl/lib/libcuda.so*"))
    hidden = environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1", "NoDevFiles")
    if (gpus or wsl) and not hidden:
        found.append(Accelerator("gpu", f"{max(gpus, 1)} x {_gpu_model(root)}", "cuda"))
    tpus = len(_match(root, "dev/accel[0-9]*"))
    if not tpus and any(environ.get(name) for name in _TPU_VARIABLES):
        tpus = len(_match(root, "dev/vfio/[0-9]*"))
    tpus = tpus or _tpus_on_the_bus(root)
    if tpus:
        found.append(Accelerator("tpu", f"{tpus} x TPU {environ.get('TPU_ACCELERATOR_TYPE', '')}".strip(), "tpu"))
    return found


def _match(root: Path, pattern: str) -> list[str]:
    return glob.glob(str(root / pattern))


def _gpu_model(root: Path) -> str:
    for path in _match(root, "proc/driver/nvidia/gpus/*/information"):
        for line in Path(path).read_text(errors="replace").splitlines():
            if line.startswith("Model:"):
                return line.removeprefix("Model:").strip()
    return "NVIDIA GPU"


def _tpus_on_the_bus(root: Path) -> int:
    def value(path: Path) -> str:
        try:
            return path.read_text().strip()
        except OSError:
            return ""

    devices = [Path(path) for path in _match(root, "sys/bus/pci/devices/*")]
    return sum(value(d / "vendor") == _TPU_VENDOR and value(d / "device") in _TPU_DEVICES for d in devices)


def select_platform(platform: str) -> None:
    """Makes jax use `platform` (auto, cpu, gpu, tpu). Call it before anything imports jax."""
    backends = _BACKENDS[platform]
    if not backends:
        return
    os.environ["JAX_PLATFORMS"] = backends
    if "jax" in sys.modules:  # read at import; still adjustable until the first computation
        sys.modules["jax"].config.update("jax_platforms", backends)


def check_platform(platform: str) -> str:
    """The backend jax runs on; stops a run that would use the CPU beside an accelerator without being asked to.

    Raises:
        ConfigError: naming the hardware, the backend, and the pip command that adds what is missing.
    """
    import jax

    accelerators = visible_accelerators()
    try:
        backend = jax.default_backend()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0] or "no backend started"
        raise ConfigError(
            f"--platform {platform}: jax cannot start there ({reason}); {_advice(accelerators)}"
        ) from None
    if platform != "auto" and backend != platform:
        raise ConfigError(f"--platform {platform}: jax runs on {backend} instead; {_advice(accelerators)}")
    if backend == "cpu" and accelerators and not _asked_for().startswith("cpu"):
        names = " and ".join(a.name for a in accelerators)
        raise ConfigError(f"this machine has {names} but jax would run on the CPU; {_advice(accelerators)}")
    return backend


def _asked_for() -> str:
    """The backends that JAX_PLATFORMS or `select_platform` names, first choice first; empty if neither does."""
    import jax

    return jax.config.jax_platforms or ""


def _advice(accelerators: Sequence[Accelerator]) -> str:
    if not accelerators:
        return "no GPU or TPU is visible here; leave --platform out or pass --platform cpu"
    first = accelerators[0]
    if first.kind == "gpu" and _has_cuda_plugin():
        return "the CUDA plugin is installed but did not start: check nvidia-smi, or pass --platform cpu"
    return f"run {first.install}, or pass --platform cpu to use the CPU"


def _has_cuda_plugin() -> bool:
    return any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13, 14))
