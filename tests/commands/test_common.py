"""Exit codes of whatever a command raises, mixed arguments, and accelerators recognised from a made-up filesystem."""

from __future__ import annotations

import argparse
import importlib
import io
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from bertgpt_jax import errors
from bertgpt_jax.commands import common


def parser() -> common.Parser:
    made = common.command_parser("train", "a command")
    made.add_argument("config")
    made.add_argument("overrides", nargs="*")
    made.add_argument("--workdir")
    return made


def raising(error: BaseException):
    def function(args: argparse.Namespace) -> int:
        raise error

    return function


# ---------------------------------------------------------------- parsing


def test_overrides_and_options_mix() -> None:
    args = parser().parse(["base", "--workdir", "d", "a=1", "--debug", "b=2"])
    assert (args.config, args.workdir, args.overrides, args.debug) == ("base", "d", ["a=1", "b=2"], True)


def test_a_parser_with_verbs_keeps_its_verbs_and_their_errors() -> None:
    made = common.command_parser("tokenizer", "a command")
    made.add_subparsers(dest="verb", required=True).add_parser("train").add_argument("text")
    assert made.parse(["train", "words"]).text == "words"
    with pytest.raises(errors.UsageError, match="text"):
        made.parse(["train"])


@pytest.mark.parametrize("argv", [[], ["base", "--wordkir=d"], ["base", "--work", "d"]])
def test_a_wrong_command_line_is_64_in_one_line(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert common.run_command(lambda args: 0, parser(), argv) == 64
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1 and "--help" in message


@pytest.mark.parametrize(("called", "name"), [("/usr/bin/bertgpt", "bertgpt train"), ("x/train.py", "tools/train.py")])
def test_the_program_is_named_as_it_was_called(monkeypatch: pytest.MonkeyPatch, called: str, name: str) -> None:
    monkeypatch.setattr(sys, "argv", [called])
    assert parser().prog == name


# ---------------------------------------------------------------- exit codes


@pytest.mark.parametrize(
    ("error", "code", "word"),
    [
        (errors.UserError("m"), 1, "error"),
        (errors.UsageError("m"), 64, "error"),
        (errors.DataError("m"), 65, "error"),
        (errors.StorageError("m"), 74, "error"),
        (errors.Preempted("m"), 75, "stopped"),
        (errors.PeerError("m"), 76, "error"),
        (errors.Diverged("m"), 77, "error"),
        (errors.ConfigError("m"), 78, "error"),
        (PermissionError("m"), 74, "error"),
    ],
)
def test_a_users_error_is_one_line_and_its_code(error, code, word, capsys) -> None:
    assert common.run_command(raising(error), parser(), ["base"]) == code
    assert capsys.readouterr().err == f"{word}: m\n"


def test_debug_adds_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert common.run_command(raising(errors.DataError("m")), parser(), ["base", "--debug"]) == 65
    message = capsys.readouterr().err
    assert "Traceback" in message and message.endswith("\nerror: m\n")


def test_a_bug_keeps_its_traceback_and_says_where_to_turn(capsys: pytest.CaptureFixture[str]) -> None:
    assert common.run_command(raising(KeyError("loss")), parser(), ["base"]) == common.INTERNAL_ERROR
    message = capsys.readouterr().err
    assert "KeyError: 'loss'" in message and "doctor.py" in message.splitlines()[-1]


def test_an_interrupt_is_130_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert common.run_command(raising(KeyboardInterrupt()), parser(), ["base"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (3, 3)])
def test_the_functions_own_code_is_passed_on(returned: int | None, code: int) -> None:
    assert common.run_command(lambda args: returned, parser(), ["base"]) == code


def test_a_reader_that_stops_early_is_no_error(repository: Path) -> None:
    program = (
        "import sys; from bertgpt_jax.commands.common import *\n"
        "def f(args):\n    for _ in range(100000): print('x' * 100)\n"
        "sys.exit(run_command(f, command_parser('train', ''), []))"
    )
    started = subprocess.Popen(
        [sys.executable, "-c", program], cwd=repository, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert isinstance(started.stdout, io.BufferedReader) and started.stderr is not None
    started.stdout.readline()
    started.stdout.close()
    assert (started.wait(timeout=60), started.stderr.read()) == (0, b"")
    started.stderr.close()


# ---------------------------------------------------------------- hardware


def put(root: Path, *names: str, text: str = "") -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def test_nothing_is_seen_on_an_empty_machine(tmp_path: Path) -> None:
    put(tmp_path, "proc/driver/nvidia/version", "dev/accel/accel0", "dev/nvidiactl", "dev/vfio/vfio", "dev/vfio/12")
    assert common.visible_accelerators(tmp_path, {}) == []


def test_gpus_are_counted_and_named(tmp_path: Path) -> None:
    put(tmp_path, "dev/nvidia0", "dev/nvidia1", "dev/nvidiactl")
    put(tmp_path, "proc/driver/nvidia/gpus/0000:01:00.0/information", text="Model: \t NVIDIA H200\nIRQ: 1\n")
    assert common.visible_accelerators(tmp_path, {}) == [common.Accelerator("gpu", "2 x NVIDIA H200", "cuda")]


@pytest.mark.parametrize(("value", "seen"), [("", 0), ("-1", 0), ("0", 1), ("0,1", 1)])
def test_hidden_gpus_are_not_seen(tmp_path: Path, value: str, seen: int) -> None:
    put(tmp_path, "dev/nvidia0")
    assert len(common.visible_accelerators(tmp_path, {"CUDA_VISIBLE_DEVICES": value})) == seen


def test_a_gpu_under_wsl_is_seen(tmp_path: Path) -> None:
    put(tmp_path, "dev/dxg", "usr/lib/wsl/lib/libcuda.so.1")
    assert [a.kind for a in common.visible_accelerators(tmp_path, {})] == ["gpu"]


@pytest.mark.parametrize(
    ("files", "environ", "name"),
    [
        (["dev/accel0", "dev/accel1"], {}, "2 x TPU"),
        (["dev/vfio/0", "dev/vfio/1", "dev/vfio/vfio"], {"TPU_ACCELERATOR_TYPE": "v5p-8"}, "2 x TPU v5p-8"),
    ],
)
def test_tpus_are_seen_by_their_device_files(tmp_path: Path, files: list[str], environ: dict, name: str) -> None:
    put(tmp_path, *files)
    assert common.visible_accelerators(tmp_path, environ) == [common.Accelerator("tpu", name, "tpu")]


@pytest.mark.parametrize(("device", "count"), [("0x0063", 1), ("0x0042", 0)])
def test_tpus_are_seen_on_the_bus_and_googles_network_card_is_none(tmp_path: Path, device: str, count: int) -> None:
    put(tmp_path, "sys/bus/pci/devices/0000:00:05.0/vendor", text="0x1ae0\n")
    put(tmp_path, "sys/bus/pci/devices/0000:00:05.0/device", text=f"{device}\n")
    put(tmp_path, "sys/bus/pci/devices/0000:00:06.0/vendor", text="0x8086\n")
    assert len(common.visible_accelerators(tmp_path, {})) == count


# ---------------------------------------------------------------- platform

GPU = common.Accelerator("gpu", "8 x NVIDIA H200", "cuda")


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch):
    """Sets what jax runs on, what it was told to run on, and what the machine has."""

    def set_it(runs_on: str, told: str | None, machine: list[common.Accelerator], plugin: bool = False) -> None:
        monkeypatch.setattr(jax, "default_backend", lambda: runs_on)
        monkeypatch.setattr(common, "visible_accelerators", lambda: machine)
        monkeypatch.setattr(common, "_has_cuda_plugin", lambda: plugin)
        monkeypatch.setattr(common, "_asked_for", lambda: told or "")

    return set_it


@pytest.mark.parametrize(
    ("platform", "runs_on", "told", "machine"),
    [
        ("auto", "gpu", None, [GPU]),
        ("auto", "cpu", None, []),
        ("auto", "cpu", "cpu", [GPU]),
        ("cpu", "cpu", "cpu", [GPU]),
        ("gpu", "gpu", "cuda,cpu", [GPU]),
    ],
)
def test_a_platform_that_was_meant_is_accepted(backend, platform, runs_on, told, machine) -> None:
    backend(runs_on, told, machine)
    assert common.check_platform(platform) == runs_on


@pytest.mark.parametrize(
    ("platform", "told", "machine", "plugin", "words"),
    [
        ("auto", None, [GPU], False, ["8 x NVIDIA H200", "CPU", "bertgpt_jax[cuda]", "--platform cpu"]),
        ("auto", None, [GPU], True, ["8 x NVIDIA H200", "nvidia-smi"]),
        ("auto", None, [common.Accelerator("tpu", "4 x TPU", "tpu")], False, ["4 x TPU", "bertgpt_jax[tpu]"]),
        ("gpu", "cuda,cpu", [], False, ["--platform gpu", "cpu", "no GPU"]),
    ],
)
def test_a_silent_fall_back_to_the_cpu_is_refused(backend, platform, told, machine, plugin, words) -> None:
    backend("cpu", told, machine, plugin)
    with pytest.raises(errors.ConfigError) as caught:
        common.check_platform(platform)
    assert all(word in str(caught.value) for word in words)


def test_a_backend_that_cannot_start_is_a_config_error(backend, monkeypatch: pytest.MonkeyPatch) -> None:
    backend("cpu", "tpu,cpu", [])

    def fail() -> str:
        raise RuntimeError("Unable to initialize backend 'tpu': no libtpu\nmore")

    monkeypatch.setattr(jax, "default_backend", fail)
    with pytest.raises(errors.ConfigError, match=r"--platform tpu.*no libtpu"):
        common.check_platform("tpu")


@pytest.mark.parametrize(("platform", "runs_on"), [("cpu", "cpu"), ("auto", "cpu")])
def test_selecting_before_jax_is_imported_decides(repository: Path, platform: str, runs_on: str) -> None:
    program = (
        "from bertgpt_jax.commands.common import *\nimport sys\n"
        f"select_platform({platform!r})\nassert 'jax' not in sys.modules\nprint(check_platform({platform!r}))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=repository, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == runs_on


_LOGGING = """
import logging
from bertgpt_jax.commands.common import command_parser, run_command

def tell(args):
    import bertgpt_jax.training.run  # and with it all that sets up logging on its own
    logging.getLogger("bertgpt_jax.nn").info("attention: splash")
    logging.getLogger("bertgpt_jax.nn").warning("a step was skipped")
    logging.getLogger("elsewhere").info("chatter")
    logging.getLogger("elsewhere").warning("disk is slow")

raise SystemExit(run_command(tell, command_parser("tell", "tells"), []))
"""


def test_what_is_logged_is_shown_as_plain_lines() -> None:
    """In a process of its own: here pytest has its own ideas of logging."""
    done = subprocess.run([sys.executable, "-c", _LOGGING], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert done.stderr.splitlines() == ["attention: splash", "warning: a step was skipped", "warning: disk is slow"]


def test_files_that_cannot_be_written_are_refused_beforehand(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    common.check_outputs(None, tmp_path / "made" / "x.json", tmp_path / "file")
    assert (tmp_path / "made").is_dir() and not (tmp_path / "made" / "x.json").exists()
    for wrong in (tmp_path / "file" / "x.json", tmp_path / "made"):
        with pytest.raises(errors.StorageError, match=f"'{wrong}' cannot be written"):
            common.check_outputs(wrong)


@pytest.mark.parametrize(
    "command",
    [
        ("benchmark", "flops", "--json", "{}"),
        ("plan", "gpt/gpt2", "--topology", "v5e:4x4", "--json", "{}"),
        ("plan", "gpt/gpt2", "--topology", "v5e:4x4", "--png", "{}.png"),
        ("corpus_report", "bert/base", "--json", "{}"),
    ],
)
def test_no_command_works_for_a_file_that_has_no_place(command: tuple, tmp_path: Path, capsys) -> None:
    (tmp_path / "file").write_text("")
    name, *arguments = (part.format(tmp_path / "file" / "x") for part in command)
    begun = time.monotonic()
    assert importlib.import_module(f"bertgpt_jax.commands.{name}").main(arguments) == errors.StorageError.exit_code
    assert "cannot be written" in capsys.readouterr().err and time.monotonic() - begun < 5


@pytest.mark.parametrize(("code", "waits"), [(65, False), (0, True)])
def test_a_failure_does_not_wait_for_what_still_compiles(code: int, waits: bool) -> None:
    program = (
        "import time; from concurrent.futures import ThreadPoolExecutor as Pool; import jax;"
        "from bertgpt_jax.commands.common import leave;"
        "Pool(1, 'compiler').submit(lambda: (time.sleep(3), print('compiled', flush=True)));"
        f"print('said'); leave({code})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.split()) == (code, ["said", "compiled"] if waits else ["said"])
