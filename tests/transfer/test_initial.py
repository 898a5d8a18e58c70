"""Runs that begin from other parameters, end to end at a tiny size: sizes, tokenizers, new rows, tables, exports."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from bertgpt_jax.commands import evaluate, train
from bertgpt_jax.config import apply_overrides, load_config
from bertgpt_jax.corpus.builder import prepare_corpus
from bertgpt_jax.corpus.characters import Characters
from bertgpt_jax.corpus.config import CharactersConfig, CorpusConfig
from bertgpt_jax.errors import ConfigError
from bertgpt_jax.training.checkpoint_files import list_steps
from bertgpt_jax.training.run_config import RunConfig
from bertgpt_jax.transfer.export import export_hf
from bertgpt_jax.transfer.import_model import import_model
from bertgpt_jax.transfer.initial import resolve
from bertgpt_jax.transfer.load import load_model
from bertgpt_jax.transfer.tensors import TensorFiles

LETTERS = "".join(map(chr, range(32, 123)))
TINY = (
    *("stages.0.sequence_length=16", "stages.0.batch_size=8", "execution.eval_batches=2", "corpus.workers=0"),
    *("execution.log_every=1", "execution.data_threads=0", "corpus.held_out.fraction=0.3"),
)


@pytest.fixture(scope="module")
def place(make_source, configs, tmp_path_factory) -> Path:
    """A directory with a text, a GPT-2 with its tokenizer as a Hugging Face directory, and the same as a workdir."""
    from bertgpt_jax.transfer import proof, reference

    root = tmp_path_factory.mktemp("initial")
    lines = [f"number {i} of the lines, with {i * i} in it: {'abc ' * (i % 7)}" for i in range(200)]
    (root / "text.txt").write_text("\n\n".join(lines) + "\n")
    source = make_source(configs["gpt2"], tokenizer=Characters(LETTERS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(proof, "run_reference", lambda d, batch, kind, layers: reference.with_numpy(d, batch, layers))
        export_hf(source, str(root / "hf"), reference="numpy")
    import_model(source, str(root / "run"))
    return root


def config(place: Path, *overrides: str, init_from: str = "hf") -> RunConfig:
    given = [f"init_from={place / init_from}", f"corpus.path={place / 'text.txt'}", *TINY, *overrides]
    return apply_overrides(load_config("continue/gpt2", RunConfig), given)


def initial_params(place: Path, tmp_path: Path, *overrides: str, init_from: str = "hf") -> tuple[RunConfig, dict]:
    """The resolved config and the parameters a run would begin with, by path."""
    import jax

    from bertgpt_jax.parallel.mesh import MeshConfig, make_mesh
    from bertgpt_jax.parallel.sharding import flatten
    from bertgpt_jax.training import setup
    from bertgpt_jax.training.run_config import with_steps, with_vocabulary

    resolved, initial = resolve(config(place, *overrides, init_from=init_from), str(tmp_path / "new"))
    whole = with_steps(with_vocabulary(resolved, resolved.model.vocab_size), [lambda length: 8])
    program = setup.make_program(whole, make_mesh(MeshConfig()))
    return resolved, flatten(jax.device_get(initial.place(program.init()["params"])))


@pytest.mark.parametrize("init_from", ["hf", pytest.param("run", marks=pytest.mark.slow)])
def test_sizes_tokenizer_and_parameters_are_the_models(place, tmp_path, init_from: str) -> None:
    resolved, params = initial_params(place, tmp_path, "model.hidden_dropout=0.3", init_from=init_from)
    old = load_model(str(place / init_from))
    changed = {"hidden_dropout": 0.3}
    same = old.model_config.model_dump() | changed
    assert {k: v for k, v in resolved.model.model_dump().items() if k in same and "initializer" not in k} == {
        k: v for k, v in same.items() if "initializer" not in k
    }
    assert resolved.corpus.tokenizer.kind == "characters" and Path(resolved.corpus.tokenizer.path).is_dir()
    assert np.array_equal(params["layers/attention/key/kernel"], old.params["layers"]["attention"]["key"]["kernel"])


def test_longer_positions_and_more_words_keep_the_old_rows(place, tmp_path) -> None:
    """New rows are those that the config's initialisation draws."""
    Characters(LETTERS + "{|}~\x7fäöüßé").save(tmp_path / "more")
    more = [f"corpus.tokenizer.path={tmp_path / 'more'}", "corpus.tokenizer.kind=characters"]
    resolved, params = initial_params(place, tmp_path, *more, "extend.max_positions=90")
    assert (resolved.model.max_positions, resolved.model.vocab_size) == (90, 107)
    old = load_model(str(place / "hf")).params
    for path, rows in (("position_embedding", 77), ("token_embedding", 101)):
        table = params[f"{path}/table"]
        assert np.array_equal(table[:rows], old[path]["table"])
        assert 0 < np.abs(table[rows:]).max() < 0.1 and len(np.unique(table[rows:])) == table[rows:].size


