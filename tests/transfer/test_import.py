"""Imports: identity with export, real foreign weights, and everything a directory can do wrong."""

from __future__ import annotations

import gzip
import itertools
import json
import shutil
import struct
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from bertgpt_jax.commands import export as export_command
from bertgpt_jax.commands import import_model as import_command
from bertgpt_jax.corpus.characters import Characters
from bertgpt_jax.errors import ConfigError, DataError, StorageError
from bertgpt_jax.models.gpt import Gpt
from bertgpt_jax.nn.blocks import ComputeConfig
from bertgpt_jax.nn.masks import causal_mask
from bertgpt_jax.transfer.export import export_hf
from bertgpt_jax.transfer.hf_directory import open_directory
from bertgpt_jax.transfer.import_model import import_model
from bertgpt_jax.transfer.load import load_model, open_source
from bertgpt_jax.transfer.mingpt import open_mingpt, read_tensors
from bertgpt_jax.transfer.source import nested

NANO = "weights/gpt-nano-sort/gpt-nano-sort-{}.json.gz"


@pytest.fixture(scope="module")
def exported(make_source, configs, tmp_path_factory):
    """Directories of a BERT and a GPT-2 with tokenizers; tests change copies."""
    from bertgpt_jax.transfer import proof, reference

    root = tmp_path_factory.mktemp("exported")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(proof, "run_reference", lambda d, batch, kind, layers: reference.with_numpy(d, batch, layers))
        for name in ("bert", "gpt2"):
            source = make_source(configs[name], tokenizer=Characters("".join(map(chr, range(32, 123)))))
            export_hf(source, str(root / name), reference="numpy")
    return root


@pytest.fixture
def directory(exported, tmp_path) -> Path:
    return Path(shutil.copytree(exported / "bert", tmp_path / "model"))


def equal(a, b) -> bool:
    return a.leaves == b.leaves and all(np.array_equal(a.read([p])[p], b.read([p])[p]) for p in a.leaves)


def test_a_workdir_of_an_import_exports_the_same_tensors(exported, in_process, tmp_path, capsys) -> None:
    workdir, back = tmp_path / "run", tmp_path / "back"
    assert import_command.main([str(exported / "gpt2"), "--out", str(workdir)]) == 0
    assert "finished" in capsys.readouterr().out
    loaded = load_model(str(workdir))
    assert loaded.step == 0 and loaded.tokenizer.kind == "characters"
    assert export_command.main([str(workdir), "--format", "hf", "--out", str(back), "--proof", "numpy"]) == 0
    theirs, ours = (load_file(d / "model.safetensors") for d in (exported / "gpt2", back))
    assert theirs.keys() == ours.keys() and all(np.array_equal(theirs[name], ours[name]) for name in theirs)
    for name in ("config.json", "tokenizer.json", "generation_config.json"):
        assert (back / name).read_bytes() == (exported / "gpt2" / name).read_bytes()


def change(directory: Path, edit) -> None:
    """Rewrites the tensors of a directory."""
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, directory / "model.safetensors")


def test_old_names_missing_copies_and_half_precision_are_read(exported, directory) -> None:
    whole = open_directory(exported / "bert")

    def old(tensors: dict) -> None:
        del tensors["cls.predictions.decoder.weight"], tensors["cls.predictions.decoder.bias"]
        for name in [name for name in tensors if "LayerNorm" in name]:
            last = {"weight": "gamma", "bias": "beta"}[name.rpartition(".")[2]]
            tensors[f"{name.rpartition('.')[0]}.{last}"] = tensors.pop(name)
        tensors["bert.embeddings.position_ids"] = np.arange(77, dtype=np.float32)

    change(directory, old)
    assert equal(open_directory(directory), whole)
    change(directory, lambda tensors: tensors.update({n: a.astype(np.float16) for n, a in tensors.items()}))
    half = open_directory(directory)
    table = half.read(["token_embedding/table"])["token_embedding/table"]
    assert table.dtype == np.float32
    assert np.array_equal(table, whole.read(["token_embedding/table"])["token_embedding/table"].astype(np.float16))


def test_a_copy_stands_in_for_its_original(exported, directory) -> None:
    change(directory, lambda tensors: tensors.pop(TABLE))
    assert equal(open_directory(directory), open_directory(exported / "bert"))


def test_a_bare_prefix_is_read(exported, tmp_path) -> None:
    """The hub's gpt2 has `wte.weight`, not `transformer.wte.weight`, and masks among its tensors."""
    directory = Path(shutil.copytree(exported / "gpt2", tmp_path / "model"))

    def bare(tensors: dict) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        del tensors["lm_head.weight"]
        tensors["h.0.attn.bias"] = np.tril(np.ones((1, 1, 77, 77), np.float32))

    change(directory, bare)
    assert equal(open_directory(directory), open_directory(exported / "gpt2"))


