"""Exports: what they write, what they survive, and that a fault leaves nothing."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from bertgpt_jax.corpus.characters import Characters
from bertgpt_jax.errors import ConfigError, DataError, StorageError
from bertgpt_jax.models.bert import BertConfig
from bertgpt_jax.models.gpt import GptConfig
from bertgpt_jax.transfer import export, names, proof, target, writer
from bertgpt_jax.transfer.export import export_hf
from bertgpt_jax.transfer.families import family_of
from bertgpt_jax.transfer.hf_directory import open_directory
from bertgpt_jax.transfer.import_model import import_model
from bertgpt_jax.transfer.load import load_model
from bertgpt_jax.transfer.npz import export_npz
from bertgpt_jax.transfer.proof import ProofFailed
from bertgpt_jax.transfer.stablehlo import export_stablehlo


@pytest.fixture
def source(configs, make_source):
    return make_source(configs["gpt2"], tokenizer=Characters("".join(map(chr, range(32, 123)))))


def same(a, b) -> bool:
    return a.leaves == b.leaves and all(
        np.array_equal(a.read([path])[path], b.read([path])[path]) for path in a.leaves
    )  # fmt: skip


def test_an_export_holds_what_it_should_and_comes_back(source, tmp_path) -> None:
    """With the reference in its own process, as users run it."""
    out = tmp_path / "out"
    written = export_hf(source, str(out), reference="numpy", licence="apache-2.0")
    assert written["layers"] == 3 and written["outputs"]["logits"] < 1e-5 and written["texts_cut_alike"] == 4
    assert json.loads((out / "export_proof.json").read_text()) == written
    manifest = json.loads((out / "manifest.json").read_text())["files"]
    assert set(manifest) == {path.name for path in out.iterdir()} - {"manifest.json"}
    for name, entry in manifest.items():
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == entry["sha256"]
    assert {"generation_config.json", "tokenizer.json", "special_tokens_map.json", "training_args.json"} <= set(
        manifest
    )
    card = (out / "README.md").read_text()
    assert "license: apache-2.0" in card and "pipeline_tag: text-generation" in card and "4 rows" in card
    with safe_open(out / "model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}
    back = open_directory(out)
    assert same(back, source) and back.tokenizer.sha256 == source.tokenizer.sha256
    loaded = load_model(str(out), dtype="bfloat16")
    assert loaded.params["token_embedding"]["table"].dtype == jnp.bfloat16 and loaded.step is None


def test_shards_have_an_index_and_come_back(source, in_process, tmp_path) -> None:
    export_hf(source, str(tmp_path / "out"), shard_bytes=60_000, reference="numpy")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    sizes = [(tmp_path / "out" / file).stat().st_size for file in files]
    assert max(sizes) < 60_000 + 5_000 and index["metadata"]["total_size"] < sum(sizes)
    assert same(open_directory(tmp_path / "out"), source)


def test_bfloat16_is_the_rounded_source(source, in_process, tmp_path) -> None:
    export_hf(source, str(tmp_path / "out"), "bfloat16", reference="numpy")
    back = open_directory(tmp_path / "out")
    for path in source.leaves:
        expected = source.read([path])[path].astype(jnp.bfloat16).astype(np.float32)
        assert np.array_equal(back.read([path])[path], expected), path


def test_fewer_layers_are_compared_when_asked_and_the_proof_says_so(source, in_process, tmp_path) -> None:
    more = export_hf(source, str(tmp_path / "more"), reference="numpy", layers=5)
    assert more["layers"] == more["layers_of_model"] == 3
    written = export_hf(source, str(tmp_path / "out"), reference="numpy", layers=1)
    assert (written["layers"], written["layers_of_model"]) == (1, 3)
    assert "1 of 3 layers" in (tmp_path / "out" / "README.md").read_text()


# ---------------------------------------------------------------- faults


def flip_a_bit(monkeypatch) -> None:
    finish = writer.TensorWriter.finish

    def damaged(self) -> None:
        path = self.files[0]
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        finish(self)

    monkeypatch.setattr(writer.TensorWriter, "finish", damaged)


def transpose_a_kernel(monkeypatch) -> None:
    """In both directions alike, so that only the outputs can show it."""
    out, back = names.Name.to_theirs, names.Name.to_ours
    square = "layers/attention/output/kernel"
    monkeypatch.setattr(
        names.Name, "to_theirs", lambda self, a: out(self, a).T if self.ours == square else out(self, a)
    )
    monkeypatch.setattr(
        names.Name, "to_ours", lambda self, a, s: back(self, a.T, s) if self.ours == square else back(self, a, s)
    )


def swap_query_and_key(monkeypatch) -> None:
    """In the table itself: every tensor is as the table says it should be."""
    family = family_of(GptConfig(vocab_size=9))
    swapped = {"layers/attention/query": "layers/attention/key", "layers/attention/key": "layers/attention/query"}

    def table(config, special):
        rows = []
        for row in family.names(config, special):
            parent, _, leaf = row.ours.rpartition("/")
            rows.append(names.dataclasses.replace(row, ours=f"{swapped.get(parent, parent)}/{leaf}"))
        return rows

    monkeypatch.setattr(export, "family_of", lambda config: names.dataclasses.replace(family, names=table))


def wrong_tokenizer(monkeypatch) -> None:
    monkeypatch.setattr(proof, "encode_as_written", lambda directory, texts: [[1]] * len(texts))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (flip_a_bit, "read back differs from layers/"),
        (transpose_a_kernel, "first at layer 0"),
        (swap_query_and_key, "first at layer 0"),
        (wrong_tokenizer, "the written tokenizer cuts"),
    ],
)
def test_a_fault_fails_the_export_and_leaves_nothing(
    source, in_process, tmp_path, monkeypatch, fault, message: str
) -> None:
    fault(monkeypatch)
    with pytest.raises(ProofFailed, match=message):
        export_hf(source, str(tmp_path / "out"), reference="numpy")
    assert list(tmp_path.iterdir()) == []


def test_a_reference_that_cannot_load_fails_the_export(source, tmp_path, monkeypatch) -> None:
    """The real process: its last line is the reason."""
    monkeypatch.setattr(writer, "CODES", {"float32": "I32"})
    monkeypatch.setattr(proof, "compare_bits", lambda *_: 0)
    monkeypatch.setattr(export, "TensorFiles", lambda directory: None)
    with pytest.raises(ProofFailed, match="numpy cannot load what was written: .*type I32"):
        export_hf(source, str(tmp_path / "out"), reference="numpy")
    assert list(tmp_path.iterdir()) == []


def test_a_kill_leaves_no_target_and_the_next_export_cleans_up(source, in_process, tmp_path) -> None:
    (tmp_path / ".out.999999999.partial").mkdir()
    (tmp_path / ".out.1.partial").mkdir()  # of an export that runs
    export_hf(source, str(tmp_path / "out"), reference="numpy")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.1.partial", "out"]


# ---------------------------------------------------------------- what cannot be


@pytest.mark.parametrize(
    ("config", "complaints"),
    [
        (dict(kind="bert", norm_position="pre"), ["norm_position = 'pre'"]),
        (
            dict(kind="gpt", norm_position="post", activation="gelu"),
            ["final_norm = True", "'gelu'", "intermediate_size"],
        ),
        (dict(kind="gpt", final_norm=False), ["final_norm = False"]),
        (dict(kind="gpt", norm="rms"), ["model.norm = 'rms' (no counterpart)"]),
        (dict(kind="bert", norm="rms", norm_position="pre"), ["model.norm = 'rms'", "norm_position = 'pre'"]),
        (
            dict(kind="bert", position_offset=2, next_sentence_head=False, activation="relu", norm_position="pre"),
            ["'roberta'", "norm_position", "activation = 'relu'"],
        ),
    ],
)
def test_what_transformers_cannot_express_is_listed(make_source, tmp_path, config: dict, complaints: list) -> None:
    kind = config.pop("kind")
    sizes = dict(vocab_size=11, num_layers=1, hidden_size=8, num_heads=2, intermediate_size=12, max_positions=9)
    model = (BertConfig if kind == "bert" else GptConfig)(**sizes, **config)
    with pytest.raises(ConfigError) as caught:
        export_hf(make_source(model), str(tmp_path / "out"))
    assert all(complaint in str(caught.value) for complaint in complaints), caught.value
    assert list(tmp_path.iterdir()) == []


def test_the_target_must_be_free(source, tmp_path, monkeypatch) -> None:
    there = tmp_path / "there"
    there.mkdir()
    with pytest.raises(ConfigError, match=f"'{there}' exists"):
        export_hf(source, str(there))
    run = names.dataclasses.replace(source, label=f"{tmp_path}/run, step 7")
    with pytest.raises(ConfigError, match="inside the checkpoints"):
        export_hf(run, str(tmp_path / "run" / "checkpoints" / "hf"))
    with pytest.raises(ConfigError, match="is a file"):
        (tmp_path / "file").write_text("")
        export_hf(source, str(tmp_path / "file" / "hf"))
    monkeypatch.setattr(target.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(StorageError, match="1,000 bytes left"):
        export_hf(source, str(tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "there"]


def test_no_space_midway_leaves_nothing(source, tmp_path, monkeypatch) -> None:
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(StorageError, match="No space left"):
        export_hf(source, str(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_larger_than_the_table_is_refused(configs, make_source, tmp_path) -> None:
    tokenizer = Characters("".join(map(chr, range(32, 132))))
    with pytest.raises(DataError, match="106 ids, the model's table 101 rows"):
        export_hf(make_source(configs["gpt2"], tokenizer=tokenizer), str(tmp_path / "out"))


# ---------------------------------------------------------------- memory


def test_memory_stays_below_the_largest_shard(make_source, in_process, tmp_path) -> None:
    """A model of 200 MB in files of 40 MB, read from a generator: the process grows by less than 1.5 files."""
    shard = 40_000_000
    config = GptConfig(
        vocab_size=2000, num_layers=24, hidden_size=416, num_heads=4, intermediate_size=1664, max_positions=64
    )
    leaves = make_source(config.model_copy(update={"num_layers": 1})).leaves
    stacked = {
        path: (dtype, (24, *shape[1:]) if path.startswith("layers/") else shape)
        for path, (dtype, shape) in leaves.items()
    }  # fmt: skip

    def read(paths):
        return {path: np.full(stacked[path][1], 0.01, np.float32) for path in paths}

    big = names.dataclasses.replace(make_source(config), leaves=stacked, read=read)
    family = family_of(config)
    rows = family.names(config, export.SpecialIds())
    shapes = export.all_shapes(big, family, rows)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    export.write_tensors(big, family, rows, writer.TensorWriter(tmp_path, shapes, "float32", shard))
    proof.compare_bits(big, family, rows, export.TensorFiles(tmp_path), "float32")
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    total = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert total > 4 * shard
    assert grown < 1.5 * max(shard, 4 * 24 * 416 * 1664), f"{grown / 1e6:.0f} MB"


_GROWTH = """
import re, sys
from bertgpt_jax.commands.export import main

