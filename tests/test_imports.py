"""The import rules of the package (CONTRIBUTING.md, "Folders"), read from the source with `ast`."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "bertgpt_jax"
BASE = {"config", "errors", "shapes"}

MAY_IMPORT = {
    "corpus": {"corpus", "config", "errors"},
    "batches": {"batches", "corpus", "config", "errors"},
    "nn": {"nn", *BASE},
    "models": {"models", "nn", *BASE},
    "parallel": {"parallel", "nn", *BASE},
    "objectives": {"objectives", "models", "nn", "batches", "corpus", *BASE},
    "training": {"training", "evaluation", "parallel", "objectives", "models", "nn", "batches", "corpus", *BASE},
    "generation": {"generation", "parallel", "models", "nn", "corpus", *BASE},
    "transfer": {
        *("transfer", "generation", "training", "parallel", "objectives", "models", "nn", "batches", "corpus", *BASE)
    },
    "evaluation": {
        *("evaluation", "transfer", "training", "parallel", "objectives", "models", "nn", "batches", "corpus", *BASE)
    },
    "planning": {"planning", "training", "parallel", "objectives", "models", "nn", "batches", "corpus", *BASE},
    "benchmarks": {
        *("benchmarks", "training", "evaluation", "parallel", "objectives", "models", "nn", "batches", "corpus", *BASE),
        *("transfer", "generation"),
    },
}
"""What a folder may import of our own package; `commands` may import everything and is imported by nobody."""

ONLY_IN = {
    "flax": ("nn/", "models/", "parallel/"),
    "grain": ("batches/pipeline.py", "benchmarks/"),
    "jax": (
        *("nn/", "models/", "parallel/", "objectives/", "training/", "transfer/", "evaluation/", "commands/"),
        *("benchmarks/", "generation/", "planning/", "shapes.py"),
    ),
    "orbax": ("training/",),
    "tokenizers": ("corpus/", "transfer/hf_tokenizer.py"),
    "sentencepiece": ("corpus/", "transfer/hf_tokenizer.py"),
    "pyarrow": ("corpus/tables.py",),
    "tensorflow_datasets": ("corpus/tfds.py",),
    "tensorboardX": ("training/trackers.py",),
    "tokamax": ("nn/tokamax_attention.py",),
}
"""Libraries that only some files may import at all, even inside a function."""

PRIVATE = {"nn/cudnn_packed.py", "planning/gpu.py", "parallel/cluster.py"}
"""Files that read jax's private modules (`jax._src`), and what they do without (CONTRIBUTING.md)."""

OPTIONAL = {
    "matplotlib",
    "torch",
    "transformers",
    "tensorflow",
    "wandb",
    "gcsfs",
    "s3fs",
    "apache_beam",
    "fsspec",
    "jieba",
    "tokamax",
}
"""Libraries of the extras: imported inside functions, so that the package works without them."""

SLOW = {"tensorflow_datasets", "pyarrow"}
"""Required, but imported inside functions too: only some sources need them, and they take up to a second."""

BANNED = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
"""Loading these formats runs code from the file."""

KEEPS_CODE = "training/kept.py"
"""Compiled programs, which are code, kept where nobody else may write; jax's own form of them is pickled."""