# ---------------------------------------------------------------- real foreign weights


@pytest.fixture(scope="module")
def nano(shared_data):
    return open_mingpt(shared_data / NANO.format("model"))


def test_the_stored_activations_are_reproduced(nano, shared_data) -> None:
    """The 24 activations stored beside their input, to 1e-5."""
    stored = read_tensors(shared_data / NANO.format("t0-partials"))
    config, params = nano.model_config, nested(nano.read(list(nano.leaves)))
    tokens = stored.pop("idx").astype(np.int32)
    rows, length = tokens.shape
    found = intermediates(config, params, tokens)
    del stored["config"]
    assert set(stored) == set(found) and len(found) == 24
    for name, array in stored.items():
        ours = found[name]
        visible = np.isfinite(array)  # what may not be seen is -inf there
        assert np.abs(np.where(visible, ours.reshape(array.shape) - np.where(visible, array, 0), 0)).max() <= 1e-5, name


def intermediates(config, params, tokens) -> dict[str, np.ndarray]:
    """Everything the stored file names, from our modules where they show it and by hand from our parameters inside."""
    from bertgpt_jax.nn.blocks import Block
    from bertgpt_jax.nn.layers import activation, layer_norm

    model, params = Gpt(config, ComputeConfig(unroll_layers=False)), jax.tree.map(jnp.asarray, params)
    tree, tokens = {"params": params}, jnp.asarray(tokens)
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    found = {
        "tok_emb": params["token_embedding"]["table"][tokens],
        "pos_emb": params["position_embedding"]["table"][positions[:1]],
        "x": model.apply(tree, tokens, positions, method="embed"),
    }
    first = jax.tree.map(lambda leaf: leaf[0], params["layers"])
    attention, inner = first["attention"], first["feed_forward"]

    def norm(name: str, x):
        return layer_norm(x, first[name]["scale"], first[name]["bias"], config.norm_eps)

    found["ln1"] = norm("attention_norm", found["x"])
    heads = {n: jnp.einsum("BTD,DNH->BNTH", found["ln1"], attention[n]["kernel"]) for n in ("query", "key", "value")}
    heads = {n: heads[n] + attention[n]["bias"][:, None] for n in heads}
    found |= {"q": heads["query"], "k": heads["key"], "v": heads["value"]}
    rows, _, length, _ = found["q"].shape
    flat = [found[n].swapaxes(1, 2).reshape(rows, length, -1) for n in "qkv"]
    found["qkv"] = jnp.concatenate(flat, -1)
    scores = jnp.einsum("BNTH,BNSH->BNTS", found["q"], found["k"]) / config.head_size**0.5
    allowed = jnp.tril(jnp.ones((length, length), bool))
    found["att"] = jnp.where(allowed, scores, 0)
    found["attSm"] = jax.nn.softmax(jnp.where(allowed, scores, -1e30), -1)
    mixed = jnp.einsum("BNTS,BNSH->BTNH", found["attSm"], found["v"])
    found["y"] = mixed.reshape(rows, length, -1)
    found["yProj"] = jnp.einsum("BTNH,NHD->BTD", mixed, attention["output"]["kernel"]) + attention["output"]["bias"]
    found["attnResid"] = found["x"] + found["yProj"]
    found["ln2"] = norm("feed_forward_norm", found["attnResid"])
    found["fc"] = found["ln2"] @ inner["up"]["kernel"] + inner["up"]["bias"]
    found["gelu"] = activation(config.activation)(found["fc"])
    found["mlp"] = found["gelu"] @ inner["down"]["kernel"] + inner["down"]["bias"]
    found["mlpResid"] = found["attnResid"] + found["mlp"]
    x = found["x"]
    for i in range(config.num_layers):
        layer = jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"])
        x = Block(config).apply({"params": layer}, x, causal_mask())[0]
        found[f"block{i}"] = x
    found["ln_f"] = model.apply(tree, x, method="normalize")
    found["lm_head"] = model.apply(tree, tokens, positions, causal_mask())
    found["probs"] = jax.nn.softmax(found["lm_head"], -1)
    return {name: np.asarray(array) for name, array in found.items()}