def resident(name):
    return int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

small, large, out, shard = sys.argv[1:]
options = ["--format", "hf", "--proof", "numpy", "--proof-layers", "2"]
assert main([small, "--out", out + "-small", *options]) == 0  # what is compiled and imported is no export's memory
before = resident("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
assert main([large, "--out", out, "--shard-size", shard, *options]) == 0
print(resident("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak of memory cannot be reset")
def test_memory_of_a_whole_export(make_source, tmp_path) -> None:
    """From a checkpoint on disk to proven files of 4/5 of it, as GPT-2 XL and 5 GB are, at a tenth of its size."""
    config = GptConfig(
        vocab_size=1000, num_layers=24, hidden_size=704, num_heads=8, intermediate_size=2816, max_positions=64
    )
    one = config.model_copy(update={"num_layers": 1})
    import_model(make_source(config), str(tmp_path / "large"))
    import_model(make_source(one), str(tmp_path / "small"))
    command = [sys.executable, "-c", _GROWTH, *(str(tmp_path / name) for name in ("small", "large", "out")), "460MB"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"XLA_FLAGS": ""})
    assert done.returncode == 0, done.stderr
    grown = int(done.stdout.splitlines()[-1])
    sizes = sorted(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(sizes) == 2 and sizes[-1] > 0.75 * sum(sizes)
    print(f"grew by {grown:,} bytes, {grown / sizes[-1]:.2f} of the largest file, {grown / sum(sizes):.2f} of all")
    assert grown < 1.5 * sizes[-1]


# ---------------------------------------------------------------- other formats


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_npz_comes_back(source, tmp_path, dtype: str) -> None:
    assert export_npz(source, str(tmp_path / "out"), dtype) == len(source.leaves)
    with np.load(tmp_path / "out" / "params.npz", allow_pickle=False) as back:
        assert set(back.files) == set(source.leaves)
        for path in back.files:
            array = back[path].view(jnp.bfloat16) if dtype == "bfloat16" else back[path]
            assert np.array_equal(array, source.read([path])[path].astype(jnp.dtype(dtype)))
    described = json.loads((tmp_path / "out" / "model.json").read_text())
    assert GptConfig.model_validate(described["model"]) == source.model_config


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt1", "bert"])
def test_programs_run_again_at_any_batch(configs, make_source, tmp_path, name: str) -> None:
    """And a GPT's step, token by token with its cache, gives what the forward gives at every position."""
    pytest.importorskip("flatbuffers", reason="flatbuffers is not installed; pip install -e '.[stablehlo]'")
    from jax import export as jax_export

    from bertgpt_jax.transfer.source import nested
    from bertgpt_jax.transfer.stablehlo import empty_cache, make_forward

    source = make_source(configs[name])
    export_stablehlo(source, str(tmp_path / "out"))

    def load(file: str):
        return jax_export.deserialize((tmp_path / "out" / file).read_bytes()).call

    with np.load(tmp_path / "out" / "params.npz", allow_pickle=False) as arrays:
        params = nested({path: arrays[path] for path in arrays.files})
    ids = (np.arange(3 * 13).reshape(3, 13) % 101).astype(np.int32)
    gpt = name != "bert"
    inputs = {"tokens": ids} if gpt else {"tokens": ids, "types": ids % 2, "segments": np.ones_like(ids)}
    theirs, ours = (
        run(params, inputs) for run in (load("forward.stablehlo"), make_forward(source.model_config, "float32"))
    )
    first = (theirs, ours) if gpt else (theirs[0], ours[0])
    print(f"{name}: program read back and model {np.abs(first[0] - first[1]).max():.1e} apart")
    np.testing.assert_allclose(*first, atol=1e-5)
    assert first[0].shape == (3, 13, 101)
    if gpt:
        step, cache = load("step.stablehlo"), empty_cache(source.model_config, 3, 20, "float32")
        for i in range(13):
            logits, cache = step(params, ids[:, i], cache)
            np.testing.assert_allclose(logits, ours[:, i], atol=1e-5)


def test_no_directory_and_no_password_leaves(source, in_process, tmp_path) -> None:
    """Paths of this machine and user information in addresses stay here."""
    run = {"corpus": {"path": ["/home/me/a.txt", "gs://key@bucket/b.txt"]}, "stages": [], "init_from": "/home/me/hf"}
    meta = {"config": run, "metrics": {"eval/loss": 1.5}, "data_fingerprint": "ab", "note": "https://me:secret@host/x"}
    names_of = ("documents", "train_documents", "tokens", "train_tokens", "bytes", "train_bytes")
    data = {"": dict(zip(names_of, (30, 25, 4000, 3500, 9000, 8000), strict=True))}
    export_hf(names.dataclasses.replace(source, meta=meta, label="/home/me/run, step 7"), str(tmp_path / "out"),
              reference="numpy", data=data)  # fmt: skip
    for path in (tmp_path / "out").glob("*.[jm]*"):
        text = path.read_bytes()
        assert b"/home/me" not in text and b"key@" not in text and b"secret" not in text, path
    card = (tmp_path / "out" / "README.md").read_text()
    assert "a.txt, b.txt" in card
    assert "- data: 25 documents with 3,500 tokens (8,000 bytes) to train on, 5 held out" in card
    assert json.loads((tmp_path / "out" / "training_args.json").read_text())["data"] == data
