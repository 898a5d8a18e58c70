"""What can be wrong with a model that comes in or leaves: one line with the thing and the value, the right exit code.

As in test_bad_input.py, the number of a row is that of the project's list of bad inputs; 0 is a row of its own. More of
rows 61 to 70: tests/transfer (damaged checkpoints, a run that writes, tensors that do not fit, proofs that fail) and
tests/commands/test_generate_command.py (prompts: empty, too long, of unknown tokens). What a damaged Hugging Face
directory does to one command it must do to all that read it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bertgpt_jax.commands import evaluate, export, fill_mask, generate, import_model, inspect_checkpoint, train
from bertgpt_jax.corpus.characters import Characters
from bertgpt_jax.models.bert import BertConfig
from bertgpt_jax.models.gpt import GptConfig
from bertgpt_jax.training import setup, storage
from bertgpt_jax.transfer import export as exporting
from bertgpt_jax.transfer import proof, reference, target
from bertgpt_jax.transfer.hf_tokenizer import write_tokenizer
from bertgpt_jax.transfer.import_model import import_model as save
from bertgpt_jax.transfer.source import Source, parameter_shapes

DATA, STORAGE, CONFIG = 65, 74, 78
SIZES = dict(num_layers=1, hidden_size=12, num_heads=2, intermediate_size=16, max_positions=40)
LETTERS = Characters("abcdefgh \n")
COMMANDS = {
    "evaluate": evaluate, "export": export, "fill_mask": fill_mask, "generate": generate, "import_model": import_model,
    "inspect_checkpoint": inspect_checkpoint, "train": train,
}  # fmt: skip

HF = ["--format", "hf", "--proof", "numpy", "--out", "@new"]
READERS = {
    "evaluate": ["@model", "--corpus", "@/text.txt"],
    "export": ["@model", *HF],
    "fill_mask": ["@model", "a[MASK]"],
    "generate": ["@model", "--prompt", "abc"],
    "import_model": ["@model", "--out", "@new"],
    "inspect_checkpoint": ["@model"],
    "train": ["continue/gpt2", "init_from=@model", "corpus.path=@/text.txt", "--workdir", "@new"],
}
"""What each command that reads a Hugging Face directory is called with."""


def random_source(config: GptConfig | BertConfig) -> Source:
    rng, leaves = np.random.default_rng(0), parameter_shapes(config)
    arrays = {path: rng.standard_normal(shape).astype(np.float32) for path, (_, shape) in leaves.items()}
    return Source(config, LETTERS, leaves, lambda paths: {p: arrays[p] for p in paths}, "random", None, {})


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Workdirs `gpt`, `bert`, `strange` (no model of transformers) and `copied`; directories `gpt-hf`, `bert-hf`."""
    root = tmp_path_factory.mktemp("models")
    (root / "text.txt").write_text("abc def.\n\nfed cba.\n\n" * 40)
    save(random_source(BertConfig(**SIZES, vocab_size=16, norm_position="pre", norm="rms")), str(root / "strange"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(proof, "run_reference", lambda d, batch, kind, layers: reference.with_numpy(d, batch, layers))
        for name, kind in (("gpt", GptConfig), ("bert", BertConfig)):
            source = random_source(kind(**SIZES, vocab_size=LETTERS.vocab_size))
            save(source, str(root / name))
            exporting.export_hf(source, str(root / f"{name}-hf"), reference="numpy")
    shutil.copytree(root / "gpt", root / "copied")
    shutil.copytree(root / "copied" / "checkpoints" / "0", root / "copied" / "checkpoints" / "9")
    return root


@pytest.fixture
def call(places, tmp_path, monkeypatch, capsys):
    """call(command, arguments, model) -> (exit code, the line); nothing may be written, nothing compiled."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("lower_train_step", "lower_eval_step"):
        monkeypatch.setattr(setup, name, lambda *_: pytest.fail("the bad input was found too late: compiling"))

    def run(command: str, arguments: list[str], model: Path = places / "gpt-hf") -> tuple[int, str]:
        before = sorted(path for root in (places, tmp_path) for path in root.rglob("*"))
        filled = {"@model": str(model), "@new": str(tmp_path / "new"), "@": str(places)}
        argv = list(arguments)
        for name, value in filled.items():
            argv = [argument.replace(name, value) for argument in argv]
        code = COMMANDS[command].main(argv)
        err = capsys.readouterr().err
        lines = err.rstrip("\n").split("\n")
        assert "Traceback" not in err and [line for line in lines if line.startswith("error: ")] == lines[-1:], err
        assert sorted(path for root in (places, tmp_path) for path in root.rglob("*")) == before
        return code, lines[-1]

    return run


# ---------------------------------------------------------------- Hugging Face directories, in every command


def write(name: str, data: bytes):
    return lambda directory: (directory / name).write_bytes(data)


def remove(name: str):
    return lambda directory: (directory / name).unlink()


def rename_shard(directory: Path, shard: str) -> None:
    (directory / "model.safetensors").rename(directory / "model-00001-of-00001.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": shard}}))


def other_family(directory: Path) -> None:
    tree = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(tree | {"model_type": "llama"}))


def pickled(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def larger_tokenizer(directory: Path) -> None:
    encoder = "bert" in directory.name
    write_tokenizer(Characters("abcdefghijklmnop \n"), directory, SIZES["max_positions"], encoder=encoder)


HEADER_OF_2_GB = struct.pack("<Q", 2 << 30) + b"{}" * 99
# (row, name, what is done to a good directory, exit code, what the line must hold)
DAMAGES = [
    (66, "no_config", remove("config.json"), CONFIG, ["config.json is missing"]),
    (66, "torn_config", write("config.json", b'{"model_type": '), CONFIG, ["config.json:1", "not JSON"]),
    (66, "pickle_only", pickled, CONFIG, ["pytorch_model.bin", "runs code", "save_pretrained"]),
    (66, "no_shard", lambda d: rename_shard(d, "model-00002-of-00002.safetensors"), DATA,
     ["'model-00002-of-00002.safetensors' is missing"]),
    (66, "index_leaves", lambda d: rename_shard(d, "../model.safetensors"), DATA, ["'../model.safetensors' is not"]),
    (68, "header_of_2_gb", write("model.safetensors", HEADER_OF_2_GB), DATA, ["claims 2,147,483,648 bytes", "has 206"]),
    (68, "garbage", write("model.safetensors", b"garbage" * 99), DATA, ["model.safetensors is no safetensors file"]),
    (68, "pickle_by_another_name", write("model.safetensors", b"\x80\x04\x95" + b"0" * 99), DATA,
     ["model.safetensors is a pickle or zip archive by another name"]),
    (66, "other_family", other_family, CONFIG, ["model_type 'llama'", "known: bert, roberta, gpt2, openai-gpt"]),
    (58, "torn_tokenizer", write("tokenizer.json", b"{"), CONFIG, ["tokenizer.json:1", "not JSON"]),
    (0, "larger_tokenizer", larger_tokenizer, DATA, ["24 ids, the model's table 16 rows"]),
]  # fmt: skip
NOT_ITS_CONCERN = {("inspect_checkpoint", name) for name in ("other_family", "torn_tokenizer", "larger_tokenizer")}
"""`inspect_checkpoint` shows tensors of any model, and reads no tokenizer."""


@pytest.mark.parametrize("command", READERS)
@pytest.mark.parametrize(("row", "name", "damage", "code", "said"), DAMAGES, ids=[f"{d[0]}-{d[1]}" for d in DAMAGES])
def test_a_damaged_directory(row, name, damage, code, said, command, call, places, tmp_path) -> None:
    if (command, name) in NOT_ITS_CONCERN:
        assert inspect_checkpoint.main([str(places / "gpt-hf")]) == 0
        return
    good = places / ("bert-hf" if command == "fill_mask" else "gpt-hf")
    model = Path(shutil.copytree(good, tmp_path / good.name))
    damage(model)
    found, line = call(command, READERS[command], model)
    if name == "no_config" and command == "import_model":
        said = ["no config.json"]
    assert (found, [part for part in said if part not in line]) == (code, []), line


# ---------------------------------------------------------------- checkpoints, targets, what cannot be expressed


ROWS = [
    (61, "train", ["continue/bert", "init_from=@/gpt", "corpus.path=@/text.txt", "--workdir", "@new"], CONFIG,
     ["init_from '", "/gpt' is a gpt, the config trains a bert", "configs/continue/gpt2.py"]),
    (61, "train", ["continue/gpt2", "init_from=@/gpt", "corpus.path=@/text.txt", "extend.max_positions=39",
                   "--workdir", "@new"], CONFIG, ["extend.max_positions 39", "40", "never cut"]),
    (63, "export", ["@/copied", *HF, "--which", "9"], DATA, ["step 9", "saved as step 0 (was the directory copied?)"]),
    (63, "generate", ["@/copied", "--prompt", "a", "--which", "9"], DATA, ["saved as step 0"]),
    (63, "export", ["@/gpt", *HF, "--which", "5"], CONFIG, ["no checkpoint of step 5", "available: 0"]),
    (63, "import_model", ["@model", "--out", "/proc/none/run"], STORAGE, ["/proc/none"]),
    (69, "export", ["@/gpt", *HF[:-1], "@/text.txt"], CONFIG, ["text.txt' exists"]),
    (69, "export", ["@/gpt", *HF[:-1], "@/text.txt/hf"], CONFIG, ["text.txt' is a file"]),
    (69, "export", ["@/gpt", *HF[:-1], "@/gpt/checkpoints/hf"], CONFIG, ["lies inside the checkpoints of"]),
    (69, "export", ["@/gpt", "--format", "npz", "--out", "@/gpt/checkpoints/0/x"], CONFIG, ["inside the checkpoints"]),
    (69, "inspect_checkpoint", ["@/gpt", "--convert", "@/bert"], CONFIG, ["/bert' exists"]),
    (69, "import_model", ["@model", "--out", "@/gpt"], CONFIG, ["--out", "/gpt' exists"]),
    (70, "export", ["@/strange", *HF], CONFIG,
     ["transformers has no 'bert' like this", "model.norm_position = 'pre' (only 'post')",
      "model.norm = 'rms' (no counterpart)"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("command", "arguments", "code", "said"),
    [pytest.param(*row[1:], id=f"{row[0]}-{i}-{row[1]}") for i, row in enumerate(ROWS)],
)
def test_bad_model(command, arguments, code, said, call) -> None:
    found, line = call(command, arguments)
    assert (found, [part for part in said if part not in line]) == (code, []), line


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("export", ["@/gpt", *HF]),
        ("export", ["@/gpt", "--format", "npz", "--out", "@new"]),
        ("export", ["@/gpt", "--format", "stablehlo", "--out", "@new"]),
        ("inspect_checkpoint", ["@/gpt", "--convert", "@new"]),
        ("import_model", ["@model", "--out", "@new"]),
    ],
)
def test_row_69_no_space(command, arguments, call, monkeypatch) -> None:
    if "stablehlo" in arguments:
        pytest.importorskip("flatbuffers", reason="flatbuffers is not installed; pip install -e '.[stablehlo]'")
    monkeypatch.setattr(target.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    monkeypatch.setattr(storage, "free_bytes", lambda path: 1000)
    found, line = call(command, arguments)
    assert (found, "1,000 bytes left" in line) == (STORAGE, True), line


def test_row_63_a_directory_that_may_not_be_written(call, monkeypatch) -> None:
    def refuse(path: Path, *_, **__) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(target.Path, "mkdir", refuse)  # modes do not stop root
    found, line = call("export", ["@/gpt", *HF])
    assert (found, "/new': Permission denied; nothing is left there" in line) == (STORAGE, True), line


@pytest.mark.parametrize("command", [name for name in READERS if name != "train"])
def test_row_71_a_platform_that_is_not_here(command, repository, places, tmp_path) -> None:
    """In a process of its own: the platform is chosen before jax starts. Never the CPU without a word."""
    filled = {"@model": places / ("bert-hf" if command == "fill_mask" else "gpt-hf"), "@new": tmp_path / "new"}
    argv = [str(filled.get(argument, argument)).replace("@", str(places)) for argument in READERS[command]]
    ended = subprocess.run(
        [sys.executable, str(repository / "tools" / f"{command}.py"), *argv, "--platform", "tpu"],
        capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(repository)},
    )  # fmt: skip
    assert (ended.returncode, ended.stdout) == (CONFIG, ""), ended.stderr
    own = ended.stderr.splitlines()
    if importlib.util.find_spec("libtpu"):  # it says before us what it misses
        own = [line for line in own if line.startswith(("error", "Traceback"))]
    assert len(own) == 1 and own[0].startswith("error: --platform tpu: jax"), ended.stderr
    assert list(tmp_path.iterdir()) == []
