"""The recipes of docs/launch: they parse, their command is one that trains, and they restart what should be restarted.

The clouds' own programs are stand-ins that note how they were called and end as a test wants.
"""

from __future__ import annotations

import configparser
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from bertgpt_jax.commands import train
from bertgpt_jax.errors import ConfigError, DataError, Diverged, PeerError, Preempted, StorageError, UsageError

RECIPES = Path(__file__).resolve().parent.parent.parent / "docs" / "launch"
SCRIPTS = ("tpu_vm.sh", "xpk.sh", "slurm.sbatch")
NOTE = 'printf "%s\\0" "$@" >>"$NOTES/$(basename "$0")"; printf "\\x1e" >>"$NOTES/$(basename "$0")"\n'

AGAIN = (Preempted.exit_code, PeerError.exit_code, 134)
STOP = (
    Diverged.exit_code,
    ConfigError.exit_code,
    DataError.exit_code,
    StorageError.exit_code,
    UsageError.exit_code,
    70,
)
CODES: list[tuple[int, str]] = [(0, "done"), *((code, "again") for code in AGAIN), *((code, "stop") for code in STOP)]
"""What a supervisor does with each exit code (docs/launch/README.md)."""


class Machine:
    """A directory in which a recipe runs, with stand-ins for the programs it calls."""

    def __init__(self, root: Path, **environment: str):
        self.root, self.notes, self.bin = root, root / "notes", root / "bin"
        self.notes.mkdir()
        self.bin.mkdir()
        path = f"{self.bin}:{os.environ['PATH']}"
        self.environment = {"PATH": path, "HOME": str(root), "NOTES": str(self.notes)} | environment

    def stand_in(self, name: str, body: str = "", where: Path | None = None) -> Path:
        """A program that notes its arguments and does `body` (bash)."""
        program = (where or self.bin) / name
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text(f"#!/usr/bin/env bash\n{NOTE}{body}\n")
        program.chmod(0o755)
        return program

    def run(self, script: str, *arguments: str) -> subprocess.CompletedProcess:
        command = ["bash", "-c", script, *arguments] if "\n" in script else ["bash", script, *arguments]
        return subprocess.run(
            command, cwd=self.root, env=self.environment, capture_output=True, text=True, timeout=60, check=False
        )

    def calls(self, name: str) -> list[list[str]]:
        """The arguments of each call of a stand-in."""
        file = self.notes / name
        return [call.split("\0")[:-1] for call in file.read_text().split("\x1e")[:-1]] if file.exists() else []


# ---------------------------------------------------------------- the recipes


def slurm(root: Path, code: int = 0, restarts: int = 0) -> tuple[Machine, subprocess.CompletedProcess]:
    machine = Machine(root, SLURM_SUBMIT_DIR=str(root), SLURM_JOB_ID="7", SLURM_RESTART_COUNT=str(restarts))
    machine.stand_in("srun", f"exit {code}")
    machine.stand_in("scontrol")
    return machine, machine.run(str(RECIPES / "slurm.sbatch"))


def xpk(root: Path) -> dict[str, str]:
    """The options of the call of xpk."""
    machine = Machine(root, CLUSTER="mine", IMAGE="image", BUCKET="gs://bucket")
    machine.stand_in("xpk")
    assert machine.run(str(RECIPES / "xpk.sh")).returncode == 0
    ((_, _, *options),) = machine.calls("xpk")
    return dict(zip(options[::2], options[1::2], strict=True))


GCLOUD = """
case $4 in
  describe) cat "$NOTES/state" 2>/dev/null || exit 1 ;;
  create) echo READY >"$NOTES/state" ;;
  delete) rm "$NOTES/state" ;;
  ssh) line=$(head -n 1 "$NOTES/ends"); sed -i 1d "$NOTES/ends"
       [ "$line" = gone ] && { echo PREEMPTED >"$NOTES/state"; exit 255; }
       for code in $line; do echo "bertgpt ended with code $code"; done ;;
esac
"""
"""A slice whose workers end with the codes on the next line of the file `ends`, or which is taken away (`gone`)."""


def tpu_vm(root: Path, *ends: str, restarts: int = 5, **more: str) -> tuple[Machine, subprocess.CompletedProcess]:
    settings = {"NAME": "bert-base", "ZONE": "zone", "BUCKET": "gs://bucket", "REPOSITORY": "https://host/repository"}
    machine = Machine(root, **settings | more, WAIT="0", MAX_RESTARTS=str(restarts))
    machine.stand_in("gcloud", GCLOUD)
    (machine.notes / "ends").write_text("".join(f"{line}\n" for line in ends))
    return machine, machine.run(str(RECIPES / "tpu_vm.sh"))