def test_another_tokenizer_is_refused_unless_asked_for(place, tmp_path) -> None:
    Characters("abc").save(tmp_path / "other")
    other = [f"corpus.tokenizer.path={tmp_path / 'other'}", "corpus.tokenizer.kind=characters"]
    with pytest.raises(ConfigError, match=r"its ids mean other words.*extend.new_tokenizer=true"):
        resolve(config(place, *other), str(tmp_path / "new"))
    resolved, _ = resolve(config(place, *other, "extend.new_tokenizer=true"), str(tmp_path / "new"))
    assert resolved.model.vocab_size == 101


def test_a_corpus_prepared_with_another_tokenizer_is_refused(place, tmp_path) -> None:
    setting = CorpusConfig(path=str(place / "text.txt"), tokenizer=CharactersConfig(), workers=0)
    prepare_corpus(setting, tmp_path / "corpus", progress=False)
    with pytest.raises(ConfigError, match="extend.new_tokenizer=true"):
        resolve(config(place, f"corpus.path={tmp_path / 'corpus'}"), str(tmp_path / "new"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["extend.max_positions=40"], "extend.max_positions 40 is below the 77"),
        (["stages.0.sequence_length=78"], "sequence_length 78 exceeds model.max_positions 77"),
        (["init_from=openai-community/gpt2"], "hf download openai-community/gpt2"),
    ],
)
def test_what_does_not_fit(place, tmp_path, changes: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(config(place, *changes), str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_another_family_is_refused(place, tmp_path) -> None:
    given = [f"init_from={place / 'hf'}", f"corpus.path={place / 'text.txt'}"]
    with pytest.raises(ConfigError, match=r"is a gpt, the config trains a bert; use configs/continue/gpt2.py"):
        resolve(apply_overrides(load_config("continue/bert", RunConfig), given), str(tmp_path / "new"))


@pytest.mark.slow
@pytest.mark.timeout(900)  # it starts five processes
def test_a_run_from_a_directory_to_a_directory(place, tmp_path, monkeypatch, capsys) -> None:
    """Trains, exports while it trains and at its end, compares before and after; resumes without its origin."""
    origin, workdir = tmp_path / "origin", tmp_path / "new"
    shutil.copytree(place / "hf", origin)
    argv = ["continue/gpt2", f"init_from={origin}", f"corpus.path={place / 'text.txt'}", *TINY]
    argv += ["stages.0.steps=3", "stages.0.schedule.warmup_steps=1", "stages.0.schedule.peak=0.003"]
    argv += ["execution.eval_every=3", "execution.save_every=3", "execution.export.every=3"]
    argv += ["stages.0.schedule.total_steps=6"]
    argv += [f"execution.general_text={place / 'text.txt'}", "--workdir", str(workdir)]
    assert train.main(argv) == 0
    said = capsys.readouterr().out
    assert "parameters from" in said and "held out, before" in said and "exported the best checkpoint" in said
    table = json.loads((workdir / "before_after.json").read_text())["losses"]
    assert set(table) == {"domain", "general"}
    assert table["domain"]["after"]["loss"] < table["domain"]["before"]["loss"]
    assert sorted(path.name for path in (workdir / "export").iterdir()) == ["final", "step-3"]
    for name in ("final", "step-3"):
        card = (workdir / "export" / name / "README.md").read_text()
        assert " tokens (" in card and "| loss |" in card, card
    saved = load_model(str(workdir), 3).params["final_norm"]["scale"]
    assert np.array_equal(TensorFiles(workdir / "export" / "step-3").read("transformer.ln_f.weight"), saved)

    corpus = ["--corpus", json.loads((workdir / "corpus.json").read_text())["path"], "--json", "--batches", "2"]
    assert evaluate.main([str(workdir / "export" / "final"), *corpus]) == 0
    exported = json.loads(capsys.readouterr().out)
    assert evaluate.main([str(workdir), "--which", "best", *corpus]) == 0
    trained = json.loads(capsys.readouterr().out)
    assert exported["evaluation_fingerprint"] == trained["evaluation_fingerprint"]
    assert exported["metrics"]["loss"] == pytest.approx(trained["metrics"]["loss"], abs=1e-6)

    shutil.rmtree(origin)  # a resume needs it no more
    shutil.rmtree(workdir / "export")
    assert train.main([*argv, "stages.0.steps=6"]) == 0
    assert max(list_steps(workdir)) == 6
    assert {"step-3", "step-6"} <= {path.name for path in (workdir / "export").iterdir()}


def test_a_workdir_begun_from_elsewhere_says_so(place, tmp_path, capsys) -> None:
    """`init_from` is part of what is trained: another one on an existing workdir stops with a diff."""
    from bertgpt_jax.config import identity
    from bertgpt_jax.training import resume

    resolved, _ = resolve(config(place), str(tmp_path / "new"))
    tree = identity(resolved)
    assert tree["init_from"] == str(place / "hf")
    assert "init_from" not in identity(load_config("gpt/gpt2", RunConfig))
    from etils import epath

    workdir = epath.Path(tmp_path / "new")
    workdir.mkdir()
    (workdir / "identity.json").write_text(json.dumps({"config": tree}))
    other = identity(resolve(config(place, init_from="run"), str(tmp_path / "other"))[0])
    with pytest.raises(ConfigError, match=r"trains something else: init_from: '.*hf' -> '.*run'"):
        resume.check_identity(workdir, {"config": other})