def test_it_sorts_everything(nano) -> None:
    """All 729 inputs of six letters, decoded one by one; and it is still itself after an import."""
    inputs = np.array(list(itertools.product(range(3), repeat=6)), np.int32)
    params = jax.tree.map(jnp.asarray, nested(nano.read(list(nano.leaves))))
    model = Gpt(nano.model_config, ComputeConfig(unroll_layers=False))
    forward = jax.jit(lambda t, p: model.apply({"params": params}, t, p, causal_mask()))
    tokens = inputs
    for _ in range(6):
        positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
        best = np.asarray(forward(tokens[:, -11:], positions[:, :11]))[:, -1].argmax(-1)
        tokens = np.concatenate([tokens, best[:, None].astype(np.int32)], 1)
    assert np.array_equal(tokens[:, 6:], np.sort(inputs, 1))


@pytest.mark.slow
def test_it_becomes_a_workdir_and_a_gpt2(nano, in_process, tmp_path) -> None:
    import_model(nano, str(tmp_path / "run"))
    assert equal(open_source(str(tmp_path / "run")), nano)
    proof = export_hf(open_source(str(tmp_path / "run")), str(tmp_path / "hf"), reference="numpy")
    assert proof["outputs"]["logits"] <= 1e-4 and equal(open_directory(tmp_path / "hf"), nano)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["tie_word_embeddings"] is False


# ---------------------------------------------------------------- bad input (rows 66-68 and the list)


def edit_json(name: str, **changes):
    def edit(directory: Path) -> None:
        tree = json.loads((directory / name).read_text()) if (directory / name).exists() else {}
        (directory / name).write_text(json.dumps({k: v for k, v in {**tree, **changes}.items() if v is not None}))

    return edit


def write(name: str, data: bytes, *remove: str):
    def edit(directory: Path) -> None:
        for gone in remove:
            (directory / gone).unlink()
        (directory / name).write_bytes(data)

    return edit


def tensors(edit):
    return lambda directory: change(directory, edit)


def truncate(directory: Path) -> None:
    data = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(data[:-1000])


def shard(names: dict[str, str]):
    def edit(directory: Path) -> None:
        (directory / "model.safetensors").rename(directory / "model-00001-of-00001.safetensors")
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))

    return edit


def drop_layer(t: dict) -> None:
    for name in [name for name in t if ".layer.1." in name]:
        del t[name]


TABLE, NORM = "bert.embeddings.word_embeddings.weight", "bert.embeddings.LayerNorm.bias"
BAD = [
    (66, lambda d: (d / "config.json").unlink(), ConfigError, ["no config.json"]),
    (66, edit_json("config.json", model_type="llama"), ConfigError, ["model_type 'llama'", "bert, roberta, gpt2"]),
    (66, edit_json("config.json", model_type=["bert"]), ConfigError, ["model_type ['bert'] is not ours"]),
    (66, write("config.json", b"{"), ConfigError, ["config.json:1", "not JSON"]),
    (66, edit_json("config.json", hidden_size=None), DataError, ["'hidden_size' is missing"]),
    (66, edit_json("config.json", hidden_size="48"), DataError, ["'hidden_size' = '48'"]),
    (66, edit_json("config.json", num_hidden_layers=10**9), DataError, ["says 1,000,000,000 layers"]),
    (70, edit_json("config.json", hidden_act="swish"), ConfigError, ["model': config.json (bert): activation 'swish'"]),
    (70, edit_json("config.json", is_decoder=True), ConfigError, ["is_decoder = True"]),
    (66, write("pytorch_model.bin", b"\x80\x02}.", "model.safetensors"), ConfigError, ["runs code", "save_pretrained"]),
    (66, lambda d: (d / "model.safetensors").unlink(), ConfigError, ["neither model.safetensors"]),
    (66, shard({TABLE: "../model.safetensors"}), DataError, ["'../model.safetensors' is not the name"]),
    (66, shard({TABLE: "/etc/passwd"}), DataError, ["'/etc/passwd' is not the name"]),
    (
        66,
        shard({TABLE: "model-00002-of-00002.safetensors"}),
        DataError,
        ["'model-00002-of-00002.safetensors' is missing"],
    ),
    (66, shard({"nothing": "model-00001-of-00001.safetensors"}), DataError, ["promises 1 tensors", "'nothing'"]),
    (66, shard({}), DataError, ["no weight_map"]),
    (67, tensors(lambda t: t.pop(NORM)), DataError, [f"{NORM} is missing", "1 of"]),
    (67, tensors(drop_layer), DataError, ["and 6 more", "16 of"]),
    (
        67,
        tensors(lambda t: t.update(extra=np.zeros(3, np.float32))),
        DataError,
        ["bert.extra [3] is not of this model"],
    ),
    (67, tensors(lambda t: t.update({NORM: np.zeros(49, np.float32)})), DataError, ["is [49], should be [48]"]),
    (67, tensors(lambda t: t.update({NORM: np.zeros(48, np.int32)})), DataError, ["type I32"]),
    (
        67,
        tensors(lambda t: t.update({"cls.predictions.decoder.weight": np.ones((101, 48), np.float32)})),
        DataError,
        ["decoder.weight differs from", "tie_word_embeddings"],
    ),
    (68, truncate, DataError, ["model.safetensors is damaged"]),
    (68, write("model.safetensors", b"garbage" * 99), DataError, ["no safetensors file or is cut short"]),
    (
        68,
        write("model.safetensors", struct.pack("<Q", 2 << 30) + b"{}" * 99),
        DataError,
        ["claims 2,147,483,648 bytes"],
    ),
    (68, write("model.safetensors", b"\x80\x04\x95" + b"0" * 99), DataError, ["pickle or zip archive by another name"]),
    (68, write("model.safetensors", b"PK\x03\x04" + b"0" * 99), DataError, ["pickle or zip archive by another name"]),
    (68, write("model.safetensors", b""), DataError, ["the file has 0"]),
    (58, write("tokenizer.json", b'{"model": {"type": "Unigram"}}'), ConfigError, ["Unigram tokenizer"]),
]