def verbs(machine: Machine) -> list[str]:
    return [call[3] for call in machine.calls("gcloud") if call[3] != "describe"]


def remote(root: Path, **settings: str) -> str:
    """The command that every worker of a TPU slice is given."""
    (root / "here").mkdir()
    machine, _ = tpu_vm(root / "here", "0", **settings)
    call = next(call for call in machine.calls("gcloud") if call[3] == "ssh")
    return call[call.index("--command") + 1]


def on_worker(root: Path, code: int = 0) -> tuple[list[str], str]:
    """What a worker of a TPU slice starts, and its last line."""
    command = remote(root)
    (root / "there").mkdir()
    worker = Machine(root / "there")
    worker.stand_in("curl", "echo true")
    worker.stand_in("uv")
    program = worker.stand_in("python", f"exit {code}")
    worker.stand_in("git", f'[ "$1" != clone ] || {{ mkdir -p "$4/.venv/bin" && cp {program} "$4/.venv/bin/python"; }}')
    end = worker.run(command)
    assert end.stderr == "", end
    assert worker.calls("uv")[0] == ["pip", "install", "-q", "--python", ".venv", "-e", ".[tpu,gcs]"]
    (arguments,) = worker.calls("python")
    return arguments, end.stdout.splitlines()[-1]


def skypilot() -> dict[str, Any]:
    return yaml.safe_load((RECIPES / "skypilot.yaml").read_text())


def on_node(root: Path) -> list[str]:
    """What a node of a SkyPilot job starts."""
    machine = Machine(
        root, SKYPILOT_NODE_IPS="10.0.0.1\n10.0.0.2", SKYPILOT_NUM_NODES="2", SKYPILOT_NODE_RANK="1",
        **skypilot()["envs"],
    )  # fmt: skip
    machine.stand_in("python")
    end = machine.run(skypilot()["run"])
    assert (end.returncode, end.stderr) == (0, ""), end
    (arguments,) = machine.calls("python")
    return arguments


def jobset() -> dict[str, Any]:
    (document,) = yaml.safe_load_all((RECIPES / "jobset.yaml").read_text())
    return document["spec"]


def pods() -> dict[str, Any]:
    (job,) = jobset()["replicatedJobs"]
    return job["template"]["spec"]


def container() -> dict[str, Any]:
    (found,) = pods()["template"]["spec"]["containers"]
    return found


def training_command(recipe: str, root: Path) -> list[str]:
    """What each machine runs after `python`."""
    if recipe == "slurm.sbatch":
        machine, _ = slurm(root)
        ((wait, python, *arguments),) = machine.calls("srun")
        assert wait == "--kill-on-bad-exit=1" and python.endswith("/python")
        return arguments
    if recipe == "xpk.sh":
        return shlex.split(xpk(root)["--command"])[1:]
    if recipe == "tpu_vm.sh":
        return on_worker(root)[0]
    return on_node(root) if recipe == "skypilot.yaml" else container()["command"][1:]


ALL = ("tpu_vm.sh", "jobset.yaml", "xpk.sh", "skypilot.yaml", "slurm.sbatch")


# ---------------------------------------------------------------- they parse, and their command trains


def test_every_recipe_is_listed_and_tested() -> None:
    listed = set(re.findall(r"\]\(([\w.]+)\)", (RECIPES / "README.md").read_text()))
    files = {path.name for path in RECIPES.iterdir()} - {"README.md"}
    assert listed == files == {*ALL, "Dockerfile"}


