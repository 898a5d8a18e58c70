"""inspect_checkpoint: reports, damage, differences, conversion."""

from __future__ import annotations

import dataclasses
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from bertgpt_jax.commands import inspect_checkpoint
from bertgpt_jax.corpus.characters import Characters
from bertgpt_jax.transfer.export import export_hf
from bertgpt_jax.transfer.import_model import import_model
from bertgpt_jax.transfer.load import load_model, open_source

SHAPE = "layers/attention/query/kernel"


@pytest.fixture(scope="module")
def source(make_source, configs):
    return make_source(configs["gpt2"], tokenizer=Characters("abc"))


@pytest.fixture(scope="module")
def saved(source, tmp_path_factory):
    """A workdir; tests that damage it copy it."""
    path = tmp_path_factory.mktemp("saved") / "run"
    import_model(source, str(path))
    return path


def run(capsys, *argv: str) -> tuple[int, str]:
    code = inspect_checkpoint.main(list(argv))
    caught = capsys.readouterr()
    return code, caught.out + caught.err


def test_a_report_says_all(saved, source, capsys, monkeypatch) -> None:
    """Without the model being built."""
    monkeypatch.setattr("bertgpt_jax.transfer.source.make_model", lambda *_: pytest.fail("the model was built"))
    code, said = run(capsys, str(saved), "--verify")
    assert code == 0
    for word in ("finished, step 0", "every bit as saved", "imported from     random", "one device", "orbax 0."):
        assert word in said, said
    assert source.tokenizer.sha256 in said and f"params/{SHAPE}" in said and "[3, 48, 3, 16]" in said
    meta = json.loads((saved / "checkpoints" / "0" / "meta.json").read_text())
    assert meta["state_fingerprint"] in said


def test_damage_is_said(saved, tmp_path, capsys) -> None:
    workdir = shutil.copytree(saved, tmp_path / "run")
    shutil.copytree(workdir / "checkpoints" / "0", workdir / "checkpoints" / "9")
    data = max((workdir / "checkpoints" / "0" / "state").rglob("*"), key=lambda p: p.stat().st_size * p.is_file())
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    code, said = run(capsys, str(workdir), "--verify")
    assert code == 0 and "it was saved as step 0 (was the directory copied?)" in said
    assert "is damaged" in said and "no checkpoint can be used" in said


def test_a_directory_is_reported_and_its_changes_seen(source, in_process, tmp_path, capsys) -> None:
    export_hf(source, str(tmp_path / "hf"), reference="numpy")
    code, said = run(capsys, str(tmp_path / "hf"))
    assert code == 0 and "gpt2, GPT2LMHeadModel" in said and "every file is as its manifest says" in said
    with (tmp_path / "hf" / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    assert "changed since the export: model.safetensors" in run(capsys, str(tmp_path / "hf"))[1]


def test_a_difference_is_found(saved, source, in_process, tmp_path, capsys) -> None:
    changed = {path: source.read([path])[path].copy() for path in source.leaves}
    changed[SHAPE][1, 2, 0, 3] += 0.5
    other = dataclasses.replace(source, read=lambda paths: {path: changed[path] for path in paths})
    export_hf(other, str(tmp_path / "hf"), reference="numpy")
    code, said = run(capsys, "--diff", str(saved), str(tmp_path / "hf"))
    assert code == 0 and f"{SHAPE}: differs by 5.000e-01 at most" in said
    assert f"{len(source.leaves) - 1} of {len(source.leaves)} parameters are equal bit for bit" in said


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layers_apart_and_together_again(saved, source, tmp_path, capsys, dtype: str) -> None:
    apart, together = str(tmp_path / "apart"), str(tmp_path / "together")
    assert run(capsys, str(saved), "--convert", apart, "--layers", "unstacked", "--dtype", dtype)[0] == 0
    with np.load(tmp_path / "apart" / "params.npz", allow_pickle=False) as arrays:
        assert arrays["layers/2/attention/query/kernel"].shape == (48, 3, 16) and SHAPE not in arrays.files
    assert run(capsys, apart, "--convert", together, "--dtype", dtype)[0] == 0
    loaded, expected = load_model(together), load_model(str(saved))
    assert loaded.tokenizer.sha256 == expected.tokenizer.sha256
    kernel = loaded.params["layers"]["attention"]["query"]["kernel"]
    wanted = expected.params["layers"]["attention"]["query"]["kernel"]
    assert np.array_equal(kernel, wanted if dtype == "float32" else wanted.astype(jnp.bfloat16))
    assert open_source(together).leaves == source.leaves


def test_usage(saved, tmp_path, capsys) -> None:
    assert run(capsys)[0] == 64 and run(capsys, str(saved), "--diff", "a", "b")[0] == 64
    code, said = run(capsys, "openai-community/gpt2")
    assert code == 78 and "hf download openai-community/gpt2 --local-dir gpt2" in said
    code, said = run(capsys, str(saved), "--convert", str(tmp_path / "x"), "--which", "5")
    assert code == 78 and "no checkpoint of step 5; available: 0" in said
    assert list(tmp_path.iterdir()) == []
