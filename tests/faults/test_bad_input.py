"""What a user can get wrong: one line that names the thing and the value, the documented exit code, nothing written.

Every row calls a command's `main` in this process. The number of a row is that of the project's list of bad inputs.
Rows of that list that have no place here:
    25 is in tests/training/test_storage.py too; 28 (`init_from` beside checkpoints): there is no `init_from` yet;
    30 (versions that do not go together): tests/commands/test_doctor.py;
    31-33 (names and splits of published data sets): test_bad_sources.py, as are 34, 36-40, 42 and 44 for TFDS, tables,
        filters and standard input; 37 to 39 are here for gzip files and for our own store;
    42 overlap of train and held-out text: equal documents fall on one side, tests/corpus;
    43 bytes that are cleaned rather than refused (BOM, CR LF, NUL): tests/corpus;
    49 all-padding rows have weight 0: tests/batches/test_dataset.py;
    50 (fine-tuning labels), 51 for tab-separated files, 53's record count: no such input yet;
    52's other sequence length: a store holds no rows, so it has none;
    61-71: models that leave and come in: test_bad_models.py, as is 71; 62 and 65 in tests/training and test_kill.py;
    72-76: runtime and cluster, in tests/training, tests/parallel and the other files here.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import sentencepiece
from tokenizers import pre_tokenizers

from bertgpt_jax.batches.dataset import Dataset
from bertgpt_jax.batches.windows import Windows
from bertgpt_jax.commands import evaluate, prepare, tokenizer, train
from bertgpt_jax.corpus.view import InMemoryCorpus
from bertgpt_jax.errors import DataError
from bertgpt_jax.objectives.base import total_loss
from bertgpt_jax.objectives.masked_lm import MaskedLM
from bertgpt_jax.training import run, setup, storage

TINY = str(Path(__file__).parent / "tiny.py")
STAGE = '{"steps": 2, "sequence_length": 16, "batch_size": 8}'
USAGE, DATA, STORAGE, CONFIG = 64, 65, 74, 78

# (row, command, arguments, exit code, what the line must hold). `run` is `train` of tiny.py on good text. @ is the
# directory of the files made below, @runs that of the workdirs, @trained a workdir of two steps, @corpus its corpus.
ROWS = [
    # ------------------------------------------------ command line and config files
    (1, "train", [], USAGE, ["required: config;", "--help"]),
    (1, "run", ["steps"], USAGE, ["'steps'", "key=value"]),
    (2, "train", ["configs/quikstart.py"], CONFIG, ["configs/quikstart.py", "did you mean", "quickstart"]),
    (2, "train", ["bert/bsae"], CONFIG, ["bert/bsae", "did you mean 'bert/base'"]),
    (2, "train", ["@/text.txt"], CONFIG, ["text.txt", ".py or .json"]),
    (3, "train", ["@/without.py"], CONFIG, ["without.py", "get_config()"]),
    (3, "train", ["@/returns.py"], CONFIG, ["returns.py", "int", "RunConfig"]),
    (4, "train", ["@/broken.py"], CONFIG, ["broken.py:2:"]),
    (4, "train", ["@/raises.py"], CONFIG, ["raises.py:3:", "ZeroDivisionError"]),
    (5, "run", ["model.num_layer=2"], CONFIG, ["unknown key 'model.num_layer'", "did you mean 'model.num_layers'"]),
    (5, "run", ["stages.shrot.steps=3"], CONFIG, ["shrot", "short"]),
    (5, "run", ["modle.num_layers=2", "sede=1"], CONFIG, ["modle", "'model'", "sede", "'seed'"]),
    (6, "run", ["stages.0.schedule.peak=abc"], CONFIG, ["stages.0.schedule.peak = 'abc'", "number"]),
    (6, "run", ["model.num_layers=2.5"], CONFIG, ["model.num_layers = '2.5'", "integer"]),
    (6, "run", ["model.next_sentence_head=maybe"], CONFIG, ["model.next_sentence_head = 'maybe'", "boolean"]),
    (7, "run", ["stages.0.schedule.peak=nan"], CONFIG, ["stages.0.schedule.peak = 'nan'", "finite"]),
    (7, "run", ["stages.0.schedule.peak=inf"], CONFIG, ["stages.0.schedule.peak = 'inf'", "finite"]),
    (7, "run", ["stages.0.schedule.peak=-1e-3"], CONFIG, ["stages.0.schedule.peak = '-1e-3'", "greater than 0"]),
    (7, "run", ["stages.0.optimizer.b2=1.0"], CONFIG, ["stages.0.optimizer.b2 = '1.0'", "less than 1"]),
    (7, "run", ["stages.0.optimizer.eps=0"], CONFIG, ["stages.0.optimizer.eps = '0'", "greater than 0"]),
    (8, "run", ["model.num_heads=3"], CONFIG, ["hidden_size 32", "num_heads 3"]),
    (9, "run", ["stages.0.schedule.warmup_steps=40"], CONFIG, ["warmup_steps 40", "total_steps 40"]),
    (9, "run", ["stages.0.schedule.total_steps=null", "stages.0.schedule.warmup_steps=12"], CONFIG, ["12", "12 steps"]),
    (10, "run", ["stages.0.steps=0"], CONFIG, ["stages.0.steps = '0'"]),
    (10, "run", ["stages.0.steps=null"], CONFIG, ["'short'", "no length", "steps, tokens, epochs"]),
    (10, "run", ["execution.save_every=0"], CONFIG, ["execution.save_every = '0'"]),
    (10, "run", ["execution.eval_batches=0"], CONFIG, ["execution.eval_batches = '0'"]),
    (11, "run", ["model.hidden_dropout=1.5"], CONFIG, ["model.hidden_dropout = '1.5'", "less than 1"]),
    (11, "run", ["model.attention_dropout=-0.1"], CONFIG, ["model.attention_dropout = '-0.1'", "0"]),
    (12, "run", ["objective.masking.rate=0"], CONFIG, ["objective.masking.rate = '0'"]),
    (12, "run", ["objective.masking.rate=1"], CONFIG, ["objective.masking.rate = '1'"]),
    (12, "run", ["objective.masking.random_fraction=0.3"], CONFIG, ["mask_fraction 0.8", "random_fraction 0.3"]),
    (12, "run", ["objective.masking.max_predictions=0"], CONFIG, ["objective.masking.max_predictions = '0'"]),
    (12, "run", ["objective.masking.exclude=[9999]"], CONFIG, ["masking.exclude", "9999", "vocabulary of 256"]),
    (12, "run", [f"objective.masking.exclude={list(range(256))}"], CONFIG,
     ["all 256 ids", "masking.exclude", "nothing can be masked"]),
    (12, "run", ["objective.masking=robertta"], CONFIG, ["'robertta'", "known: bert, roberta, megatron"]),
    (13, "run", ["stages.long.sequence_length=64"], CONFIG, ["'long'", "64", "model.max_positions 32"]),
    (13, "run", ["stages.0.sequence_length=4"], CONFIG, ["stages.0.sequence_length = '4'", "8"]),
    (13, "run", ["stages.0.sequence_length=12"], CONFIG, ["'short'", "sentence pairs", "16", "12"]),
    (14, "run", ["model.vocab_size=100"], CONFIG, ["model.vocab_size 100", "256"]),
    (15, "run", ["corpus.tokenizer.kind=byte_bpe", "corpus.tokenizer.path=@/gpt2", "corpus.tokenizer.vocab_size=300"],
     CONFIG, ["byte_bpe", "no pad, cls, sep, mask"]),
    (15, "run", ["corpus.tokenizer.kind=sentencepiece", "corpus.tokenizer.path=@/default.model"], CONFIG,
     ["sentencepiece", "no pad, mask"]),
    (15, "run", ["corpus.path=@/equal_ids"], DATA, ["manifest.json", "cls=3, sep=3", "cls=2, sep=3"]),
    (16, "run", ["stages.0.batch_size=12"], CONFIG, ["stages.short.batch_size 12", "8", "use 8 or 16"]),
    (16, "run", ["stages.0.microbatches=3"], CONFIG, ["stages.short.batch_size 8", "24"]),
    (17, "run", ["execution.mesh.data=16"], CONFIG, ["data=16", "8 devices", "(2,2,2)"]),
    (17, "run", ["execution.mesh.data=3"], CONFIG, ["data=3", "8 devices", "(4,1,2)"]),
    (17, "run", ["execution.mesh.fsdp=-1"], CONFIG, ["data=-1,fsdp=-1", "one of them may be -1"]),
    (17, "run", ["execution.mesh.tensor=0"], CONFIG, ["tensor=0"]),
    (17, "run", ["execution.mesh.pipe=4"], CONFIG, ["pipe = 4"]),
    (18, "run", ["execution.mesh.model=2"], CONFIG, ["execution.mesh.model", "tensor"]),
    (19, "run", ["execution.mesh.data=1", "execution.mesh.tensor=8"], CONFIG, ["'heads' of size 4", "tensor = 8"]),
    (19, "run", ["execution.mesh.tensor=2", "model.vocab_size=257"], CONFIG, ["'vocab' of size 257", "258"]),
    (19, "run", ["execution.mesh.tensor=4", "model.intermediate_size=66"], CONFIG, ["'mlp' of size 66", "68"]),
    (20, "run", ["execution.compute.dtype=bfloat61"], CONFIG, ["execution.compute.dtype = 'bfloat61'", "'bfloat16'"]),
    (20, "run", ["execution.compute.dtype=float16"], CONFIG, ["execution.compute.dtype = 'float16'", "'bfloat16'"]),
    (20, "run", ["execution.compute.attention=splash"], CONFIG,
     ["execution.compute.attention = 'splash'", "runs on tpu, not on cpu", "use auto or reference"]),
    (20, "run", ["execution.compute.attention=cudnn", "--dry-run"], CONFIG,
     ["execution.compute.attention = 'cudnn'", "runs on gpu, not on cpu", "model.attention_dropout=0"]),
    (20, "run", ["execution.compute.attention=cudnn"], CONFIG, ["'cudnn' cannot serve 16 x 16", "dtype float32"]),
    (20, "run", ["execution.compute.head_chunk=7"], CONFIG,
     ["execution.compute.head_chunk = 7", "the 3 scored positions of a row", "use one of 1, 3"]),
    (20, "run", ["execution.compute.head_chunk=3"], CONFIG, ["head_chunk = 3", "the 5 scored", "use one of 1, 5"]),
    (20, "run", ["execution.compute.head_chunk=7", "--dry-run"], CONFIG, ["head_chunk = 7", "use one of 1, 3"]),
    (20, "run", ["execution.compute.remat=ful"], CONFIG, ["execution.compute.remat = 'ful'", "did you mean 'full'"]),
    (20, "run", ["model.norm=rsm"], CONFIG, ["model.norm = 'rsm'", "did you mean 'rms'"]),
    (21, "run", ["stages.0.optimizer.kind=adamx"], CONFIG, ["stages.0.optimizer.kind = 'adamx'", "mean 'adamw'"]),
    (21, "run", ["stages.0.schedule.kind=cosin"], CONFIG, ["stages.0.schedule.kind = 'cosin'", "mean 'cosine'"]),
    (21, "run", ["stages.1.optimizer.kind=lion"], CONFIG, ["'long'", "'lion'", "'adamw'", "reset_optimizer"]),
    (22, "run", ["objective.kind=causal_lm"], CONFIG, ["objective.kind = 'causal_lm'", "'gpt'", "'bert'"]),
    (22, "run", ["model.next_sentence_head=false"], CONFIG, ["'masked_lm_nsp'", "next_sentence_head"]),
    (22, "run", ["objective.masking=null"], CONFIG, ["objective.masking"]),
    (23, "run", ["seed=-1"], CONFIG, ["seed = '-1'"]),
    (23, "run", ["seed=2147483648"], CONFIG, ["seed = '2147483648'"]),
    (23, "run", ["seed=abc"], CONFIG, ["seed = 'abc'"]),
    (23, "run", ["stages.0.optimizer.clip_norm=0"], CONFIG, ["stages.0.optimizer.clip_norm = '0'"]),
    (24, "run", ["--workdir", "~nobody-of-that-name/run"], CONFIG, ["~nobody-of-that-name/run", "home"]),
    (24, "run", ["--workdir", "file:///tmp/run"], CONFIG, ["file:///tmp/run", "'/tmp/run'"]),
    (24, "run", ["--workdir", "@runs/x "], CONFIG, ["/x '", "space"]),
    (24, "run", ["--workdir", "@/text.txt"], CONFIG, ["text.txt", "is a file"]),
    (24, "run", ["--workdir", "@/text.txt/run"], CONFIG, ["text.txt/run", "is a file"]),
    (24, "run", ["--workdir", "ftp://host/run"], CONFIG, ["'ftp://'", "gs://"]),
    (24, "run", ["--workdir", "/proc/none/run"], STORAGE, ["/proc/none"]),
    (25, "run", ["--workdir", "gs://bucket/run"], CONFIG, ["gs://bucket/run", "gcsfs", "bertgpt_jax[gcs]"]),
    (26, "train", ["@/twice.json"], CONFIG, ["twice.json", "'seed' is given twice"]),
    (26, "train", ["@/nan.json"], CONFIG, ["nan.json", "NaN"]),
    (26, "train", ["@/comment.json"], CONFIG, ["comment.json:1", "comments"]),
    (26, "train", ["@/list.json"], CONFIG, ["list.json", "dictionary"]),
    (26, "train", ["@/latin1.json"], CONFIG, ["latin1.json", "UTF-8"]),
    (27, "run", ["--from-step", "3"], CONFIG, ["no checkpoint of step 3", "none"]),
    (27, "run", ["--from-step", "7", f"stages=[{STAGE}]", "--workdir", "@trained"], CONFIG,
     ["no checkpoint of step 7", "available: 2"]),
    (27, "run", ["--from-step", "x"], USAGE, ["--from-step", "'x'"]),
    (29, "run", ["seed=5", f"stages=[{STAGE}]", "--workdir", "@trained"], CONFIG,
     ["seed: 0 -> 5", "--workdir", "--allow-change seed"]),
    (29, "run", ["corpus.path=@/other.txt", f"stages=[{STAGE}]", "--workdir", "@trained"], CONFIG,
     ["corpus: ", "tokenizer: ", "--allow-change corpus"]),
    (29, "run", ["corpus.path=@/other_tokenizer", f"stages=[{STAGE}]", "--workdir", "@trained"], CONFIG,
     ["model.vocab_size: 256 -> 255", "tokenizer: "]),
    # ------------------------------------------------ data
    (34, "run", ["corpus.path=@/rows.jsonl", "corpus.text_field=body"], DATA, ["rows.jsonl:1", "'body'", "'text'"]),
    (34, "run", ["corpus.path=@/number.jsonl"], DATA, ["number.jsonl:2", "'text' is int"]),
    (35, "run", ["corpus.path=@/*.none"], CONFIG, ["corpus.path", "*.none", "no file matches"]),
    (35, "run", ["corpus.path=@/none.txt"], CONFIG, ["corpus.path", "none.txt", "no such file"]),
    (35, "run", ["corpus.path=@/empty_directory"], CONFIG, ["corpus.path", "empty_directory", "no files"]),
    (35, "train", [TINY], CONFIG, ["corpus.path is empty", "corpus.path=FILE"]),
    (36, "run", ["corpus.path=@/sharded"], DATA, ["1 of 3 shards", "part-00001-of-00003"]),
    (37, "run", ["corpus.path=@/empty.txt"], DATA, ["empty.txt", "empty"]),
    (37, "run", ["corpus.path=@/empty.txt.gz"], DATA, ["empty.txt.gz", "empty"]),
    (38, "run", ["corpus.path=@/truncated.txt.gz"], DATA, ["truncated.txt.gz", "damaged gzip"]),
    (39, "prepare", ["--check", "@/damaged_store"], DATA, ["damaged_store", "shard-00000"]),
    (40, "run", ["corpus.path=@/table.parquet"], DATA, ["table.parquet", ".parquet"]),
    (40, "run", ["corpus.path=@/zipped.txt"], DATA, ["zipped.txt", "zip"]),
    (40, "run", ["corpus.path=@/plain.txt.gz"], DATA, ["plain.txt.gz", "no gzip file"]),
    (40, "run", ["corpus.path=@/one.json"], DATA, ["one.json", ".jsonl"]),
    (41, "run", ["stages.0.batch_size=80000"], DATA, ["train split", "rows of 16 tokens", "batch_size = 80000"]),
    (41, "run", ["corpus.held_out.fraction=0"], DATA, ["held_out split", "corpus.held_out.fraction"]),
    (42, "run", ['corpus.path=["@/text.txt", "@/text.txt"]'], DATA, ["corpus.path", "text.txt twice"]),
    (43, "run", ["corpus.path=@/latin1.txt", "corpus.cleaning.invalid_utf8=error"], DATA,
     ["latin1.txt", "0xe9", "offset 3", "UTF-8"]),
    (43, "run", ["corpus.path=@/surrogate.jsonl", "corpus.cleaning.invalid_utf8=error"], DATA,
     ["surrogate.jsonl", "surrogate"]),
    (44, "run", ["corpus.cleaning.min_characters=100000"], DATA,
     ["text.txt", "no document is left of 300", "min_characters 300"]),
    (45, "run", ["corpus.sentences=none"], DATA, ["two sentences", "documents of the train split", "corpus.sentences"]),
    (46, "run", ["corpus.path=@/other_size"], DATA, ["other_size", "256", "100"]),
    (51, "run", ["corpus.path=@/bad.jsonl"], DATA, ["bad.jsonl:3", "not JSON"]),
    (51, "run", ["corpus.path=@/lists.jsonl"], DATA, ["lists.jsonl:1", "list"]),
    (52, "run", ["corpus.path=@/other_vocabulary"], DATA, ["other_vocabulary", "sha256"]),
    (52, "run", ["corpus.path=@corpus", "corpus.tokenizer.path=@/vocab.txt"], CONFIG, ["vocab.txt", "tokenizer of"]),
    (52, "run", ["corpus.path=@/no_shard"], DATA, ["no_shard", "1 of 1 shards", "shard-00000-of-00001"]),
    (52, "run", ["corpus.path=@/newer"], DATA, ["newer", "format_version 2"]),
    (53, "run", ["stages.0.steps=null", "stages.0.epochs=0"], CONFIG, ["stages.0.epochs = '0'"]),
    (53, "run", ["stages.0.steps=null", "stages.0.epochs=-1"], CONFIG, ["stages.0.epochs = '-1'"]),
    (54, "run", ["corpus.path=/proc/self/mem"], STORAGE, ["/proc/self/mem", "cannot be read"]),
    # ------------------------------------------------ tokenizers
    (55, "run", ["corpus.tokenizer.path=@/none/vocab.txt"], CONFIG, ["tokenizer.path", "none/vocab.txt", "not found"]),
    (55, "run", ["corpus.tokenizer.path=@/empty.txt"], DATA, ["empty.txt", "empty"]),
    (55, "tokenizer", ["encode", "@/empty_directory", "x"], CONFIG, ["empty_directory", "--kind"]),
    (55, "tokenizer", ["encode", "@/empty_directory", "x", "--kind", "sentencepiece"], DATA, ["0 .model files"]),
    (55, "tokenizer", ["encode", "@/text.txt", "x", "--kind", "sentencepiece"], DATA, ["text.txt", "SentencePiece"]),
    (55, "tokenizer", ["encode", "@/half.model", "x", "--kind", "sentencepiece"], DATA, ["half.model", "damaged"]),
    (55, "tokenizer", ["encode", "@/gpt2", "x", "--kind", "bpe"], CONFIG, ["'bpe'", "did you mean 'byte_bpe'"]),
    (56, "run", ["corpus.tokenizer.vocab_size=60000"], DATA, ["tokenizer.vocab_size = 60000", "at most"]),
    (56, "run", ["corpus.tokenizer.vocab_size=30"], DATA, ["tokenizer.vocab_size = 30", "too small"]),
    (56, "tokenizer", ["train", "@/text.txt", "--out", "@runs/tok", "tokenizer.kind=sentencepiece"], DATA,
     ["tokenizer.vocab_size = 32000", "at most"]),
    (56, "tokenizer",
     ["train", "@/text.txt", "--out", "@runs/tok", "tokenizer.kind=sentencepiece", "tokenizer.vocab_size=8"], DATA,
     ["tokenizer.vocab_size = 8:", "too small", "34"]),
    (56, "tokenizer",
     ["train", "@/text.txt", "--out", "@runs/tok", "tokenizer.kind=byte_bpe", "tokenizer.vocab_size=90000"], DATA,
     ["tokenizer.vocab_size = 90000", "at most"]),
    (57, "tokenizer", ["train", "@/spaces.txt", "--out", "@runs/tok"], DATA, ["empty"]),
    (57, "tokenizer", ["train", "@/none.txt", "--out", "@runs/tok"], CONFIG, ["none.txt", "no such file"]),
    (58, "tokenizer", ["encode", "@/cut", "x", "--kind", "byte_bpe"], DATA, ["cut/tokenizer.json", "damaged"]),
    (58, "tokenizer", ["encode", "@/modelless", "x", "--kind", "wordpiece"], DATA, ["no model section"]),
    (58, "tokenizer", ["encode", "@/specialless", "x", "--kind", "wordpiece"], DATA, ["tokenizer.json", "[UNK]"]),
    (59, "tokenizer", ["encode", "@/twice.txt", "x", "--kind", "wordpiece"], DATA, ["twice.txt:7", "'a'", "line 6"]),
    (59, "tokenizer", ["encode", "@/blank.txt", "x", "--kind", "wordpiece"], DATA, ["blank.txt:3", "blank"]),
    (59, "tokenizer", ["encode", "@/unknownless.txt", "x", "--kind", "wordpiece"], DATA, ["unknownless.txt", "[UNK]"]),
    (60, "tokenizer", ["decode", "@corpus", "5", "256"], DATA, ["id 256", "0..255"]),
    (60, "tokenizer", ["decode", "@corpus", "-1"], DATA, ["id -1", "0..255"]),
    (60, "tokenizer", ["decode", "@corpus", "five"], USAGE, ["'five'", "integers"]),
    # ------------------------------------------------ checkpoints that do not fit (62's cast: tests/training)
    (61, "run", ["model.intermediate_size=48", f"stages=[{STAGE}]", "--allow-change", "model", "--workdir", "@trained"],
     CONFIG, ["step 2 ", "leaves differ", "up/kernel: float32[2,32,64] saved, float32[2,32,48] wanted"]),
    (64, "run", [f"stages=[{STAGE}]", "stages.0.optimizer.kind=lion", "--allow-change", "stages", "--workdir",
                 "@trained"], CONFIG, ["step 2 ", "only the optimizer differs", "init_from="]),
    # ------------------------------------------------ the other commands
    (27, "evaluate", ["@/empty_directory"], CONFIG, ["empty_directory", "neither the workdir of a run"]),
    (27, "evaluate", ["openai-community/gpt2"], CONFIG, ["hf download openai-community/gpt2 --local-dir gpt2"]),
    (27, "evaluate", ["@trained", "--which", "7"], CONFIG, ["no checkpoint of step 7", "available: 2"]),
    (27, "evaluate", ["@trained", "--which", "newest"], CONFIG, ["'newest'", "latest, best"]),
    (5, "evaluate", ["@trained", "--stage", "phase9"], CONFIG, ["'phase9'", "['pretrain']"]),
    (10, "evaluate", ["@trained", "--batches", "0"], USAGE, ["--batches", "0"]),
    (52, "evaluate", ["@trained", "--corpus", "@/other_tokenizer"], DATA, ["other_tokenizer", "--corpus"]),
    (24, "prepare", ["@/text.txt", "--out", "@/empty.txt"], CONFIG, ["empty.txt"]),
    (5, "prepare", ["@/text.txt", "--out", "@runs/c", "tokenizer.vocabsize=9"], CONFIG, ["tokenizer.vocab_size"]),
]  # fmt: skip

COMMANDS = {"train": train, "run": train, "evaluate": evaluate, "prepare": prepare, "tokenizer": tokenizer}


def write_text(path: Path, documents: int, words: int, seed: int) -> None:
    """Documents of four sentences, one a line, of made-up words."""
    draw = random.Random(seed)
    known = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 7))) for _ in range(words)]
    lines = ["\n".join(" ".join(draw.choices(known, k=8)) + "." for _ in range(4)) for _ in range(documents)]
    path.write_text("\n\n".join(lines) + "\n")


def write_configs(root: Path) -> None:
    (root / "without.py").write_text("def config():\n    return 1\n")
    (root / "returns.py").write_text("def get_config():\n    return 1\n")
    (root / "broken.py").write_text("def get_config():\n    return (\n")
    (root / "raises.py").write_text("def get_config():\n    steps = 0\n    return 1 // steps\n")
    (root / "twice.json").write_text('{"seed": 1, "seed": 2}')
    (root / "nan.json").write_text('{"seed": NaN}')
    (root / "comment.json").write_text('{"seed": 1} // the seed')
    (root / "list.json").write_text("[1]")
    (root / "latin1.json").write_bytes('{"seed": "é"}'.encode("latin-1"))


def write_data(root: Path) -> None:
    text = (root / "text.txt").read_text()
    rows = [json.dumps({"text": t, "id": i}) for i, t in enumerate(text.split("\n\n"))]
    packed = gzip.compress(text.encode())
    (root / "rows.jsonl").write_text("\n".join(rows) + "\n")
    (root / "number.jsonl").write_text('{"text": "a"}\n{"text": 1}\n')
    (root / "bad.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n{"text": "c\n')
    (root / "lists.jsonl").write_text("[1, 2]\n")
    (root / "surrogate.jsonl").write_text('{"text": "a \\ud800 b"}\n')
    (root / "one.json").write_text('{"text": "a"}')
    (root / "empty_directory").mkdir()
    (root / "sharded").mkdir()
    for i in (0, 2):
        (root / "sharded" / f"part-{i:05d}-of-00003.txt").write_text(text)
    (root / "empty.txt").write_bytes(b"")
    (root / "empty.txt.gz").write_bytes(b"")
    (root / "spaces.txt").write_text("  \n\n \n")
    (root / "truncated.txt.gz").write_bytes(packed[: len(packed) // 2])
    (root / "plain.txt.gz").write_text(text)
    (root / "table.parquet").write_bytes(b"PAR1" + bytes(20))
    (root / "zipped.txt").write_bytes(b"PK\x03\x04" + bytes(20))
    (root / "latin1.txt").write_bytes("café au lait\n".encode("latin-1"))


def write_tokenizers(root: Path) -> None:
    special = "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n"
    (root / "vocab.txt").write_text(special + "".join(f"{c}\n" for c in "abcdefghij"))
    (root / "twice.txt").write_text(special + "a\na\n")
    (root / "blank.txt").write_text("[PAD]\n[UNK]\n\n[SEP]\n")
    (root / "unknownless.txt").write_text("[PAD]\na\nb\n")
    (root / "gpt2").mkdir()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {c: i for i, c in enumerate([*letters, "<|endoftext|>"])}
    (root / "gpt2" / "vocab.json").write_text(json.dumps(ids))
    (root / "gpt2" / "merges.txt").write_text("#version: 0.2\n")
    pipelines = {
        "cut": '{"model": {"type": "BPE", "vocab": {',
        "modelless": '{"version": "1.0"}',
        "specialless": json.dumps(
            {"normalizer": {"type": "BertNormalizer"}, "model": {"type": "WordPiece", "vocab": {"a": 0}}}
        ),
    }
    for name, content in pipelines.items():
        (root / name).mkdir()
        (root / name / "tokenizer.json").write_text(content)
    sentencepiece.SentencePieceTrainer.train(  # with its own special ids: no padding, no mask
        input=str(root / "text.txt"), model_prefix=str(root / "default"), vocab_size=100, minloglevel=2
    )
    model = (root / "default.model").read_bytes()
    (root / "half.model").write_bytes(model[: len(model) // 2])


def write_corpora(root: Path) -> None:
    """`good`, and copies of it with one thing wrong each."""
    settings = ["sentences=line", "held_out.fraction=0.1", "tokenizer.vocab_size=256", "workers=0"]
    assert prepare.main([str(root / "text.txt"), "--out", str(root / "good"), "--quiet", *settings]) == 0
    assert prepare.main(
        [str(root / "text.txt"), "--out", str(root / "other_tokenizer"), "--quiet", *settings[:2], *settings[3:],
         "tokenizer.vocab_size=255"]
    ) == 0  # fmt: skip

    def spoiled(name: str, change=None) -> Path:
        shutil.copytree(root / "good", root / name)
        manifest = json.loads((root / name / "manifest.json").read_text())
        if change:
            change(manifest)
            (root / name / "manifest.json").write_text(json.dumps(manifest))
        return root / name

    spoiled("equal_ids", lambda m: m["tokenizer"]["special"].update(cls=3))
    spoiled("newer", lambda m: m.update(format_version=2))
    spoiled("other_size", lambda m: m["tokenizer"].update(vocab_size=100))
    shutil.rmtree(spoiled("no_shard") / "shard-00000-of-00001")
    vocabulary = spoiled("other_vocabulary") / "tokenizer" / "vocab.txt"
    vocabulary.write_text(vocabulary.read_text().replace("\na\n", "\n\N{GREEK SMALL LETTER ALPHA}\n"))
    stored = max((p for p in spoiled("damaged_store").rglob("*") if "tokens" in p.parts and p.is_file()),
                 key=lambda p: p.stat().st_size)  # fmt: skip
    data = bytearray(stored.read_bytes())
    data[len(data) // 3] ^= 1
    stored.write_bytes(data)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Where the files of the rows lie."""
    files = tmp_path_factory.mktemp("files")
    runs = tmp_path_factory.mktemp("runs")
    write_text(files / "text.txt", 300, 200, 0)
    write_text(files / "other.txt", 300, 200, 1)
    for write in (write_configs, write_data, write_tokenizers, write_corpora):
        write(files)
    trained = runs / "trained"
    assert train.main([TINY, f"corpus.path={files / 'text.txt'}", f"stages=[{STAGE}]", "--workdir", str(trained)]) == 0
    return {"@trained": str(trained), "@corpus": str(files / "good"), "@runs": str(runs), "@": str(files)}