@pytest.mark.parametrize("name", SCRIPTS)
def test_bash_reads_it(name: str) -> None:
    done = subprocess.run(["bash", "-n", RECIPES / name], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert os.access(RECIPES / name, os.X_OK)


@pytest.mark.parametrize("recipe", ALL)
def test_it_says_who_restarts_and_where_that_is_written(recipe: str) -> None:
    text = (RECIPES / recipe).read_text()
    assert "# Who restarts: " in text and "https://" in text
    assert all(re.search(rf"\b{code}\b", text) for code in (75, 76, 77, 78))


@pytest.mark.parametrize("recipe", ALL)
def test_its_command_trains(
    recipe: str, tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The command is what `--dry-run` accepts, with a platform that is meant and a workdir that all machines reach."""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.chdir(repository)
    tool, *arguments = [part for word in training_command(recipe, tmp_path) for part in _split(word)]
    assert tool == "tools/train.py"
    assert arguments[arguments.index("--workdir") + 1].startswith(("gs://", "/shared"))
    platform = arguments.index("--platform") + 1
    assert arguments[platform] in ("tpu", "gpu")
    arguments[platform] = "cpu"
    text = " ".join(arguments)
    assert "execution.distributed.auto=true" in text or "execution.distributed.coordinator=10.0.0.1:8476" in text
    capsys.readouterr()
    assert train.main([*arguments, "--dry-run"]) == 0
    assert re.search(r"model +(bert|gpt), [\d,]+ parameters", capsys.readouterr().out)


def _split(word: str) -> list[str]:
    return word.split("=", 1) if word.startswith("--") else [word]


def test_the_image_holds_what_it_needs(repository: Path) -> None:
    text = (RECIPES / "Dockerfile").read_text()
    assert re.search(r"^FROM python:3\.1[123]-slim$", text, re.MULTILINE)
    sources = [word for line in re.findall(r"^COPY (.*)$", text, re.MULTILINE) for word in line.split()[:-1]]
    assert sources and all((repository / source).exists() for source in sources)
    assert {"bertgpt_jax", "configs", "setup.cfg", "tools"} <= set(sources)
    setup = configparser.ConfigParser(comment_prefixes=("#",))
    setup.read(repository / "setup.cfg", "utf-8")
    extras = re.search(r"^ARG EXTRAS=(.*)$", text, re.MULTILINE).group(1).split(",")
    assert set(extras) <= set(setup["options.extras_require"]) and {"tpu", "gcs"} == set(extras)


def test_the_job_name_is_given_where_it_is_not_known() -> None:
    """By it a run started elsewhere takes its own lock over (`status.job_name`)."""
    (variable,) = container()["env"]
    assert variable["name"] == "BERTGPT_JOB" and "jobset-name" in variable["valueFrom"]["fieldRef"]["fieldPath"]
    assert "BERTGPT_JOB=$NAME" in (RECIPES / "tpu_vm.sh").read_text()
    assert '--env "BERTGPT_JOB=$NAME"' in (RECIPES / "xpk.sh").read_text()


def test_grace_after_sigterm() -> None:
    assert "#SBATCH --signal=TERM@120\n" in (RECIPES / "slurm.sbatch").read_text()
    assert "#SBATCH --requeue\n" in (RECIPES / "slurm.sbatch").read_text()
    assert pods()["template"]["spec"]["terminationGracePeriodSeconds"] >= 120


# ---------------------------------------------------------------- who restarts


@pytest.mark.parametrize(("code", "does"), [*CODES, (137, "again")])
def test_slurm(code: int, does: str, tmp_path: Path) -> None:
    machine, end = slurm(tmp_path, code)
    assert end.returncode == code
    assert machine.calls("scontrol") == ([["requeue", "7"]] if does == "again" else [])


def test_slurm_gives_up(tmp_path: Path) -> None:
    machine, end = slurm(tmp_path, 76, restarts=50)
    assert machine.calls("scontrol") == [] and "given up" in end.stdout


@pytest.mark.parametrize(("code", "does"), [*CODES, (137, "again")])
def test_tpu_vm(code: int, does: str, tmp_path: Path) -> None:
    machine, end = tpu_vm(tmp_path, f"{code} " * 4, "0 0 0 0")
    assert verbs(machine) == ["create", "ssh", *(["ssh"] if does == "again" else [])]
    assert end.returncode == (code if does == "stop" else 0), end


def test_tpu_vm_makes_the_slice_anew(tmp_path: Path) -> None:
    machine, end = tpu_vm(tmp_path, "gone", "134 76", "0 0")
    assert verbs(machine) == ["create", "ssh", "delete", "create", "ssh", "ssh"]
    assert end.returncode == 0 and "restart 2 of 5" in end.stdout


def test_tpu_vm_heeds_one_worker_that_says_stop(tmp_path: Path) -> None:
    machine, end = tpu_vm(tmp_path, "134 77 134 76", "0")
    assert verbs(machine) == ["create", "ssh"] and end.returncode == 77


def test_tpu_vm_gives_up(tmp_path: Path) -> None:
    machine, end = tpu_vm(tmp_path, *["76"] * 9, restarts=2)
    assert verbs(machine) == ["create", "ssh", "ssh", "ssh"] and end.returncode == 76


@pytest.mark.parametrize("code", [0, 75, 134])
def test_a_tpu_worker_tells_its_code(code: int, tmp_path: Path) -> None:
    assert on_worker(tmp_path, code)[1] == f"bertgpt ended with code {code}"


UV = """
[ "$1" = venv ] || exit 0
mkdir -p .venv/bin
printf '#!/usr/bin/env bash\\ngit log -1 --format=%%s >>"$NOTES/trained"\\n' >.venv/bin/python
chmod +x .venv/bin/python
"""
"""Makes an environment whose `python` notes which commit it trains."""

GROWS = """
commit() { git -c user.name=a -c user.email=a@b.c commit -q --allow-empty -m "$1"; }
[ -d .git ] || { git init -q -b main . && commit old && git tag release && git branch topic; }
for branch in main topic; do git checkout -q $branch && commit "$1 $branch" || exit 1; done
"""
"""A repository with two branches and a tag at their root, or one more commit on each branch."""


@pytest.mark.skipif(shutil.which("git") is None, reason="no git")
@pytest.mark.parametrize(
    ("revision", "trained"),
    [
        ("main", ["first main", "second main"]),
        ("topic", ["first topic", "second topic"]),
        ("release", ["old", "old"]),
        ("absent", []),
    ],
)
def test_a_tpu_worker_trains_what_a_branch_is_now(revision: str, trained: list[str], tmp_path: Path) -> None:
    """Started again in a clone of before. A tag stays what it was; what cannot be fetched is not trained."""
    command = remote(tmp_path, REVISION=revision)
    for name in ("there", "origin"):
        (tmp_path / name).mkdir()
    origin, worker = Machine(tmp_path / "origin"), Machine(tmp_path / "there")
    (worker.root / ".gitconfig").write_text(f'[url "file://{origin.root}"]\ninsteadOf = https://host/repository\n')
    worker.stand_in("uv", UV)
    ends = []
    for which in ("first", "second"):
        grown = origin.run(GROWS, "grow", which)
        assert grown.returncode == 0, grown
        ends.append(worker.run(command))
    (origin.root / ".git").rename(tmp_path / "gone")
    ends.append(worker.run(command))
    assert [end.returncode for end in ends] == ([0, 0, 1] if trained else [1, 1, 1]), ends
    notes = worker.notes / "trained"
    assert (notes.read_text().splitlines() if notes.exists() else []) == trained, ends


@pytest.mark.parametrize(("code", "does"), [*CODES, (137, "again")])
def test_jobset(code: int, does: str) -> None:
    """As Kubernetes documents it: a rule of the pods' policy names the reason why the Job failed, by which the set's
    rules decide; without one, a failed pod fails the Job (backoffLimit 0) and the set starts again."""
    spec, (rule,), (reaction,) = pods(), pods()["podFailurePolicy"]["rules"], jobset()["failurePolicy"]["rules"]
    assert spec["backoffLimit"] == 0 and spec["template"]["spec"]["restartPolicy"] == "Never"
    assert spec["parallelism"] == spec["completions"] and jobset()["failurePolicy"]["maxRestarts"] > 0
    on = rule["onExitCodes"]
    assert (rule["action"], on["operator"], on["containerName"]) == ("FailJob", "In", container()["name"])
    assert (reaction["action"], reaction["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    assert ("done" if code == 0 else "stop" if code in on["values"] else "again") == does


@pytest.mark.parametrize(("code", "does"), [*CODES, (137, "again")])
def test_xpk(code: int, does: str, tmp_path: Path) -> None:
    """As its help says: it restarts on 42, on 127 to 255, and on the codes it is given."""
    options = xpk(tmp_path)
    restarted = {42, *range(127, 256), *map(int, options["--restart-on-exit-codes"].split(","))}
    assert int(options["--max-restarts"]) > 0
    assert ("done" if code == 0 else "again" if code in restarted else "stop") == does


@pytest.mark.parametrize(("code", "does"), CODES)
def test_skypilot(code: int, does: str) -> None:
    """As its reference says: it recovers from the codes it is given, and from others `max_restarts_on_errors` times."""
    recovery = skypilot()["resources"]["job_recovery"]
    assert recovery["max_restarts_on_errors"] == 0
    assert ("done" if code == 0 else "again" if code in recovery["recover_on_exit_codes"] else "stop") == does
