"""The rules of the house, checked on its files: see CONTRIBUTING.md."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

import llama_fast.ops  # noqa: F401  declares the ops
from llama_fast.dispatch import OPS

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "llama_fast"

# What the files of each folder may import from the package, besides their own folder's and
# `errors`. `_cpu` and `_cuda` are the compiled modules.
KERNELS = {"_cpu", "_cuda", "triton_kernels"}
MAY_IMPORT = {
    "errors": set(),
    "utils": set(),
    "config": {"utils"},
    "tokenizer": {"utils"},
    "dispatch": {"utils", "config", "_cpu"},
    "ops": {"utils", "config", "dispatch"},
    "backends": {"utils", "config", "dispatch", "ops"} | KERNELS,
    "nn": {"utils", "config", "dispatch", "ops"},
    "checkpoint": {"utils", "config", "tokenizer"},
    "distributed": {"utils", "config", "dispatch", "ops", "nn", "checkpoint"},
    "model": {"utils", "config", "dispatch", "ops", "nn", "checkpoint", "distributed"},
    "hf": {"utils", "dispatch", "ops"},
}
MODEL = MAY_IMPORT["model"] | {"model"}
MAY_IMPORT |= {
    "quantization": MODEL,
    "generation": MODEL | {"tokenizer", "_cpu"},
    "training": MODEL | {"tokenizer"},
    "inspect": MODEL | {"tokenizer", "generation", "hf"},
    "engines": MODEL | {"tokenizer", "generation", "training", "hf"},
}
BELOW_BENCH = MODEL | {"tokenizer", "quantization", "generation", "training", "hf", "inspect"}
MAY_IMPORT["bench"] = BELOW_BENCH | KERNELS
MAY_IMPORT["serve"] = MODEL | {"tokenizer", "generation"}
FREE = {"__init__", "__main__", "cli", "demo"}  # the top of the house
WITHOUT_TORCH = {"errors", "tokenizer"}


def modules():
    """(folder, file, imported names) of each Python file of the package."""
    for path in sorted(PACKAGE.rglob("*.py")):
        folder = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        yield folder, path, set(imports(path))


def imports(path: Path):
    """The absolute dotted names of what a file imports, wherever in it."""
    package = ["llama_fast", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def test_imports_run_one_way():
    wrong = []
    for folder, path, names in modules():
        if folder in FREE:
            continue
        assert folder in MAY_IMPORT, f"{path} is in no known folder: add it to MAY_IMPORT"
        for name in names:
            if name.startswith("llama_fast."):
                other = name.split(".")[1]
                if other not in MAY_IMPORT[folder] | {folder, "errors"}:
                    wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_no_file_imports_itself_by_way_of_others():
    """Imports inside of functions too: they hide a cycle, and do not undo it."""
    files = {}
    for _, path, names in modules():
        parts = path.relative_to(ROOT).with_suffix("").parts
        files[".".join(parts).removesuffix(".__init__")] = names
    del files["llama_fast"]  # its names are looked up when they are asked for

    def others(file: str) -> set[str]:
        """The files that its imports lead to: modules, or those that have the symbols."""
        found = {name if name in files else name.rpartition(".")[0] for name in files[file]}
        return (found & files.keys()) - {file}

    cycles, done = [], set()

    def walk(file: str, way: list[str]) -> None:
        if file in way:
            cycles.append(" → ".join([*way[way.index(file) :], file]))
        elif file not in done:
            for other in sorted(others(file)):
                walk(other, [*way, file])
            done.add(file)

    for file in files:
        walk(file, [])
    assert not cycles, "\n".join(cycles)


def test_imports_inside_the_package_are_relative():
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for _, path, _ in modules()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if (
            isinstance(node, ast.ImportFrom)
            and not node.level
            and (node.module or "").startswith("llama_fast")
        )
        or (
            isinstance(node, ast.Import)
            and any(a.name.startswith("llama_fast") for a in node.names)
        )
    ]
    assert not wrong, "\n".join(wrong)


def test_tokenizer_needs_no_torch():
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for folder, path, names in modules()
        for name in names
        if folder in WITHOUT_TORCH and name.split(".")[0] == "torch"
    ]
    assert not wrong, "\n".join(wrong)


def test_only_the_package_imports_the_backends():
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for folder, path, names in modules()
        for name in names
        if name.startswith("llama_fast.backends") and folder not in FREE | {"backends"}
    ]
    assert not wrong, "\n".join(wrong)


def stems(folder: str, suffix: str) -> set[str]:
    """Of the files, and of the folders that hold such files: a family of several is a folder."""
    found = (ROOT / folder).rglob(f"*{suffix}")
    parts = [path.relative_to(ROOT / folder).with_suffix("").parts for path in found]
    return {names[0] for names in parts}


OP_HELPERS = {
    "__init__",
    "attention_cases",
    "attention_checks",
    "attention_varlen",
    "checks",
    "documents",
    "inputs",
    "linear_cases",
    "logits",
    "model_inputs",
    "quantized_kv",
    "quantized_layout",
    "quantized_moments",
    "quantized_weight",
    "random_bits",
    "rounding",
}
# No model calls them: an optimizer does.
CALLED_BY_NO_MODEL = {"adamw"}
OP_STEMS = {path.stem for path in (PACKAGE / "ops").glob("*.py")} - OP_HELPERS
# Files that belong to no op, and kernels of an op's variants that have a file of their own.
HOUSEKEEPING = {
    "csrc/cpu": {"table", "roofline"},
    "csrc/cuda": {"device"},
    "triton_kernels": {
        "__init__",
        "aot",
        "chips",
        "choice",
        "cubin",
        "launch",
        "rows",
        "shapes",
        "tune",
    },
}


@pytest.mark.parametrize(
    ("folder", "suffix"), [("csrc/cpu", ".cpp"), ("csrc/cuda", ".cu"), ("triton_kernels", ".py")]
)
def test_every_kernel_has_its_op(folder, suffix):
    # A family of several files is a folder of its stem.
    sources = (path.relative_to(ROOT / folder) for path in (ROOT / folder).rglob(f"*{suffix}"))
    found = {path.parts[0].removesuffix(suffix) for path in sources}
    orphans = found - OP_STEMS - HOUSEKEEPING[folder]
    assert not orphans, f"{folder}: no llama_fast/ops/<stem>.py for {sorted(orphans)}"


def test_every_kernel_of_triton_is_compiled_ahead_of_time():
    folder = ROOT / "triton_kernels"
    files = [folder / f"{stem}.py" for stem in OP_STEMS]
    files += [folder / stem / "__init__.py" for stem in OP_STEMS]
    kernels = [path for path in files if path.is_file()]
    assert len(kernels) > 5
    missing = [str(path) for path in kernels if "def aot_calls(" not in path.read_text()]
    assert not missing, missing


# Where names are used that torch does not promise: `dispatch/torch_private.py` says why, and what
# stands in for them. A checkpoint is written in torch's own format; a snapshot of a model names
# torch's modules, and uses nothing of them.
TORCH_PRIVATE = {"dispatch/torch_private.py", "checkpoint/writers.py", "generation/snapshot.py"}


def test_private_names_of_torch_are_used_in_one_place():
    private = r"\btorch(\.[a-z]\w*)*\._[a-zA-Z]\w*|\b_current_level\b|\b_is_profiler_enabled\b"
    allowed = r"(forward_ad|profiler)\._"  # as torch_private.py offers them
    wrong = [
        f"{path.relative_to(ROOT)}: {found.group()}"
        for path in PACKAGE.rglob("*.py")
        if path.relative_to(PACKAGE).as_posix() not in TORCH_PRIVATE
        for found in re.finditer(private, re.sub(allowed + r"\w+", "", path.read_text("utf-8")))
    ]
    assert not wrong, "\n".join(wrong)


def test_every_op_has_its_page():
    assert OP_STEMS <= stems("docs/ops", ".md"), OP_STEMS - stems("docs/ops", ".md")


@pytest.mark.parametrize("stem", sorted(OP_STEMS))
def test_every_op_has_cost_and_cases(stem):
    # The stem cross_entropy holds the op linear_cross_entropy.
    names = [name for name in OPS if name in (stem, f"linear_{stem}")]
    assert names, f"llama_fast/ops/{stem}.py declares no op of its name"
    for name in names:
        assert OPS[name].cost is not None, f"{name} has no cost()"
        assert OPS[name].cases is not None and OPS[name].cases(), f"{name} has no cases()"
        of_model = OPS[name].at_model_size is not None
        assert of_model or name in CALLED_BY_NO_MODEL, f"{name} has no at_model_size()"


def _within(path: Path, level: int) -> bool:
    """Whether a relative import of so many dots stays within triton_kernels."""
    return 0 < level <= len(path.relative_to(ROOT / "triton_kernels").parts)


def test_triton_kernels_import_torch_and_triton_alone():
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in (ROOT / "triton_kernels").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom) and not _within(path, node.level)
            else []
        )
        if name.split(".")[0] not in sys.stdlib_module_names | {"torch", "triton"}
    ]
    assert not wrong, "\n".join(wrong)


def test_no_torch_in_compiled_code():
    wrong = [
        str(path.relative_to(ROOT))
        for path in (ROOT / "csrc").rglob("*")
        if path.is_file() and re.search(r"#\s*include\s*[<\"](torch|ATen|c10)", path.read_text())
    ]
    assert not wrong, wrong


def test_cpu_and_cuda_sources_do_not_see_each_other():
    wrong = [
        str(path.relative_to(ROOT))
        for here, there in (("cpu", "cuda"), ("cuda", "cpu"))
        for path in (ROOT / "csrc" / here).rglob("*")
        if path.is_file() and re.search(rf"#\s*include\s*[<\"].*{there}/", path.read_text())
    ]
    assert not wrong, wrong


# The one place where the package reads environment variables, and setup.py for the build.
ENVIRONMENT = {"environment.py"}


def test_environment_is_read_in_one_place():
    wrong = [
        str(path.relative_to(ROOT))
        for path in [*PACKAGE.rglob("*.py"), *(ROOT / "triton_kernels").rglob("*.py")]
        if path.name not in ENVIRONMENT
        and re.search(r"\b(environ|getenv)\b", path.read_text(encoding="utf-8"))
    ]
    assert not wrong, wrong


# What makes tensors of sizes alone, on torch's default device unless another is said.
FACTORIES = set(
    "arange as_tensor asarray empty empty_permuted empty_strided eye full linspace logspace ones"
    " rand randint randn randperm range scalar_tensor tensor tril_indices triu_indices"
    " zeros".split()
)


def factories_without_device(source: str) -> list[str]:
    """Calls of torch's factories, also through partial or an alias, that leave the device open."""
    wrong = []
    tree = ast.parse(source)
    said = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            # **arguments may say it: where they are made, the reader sees to it.
            if any(keyword.arg in ("device", None) for keyword in node.keywords):
                said.update(id(n) for part in (node.func, *node.args) for n in own_names(part))
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Attribute)
            and node.attr in FACTORIES
            and isinstance(node.value, ast.Name)
            and node.value.id == "torch"
            and id(node) not in said
        ):
            wrong.append(f"{node.lineno}: torch.{node.attr}")
    return wrong


def own_names(part: ast.AST):
    """Nodes of what is called or handed on, but not those of calls inside it."""
    yield part
    if not isinstance(part, ast.Call):
        for child in ast.iter_child_nodes(part):
            yield from own_names(child)


def test_every_factory_says_its_device():
    wrong = [
        f"{path.relative_to(ROOT)}:{found}"
        for path in [*PACKAGE.rglob("*.py"), *(ROOT / "triton_kernels").rglob("*.py")]
        for found in factories_without_device(path.read_text(encoding="utf-8"))
    ]
    assert not wrong, "\n".join(wrong)


def test_a_factory_without_a_device_is_found():
    assert factories_without_device("torch.zeros(2, device=d)\npartial(torch.ones, device=d)") == []
    assert factories_without_device("f(torch.ones(2), device=d)") == ["1: torch.ones"]
    assert factories_without_device("make = torch.tensor\nmake(2)") == ["1: torch.tensor"]