def listing(root: Path) -> dict[str, str]:
    """Everything below a directory with its content's hash."""
    files = {p: hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "" for p in sorted(root.rglob("*"))}
    return {str(p.relative_to(root)): digest for p, digest in files.items()}


def argv_of(command: str, arguments: list[str], places: dict[str, str], workdir: Path) -> list[str]:
    filled = []
    for argument in arguments:
        for name, value in places.items():
            argument = argument.replace(name, value)
        filled.append(argument)
    if command == "run":
        filled = [TINY, f"corpus.path={places['@']}/text.txt", *filled]
    if command in ("run", "train") and "--workdir" not in filled:
        filled += ["--workdir", str(workdir)]
    return filled


def last_line(err: str) -> str:
    """The one error line; reports of what was done before may precede it."""
    assert "Traceback" not in err
    lines = err.rstrip("\n").split("\n")
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:], err
    return lines[-1]


@pytest.fixture
def no_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that gets as far as compiling has failed; also the client of buckets is as if not installed."""
    for name in ("lower_train_step", "lower_eval_step"):
        monkeypatch.setattr(setup, name, lambda *_: pytest.fail("the bad input was found too late: compiling"))
    find_spec = storage.importlib.util.find_spec
    monkeypatch.setattr(
        storage.importlib.util, "find_spec", lambda name, *rest: None if name == "gcsfs" else find_spec(name, *rest)
    )


@pytest.mark.parametrize(
    ("command", "arguments", "code", "said"),
    [pytest.param(*row[1:], id=f"{row[0]}-{i}-{row[2][-1] if row[2] else ''}"[:60]) for i, row in enumerate(ROWS)],
)
def test_bad_input(command, arguments, code, said, places, no_compile, capsys, tmp_path) -> None:
    workdir = Path(places["@runs"]) / tmp_path.name
    before = listing(Path(places["@trained"]))
    capsys.readouterr()
    found = COMMANDS[command].main(argv_of(command, arguments, places, workdir))
    line = last_line(capsys.readouterr().err)
    assert (found, [part for part in said if part not in line]) == (code, []), line
    assert not workdir.exists()
    assert listing(Path(places["@trained"])) == before


# ---------------------------------------------------------------- rows that are no error of a command


class Started(Exception):
    """Raised where a run would compile: it got past everything that could refuse it."""


def test_rows_14_and_24_warnings(places, monkeypatch, capsys, tmp_path) -> None:
    """More rows than ids, and a workdir in memory: said in a line each, and the run goes on."""

    def stop(*_: object) -> None:
        raise Started

    monkeypatch.setattr(setup, "lower_train_step", stop)
    monkeypatch.setattr(storage, "filesystem", lambda path: "tmpfs")
    monkeypatch.setattr(run, "state_fingerprint", lambda state: "0")
    workdir = tmp_path / "run"
    assert train.main(argv_of("run", ["model.vocab_size=264", f"stages=[{STAGE}]"], places, workdir)) == 70  # `Started`
    said = capsys.readouterr().out
    assert said.count("warning: ") == 2
    assert "warning: model.vocab_size 264 leaves 8 rows" in said
    assert f"warning: workdir '{workdir}' is in memory" in said


def test_row_24_a_directory_without_permission(places, monkeypatch, no_compile, capsys, tmp_path) -> None:
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: real(path, mode) and Path(path) != tmp_path)  # also for root
    assert train.main(argv_of("run", [], places, tmp_path / "run")) == STORAGE
    assert f"workdir '{tmp_path / 'run'}': '{tmp_path}' may not be written" in last_line(capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("bad", [40, -1])
def test_rows_46_and_47_debug_finds_ids_outside_the_vocabulary(bad: int) -> None:
    document = [[6, 7, 8, 9, 10, 11, 12, 13, 14] * 4]
    good = InMemoryCorpus([document] * 8, vocab_size=40)
    corpus = InMemoryCorpus([document] * 8, vocab_size=40)
    corpus.gather = lambda starts, lengths: np.where(good.gather(starts, lengths) == 9, bad, 7)
    dataset = Dataset(corpus, Windows(), None, sequence_length=16, batch_size=4, debug=True)
    with pytest.raises(DataError, match=f"tokens holds id {bad}, outside the vocabulary of 40"):
        dataset.batch(0)


def test_row_48_a_batch_without_masked_positions_has_loss_0() -> None:
    objective = MaskedLM()
    zero = jax.numpy.zeros(())
    value, gradient = jax.value_and_grad(lambda s: total_loss(objective, {"mlm": s * 0}, {"mlm": zero}))(1.0)
    assert (float(value), float(gradient)) == (0.0, 0.0)


# ---------------------------------------------------------------- the real exit


@pytest.mark.parametrize(
    ("tool", "arguments", "code", "said"),
    [
        ("train", [TINY, "model.num_heads=3", "corpus.path=x"], CONFIG, "num_heads 3"),
        ("tokenizer", ["decode", "@corpus", "256"], DATA, "id 256"),
        ("evaluate", ["@trained", "--which"], USAGE, "--which"),
    ],
)
def test_exit_code_of_the_process(tool, arguments, code, said, places, repository, tmp_path) -> None:
    argv = argv_of(tool, arguments, places, tmp_path / "run")
    ended = subprocess.run(
        [sys.executable, str(repository / "tools" / f"{tool}.py"), *argv],
        capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(repository)},
    )  # fmt: skip
    assert (ended.returncode, ended.stdout) == (code, "")
    assert ended.stderr.count("\n") == 1 and said in last_line(ended.stderr)
    assert not list(tmp_path.iterdir())


def test_debug_shows_the_traceback(places, capsys, tmp_path) -> None:
    assert train.main(argv_of("run", ["model.num_heads=3", "--debug"], places, tmp_path / "run")) == CONFIG
    err = capsys.readouterr().err
    assert err.startswith("Traceback") and "config.py" in err
    assert err.rstrip().split("\n")[-1].startswith("error: ") and "num_heads 3" in err