@pytest.mark.parametrize(("row", "damage", "error", "words"), BAD, ids=lambda value: getattr(value, "__name__", None))
def test_a_directory_that_is_not_right(directory, tmp_path, capsys, row, damage, error, words) -> None:
    damage(directory)
    before = sorted(path.name for path in tmp_path.iterdir())
    code = import_command.main([str(directory), "--out", str(tmp_path / "run")])
    said = capsys.readouterr().err
    assert code == error.exit_code, said
    assert said.count("\n") == 1 and said.startswith("error: ") and all(word in said for word in words), said
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_tokenizer_that_does_not_fit(directory, tmp_path, capsys) -> None:
    Characters("".join(map(chr, range(32, 150)))).save(tmp_path / "tokenizer")
    given = ["--tokenizer", str(tmp_path / "tokenizer"), "--tokenizer-kind", "characters"]
    assert import_command.main([str(directory), "--out", str(tmp_path / "run"), *given]) == DataError.exit_code
    assert "124 ids, the model's table 101 rows" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_what_is_no_directory(tmp_path, capsys) -> None:
    assert import_command.main(["google-bert/bert-base-uncased", "--out", str(tmp_path / "run")]) == 78
    assert "hf download google-bert/bert-base-uncased --local-dir bert-base-uncased" in capsys.readouterr().err
    (tmp_path / "model.onnx").write_text("")
    assert import_command.main([str(tmp_path / "model.onnx"), "--out", str(tmp_path / "run")]) == 78
    assert "is a file" in capsys.readouterr().err
    (tmp_path / "there").mkdir()
    with pytest.raises(ConfigError, match="neither the workdir of a run nor"):
        open_source(str(tmp_path / "there"))


@pytest.mark.parametrize(
    ("content", "error", "word"),
    [
        (b"{", ConfigError, "not JSON"),
        (b"[]", DataError, "holds list"),
        (b"{}", DataError, "no 'config'"),
        (b'{"config": {"n_layer": 1}}', DataError, "'n_head' is missing"),
        (b'{"config": {}, "x": {"shape": [9], "dtype": "torch.float32", "data": "AAAA"}}', DataError, "has 3 bytes"),
        (b'{"config": {}, "x": {"shape": [1], "dtype": "torch.float32", "data": 7}}', DataError, "no shape, dtype"),
    ],
)
def test_a_json_that_is_not_right(tmp_path, content: bytes, error, word: str) -> None:
    (tmp_path / "m.json.gz").write_bytes(gzip.compress(content))
    with pytest.raises(error, match=word):
        open_mingpt(tmp_path / "m.json.gz")


def test_a_gzip_file_that_is_cut_short(tmp_path) -> None:
    (tmp_path / "m.json.gz").write_bytes(gzip.compress(b"{}" * 999)[:20])
    with pytest.raises(StorageError, match="cannot be read"):
        open_mingpt(tmp_path / "m.json.gz")


def test_the_pickle_of_the_data_set_is_refused(shared_data, tmp_path, capsys) -> None:
    source = shared_data / "weights" / "bert-xsmall-dummy"
    assert import_command.main([str(source), "--out", str(tmp_path / "run")]) == 78
    said = capsys.readouterr().err
    assert "pytorch_model.bin" in said and "save_pretrained" in said and not (tmp_path / "run").exists()
