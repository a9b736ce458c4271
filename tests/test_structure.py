"""The rules of the house, checked on its files: see CONTRIBUTING.md."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

import llama_fast.ops  # noqa: F401  declares the ops
from llama_fast.registry import OPS

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "llama_fast"

# What each room of the house may import from the package, besides itself and `errors`.
BASE = {"registry", "atomic", "numerics"}
OPS_LAYER = BASE | {"ops"}
PARTS = OPS_LAYER | {"config", "rope", "kv_cache", "quantize", "nn"}
MODEL = PARTS | {"checkpoint", "model"}
MAY_IMPORT = {
    "errors": set(),
    "atomic": set(),
    "environment": set(),
    "numerics": set(),
    "memory": {"_cpu"},
    "kind_of_call": {"_cpu"},
    "registry": {"kind_of_call"},
    "ops": BASE,
    "backends": OPS_LAYER | {"environment", "_cpu", "_cuda", "triton_kernels"},
    "config": set(),
    "rope": PARTS,
    "kv_cache": PARTS,
    "quantize": PARTS,
    "nn": PARTS,
    "ceilings": {"backends", "_cpu"},
    "timing": set(),
    "workloads": PARTS,
    "machine": set(),
    "profiling": MODEL
    | {"ceilings", "decode", "speed", "timing", "train", "triton_kernels", "workloads"},
    "results": {"atomic", "timing"},
    "contenders": BASE,
    "reference": BASE,
    "speed": PARTS
    | {"ceilings", "contenders", "memory", "reference", "results", "timing", "workloads"},
    "report": {"atomic", "machine", "results"},
    "checkpoint": {"atomic", "config", "quantize", "special_tokens", "tokenizer"},
    "model": MODEL,
    "gptq": PARTS,
    "quantize_folder": MODEL | {"gptq"},
    "quantize_report": MODEL | {"quantize_folder"},
    "sampling": MODEL,
    "hf": MODEL,
    "train": MODEL | {"tokenizer", "tokenizer_files"},
    "special_tokens": set(),
    "tokenizer_files": {"special_tokens"},
    "tokenizer": {"atomic", "special_tokens", "tokenizer_files"},
    "chat": {"tokenizer"},
    "decode": MODEL,
    "buckets": MODEL | {"decode"},
    "generate": MODEL | {"buckets", "decode", "sampling", "tokenizer", "chat"},
}
WITHOUT_TORCH = {"errors", "atomic", "tokenizer", "chat"}
FREE = {"__init__", "__main__", "cli", "demo"}  # the top of the house


def modules():
    """(room, file, imported names) of each Python file of the package."""
    for path in sorted(PACKAGE.rglob("*.py")):
        relative = path.relative_to(PACKAGE)
        room = relative.parts[0].removesuffix(".py")
        yield room, path, set(imports(path))


def imports(path: Path):
    """The absolute dotted names that a file imports, wherever in it."""
    package = ["llama_fast", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            if module == "llama_fast":
                yield from (f"llama_fast.{alias.name}" for alias in node.names)
            else:
                yield module


def test_imports_run_one_way():
    wrong = []
    for room, path, names in modules():
        if room in FREE:
            continue
        assert room in MAY_IMPORT, f"{path} is in no known room: add it to MAY_IMPORT"
        for name in names:
            if name.startswith("llama_fast."):
                other = name.split(".")[1]
                if other not in MAY_IMPORT[room] | {room, "errors"}:
                    wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_tokenizer_needs_no_torch():
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for room, path, names in modules()
        for name in names
        if room in WITHOUT_TORCH and name.split(".")[0] == "torch"
    ]
    assert not wrong, "\n".join(wrong)


def test_only_the_package_imports_the_backends():
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for room, path, names in modules()
        for name in names
        if name.startswith("llama_fast.backends") and room not in FREE | {"backends", "ceilings"}
    ]
    assert not wrong, "\n".join(wrong)


def stems(folder: str, suffix: str) -> set[str]:
    return {path.stem for path in (ROOT / folder).glob(f"*{suffix}")}


OP_HELPERS = {"__init__", "checks", "inputs", "logits", "quantized_kv", "quantized_weight"}
OP_STEMS = {path.stem for path in (PACKAGE / "ops").glob("*.py")} - OP_HELPERS
# Files that belong to no op, with what they are for.
HOUSEKEEPING = {
    "csrc/cpu": {"table", "ceilings"},
    "csrc/cuda": {"device"},
    "triton_kernels": {"__init__", "aot", "chips", "choice", "cubin", "launch", "rows", "tune"},
}


@pytest.mark.parametrize(
    ("folder", "suffix"), [("csrc/cpu", ".cpp"), ("csrc/cuda", ".cu"), ("triton_kernels", ".py")]
)
def test_every_kernel_has_its_op(folder, suffix):
    orphans = stems(folder, suffix) - OP_STEMS - HOUSEKEEPING[folder]
    assert not orphans, f"{folder}: no llama_fast/ops/<stem>.py for {sorted(orphans)}"


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


def test_triton_kernels_import_torch_and_triton_alone():
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in (ROOT / "triton_kernels").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom) and node.level != 1
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