MESH_AXES = {"fsdp"}  # the axis names that are no ordinary words: data, pipe, context and tensor are


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def relative(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def imports(tree: ast.AST, path: Path) -> Iterator[str]:
    """Dotted names of everything imported anywhere below `tree`, relative imports resolved."""
    package = ("bertgpt_jax", *path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*start, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def at_import_time(tree: ast.Module) -> Iterator[ast.stmt]:
    """The statements that run when the module is imported: function bodies and TYPE_CHECKING blocks left out."""
    pending: list[ast.stmt] = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        blocks = [getattr(node, name, []) for name in ("body", "orelse", "finalbody")]
        blocks += [handler.body for handler in getattr(node, "handlers", [])]
        if any(blocks):
            pending.extend(statement for block in blocks for statement in block)
        else:
            yield node


def violations(path: Path, source: str) -> list[str]:
    """Everything in `source`, standing at `path` in the package, that breaks a rule."""
    tree = ast.parse(source)
    name, folder, found = relative(path), path.relative_to(PACKAGE).parts[0], []
    for imported in imports(tree, path):
        parts = imported.split(".")
        if parts[0] == "bertgpt_jax" and len(parts) > 1:
            target = parts[1]
            ours = (PACKAGE / target).is_dir() or (PACKAGE / f"{target}.py").is_file()
            if ours and target not in MAY_IMPORT.get(folder, {target} if folder == "commands" else BASE):
                found.append(f"{name}: {folder} may not import bertgpt_jax.{target}")
        if parts[0] in ONLY_IN and not name.startswith(ONLY_IN[parts[0]]):
            found.append(f"{name}: only {', '.join(ONLY_IN[parts[0]])} may import {parts[0]}")
        if parts[0] in BANNED and name != KEEPS_CODE:
            found.append(f"{name}: {parts[0]} runs code from files; nobody may import it")
    for statement in at_import_time(tree):
        early = {i.split(".")[0] for i in imports(statement, path)} & (OPTIONAL | SLOW | heavy_for(folder))
        found += [f"{name}:{statement.lineno}: import {library} inside the function that needs it" for library in early]
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and node.value in MESH_AXES and folder != "parallel":
            found.append(f"{name}:{node.lineno}: only parallel names mesh axes")
        private = isinstance(node, ast.Attribute) and node.attr == "_src" and ast.unparse(node.value) == "jax"
        private |= isinstance(node, ast.Import | ast.ImportFrom) and any(
            f"{imported}.".startswith("jax._src.") for imported in imports(node, path)
        )
        if private and name not in PRIVATE:
            found.append(f"{name}:{node.lineno}: may not use jax._src")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec"):
            found.append(f"{name}:{node.lineno}: {node.func.id}() runs text as code")
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
            found.append(f"{name}:{node.lineno}: allow_pickle runs code from files")
    return found


def heavy_for(folder: str) -> set[str]:
    """Libraries whose import would make `bertgpt VERB --help` slow."""
    return {"jax", "flax", "optax", "orbax", "grain"} if folder == "commands" else set()


@pytest.mark.parametrize("path", modules(), ids=relative)
def test_a_module_keeps_the_rules(path: Path) -> None:
    assert violations(path, path.read_text("utf-8")) == []


@pytest.mark.parametrize(
    ("place", "source", "complaint"),
    [
        ("corpus/x.py", "import jax.numpy as jnp", "may import jax"),
        ("corpus/x.py", "def f():\n    from grain import python", "may import grain"),
        ("corpus/x.py", "from bertgpt_jax import batches", "may not import bertgpt_jax.batches"),
        ("batches/x.py", "import grain", "may import grain"),
        ("nn/x.py", "from ..corpus import reader", "may not import bertgpt_jax.corpus"),
        ("models/x.py", "from bertgpt_jax.parallel.mesh import make_mesh", "may not import bertgpt_jax.parallel"),
        ("training/x.py", "from flax import linen", "may import flax"),
        ("training/x.py", "x = P('fsdp')", "only parallel names mesh axes"),
        ("training/x.py", "if True:\n    import wandb", "inside the function"),
        ("training/x.py", "import bertgpt_jax.commands.train", "may not import bertgpt_jax.commands"),
        ("config.py", "from bertgpt_jax import corpus", "may not import bertgpt_jax.corpus"),
        ("commands/x.py", "try:\n    import jax\nexcept ImportError:\n    pass", "inside the function"),
        ("nn/x.py", "def f():\n    from jax._src.cudnn import fused_attention_stablehlo", "may not use jax._src"),
        ("nn/x.py", "from jax import _src", "may not use jax._src"),
        ("nn/x.py", "import jax\nx = jax._src.core", "may not use jax._src"),
        ("transfer/x.py", "import pickle", "runs code"),
        ("transfer/x.py", "np.load(p, allow_pickle=True)", "runs code"),
        ("transfer/x.py", "eval(text)", "runs text as code"),
    ],
)
def test_the_rules_are_enforced(place: str, source: str, complaint: str) -> None:
    target = PACKAGE / place
    known = all((PACKAGE / name).exists() for name in ("corpus", "batches", "parallel", "commands"))
    assert known, "a folder that the rules speak of is gone"
    assert any(complaint in line for line in violations(target, source))


def test_no_module_imports_itself_through_others() -> None:
    paths = {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in modules()}
    graph: dict[str, set[str]] = {}
    for name, path in paths.items():
        found = {i for node in at_import_time(ast.parse(path.read_text("utf-8"))) for i in imports(node, path)}
        graph[name] = {m for i in found for m in (i, i.rpartition(".")[0]) if m in paths} - {name}
    while leaves := {name for name, targets in graph.items() if not targets}:
        graph = {name: targets - leaves for name, targets in graph.items() if name not in leaves}
    assert graph == {}, "these modules form a cycle, or import one"


def test_what_is_allowed_passes() -> None:
    source = "import jax\nfrom flax import linen as nn\nfrom bertgpt_jax.nn import layers\ndef f():\n    import wandb"
    assert violations(PACKAGE / "models" / "x.py", source) == []
    assert (
        violations(PACKAGE / "commands" / "x.py", "def f():\n    import jax\n    from bertgpt_jax import batches") == []
    )


def loaded_by(statement: str) -> set[str]:
    """Top-level names in sys.modules of a fresh interpreter after `statement`."""
    program = f"import sys\n{statement}\nprint(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    return set(done.stdout.split())


def import_all(folder: str, leave_out: tuple[str, ...] = ()) -> str:
    names = [p.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") for p in (PACKAGE / folder).rglob("*.py")]
    return "\n".join(f"import {name.removesuffix('.__init__')}" for name in sorted(names) if name not in leave_out)


@pytest.mark.parametrize(
    ("folder", "leave_out", "absent"),
    [
        ("corpus", (), {"jax", "jaxlib", "flax", "grain", "optax", "orbax"}),
        ("batches", ("bertgpt_jax.batches.pipeline",), {"jax", "jaxlib", "flax", "grain", "optax", "orbax"}),
        ("commands", (), {"jax", "jaxlib", "flax", "grain", "optax", "orbax", "matplotlib"}),
    ],
)
def test_importing_a_folder_loads_nothing_heavy(folder: str, leave_out: tuple[str, ...], absent: set[str]) -> None:
    statement = import_all(folder, leave_out)
    assert statement, f"bertgpt_jax/{folder} holds no modules"
    assert loaded_by(statement) & absent == set()


def test_the_list_of_those_that_read_private_modules_is_the_truth() -> None:
    readers = {
        relative(path) for path in modules() if "import" in (text := path.read_text("utf-8")) and "jax._src" in text
    }
    assert readers == PRIVATE
    contributing = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    assert all(f"`{name}`" in contributing for name in PRIVATE)
