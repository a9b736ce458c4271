"""However it is installed, and from whatever folder Python is started, the package is the same: its
files are those of the tree, with the module that was compiled."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from llama_fast.backends import cpu

from . import bare

pytest.importorskip("setuptools", minversion="77", reason="a wheel is built with setuptools")
pytestmark = pytest.mark.skipif(cpu._cpu is None, reason="the C++ kernels are not built")
PACKAGE = "llama_fast"
# What is imported here: its folder, its files, and whether the C++ kernels can be.
LOOK = """
import importlib.util, json, pathlib
import llama_fast
folder = pathlib.Path(llama_fast.__file__).parent
files = sorted(str(x.relative_to(folder)) for pattern in ("**/*", "triton_kernels/**/*")
               for x in folder.glob(pattern) if x.is_file() and "__pycache__" not in x.parts)
assert importlib.util.find_spec("llama_fast.triton_kernels.rms_norm")
compiled = bool(importlib.util.find_spec("llama_fast._cpu"))
print(json.dumps([str(folder), sorted(set(files)), compiled]))
"""


def package_files(tree: Path) -> set[str]:
    """What git has of the package, what its link leads to too."""
    found = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", PACKAGE, "triton_kernels"],
        cwd=bare.ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    names = [name for name in found.stdout.splitlines() if (tree / name).is_file()]
    return {name.removeprefix(f"{PACKAGE}/") for name in names}


def run(*command: object, cwd: Path, **environment: str) -> str:
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=kept | environment,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def build(tree: Path, what: str, folder: Path) -> Path:
    """A wheel, an editable one, or an sdist of the tree, as pip has it built."""
    folder.mkdir(exist_ok=True)
    code = f"from setuptools import build_meta as b; b.build_{what}({str(folder)!r})"
    run(sys.executable, "-c", code, cwd=tree, LLAMA_FAST_CUDA="off")
    (made,) = folder.iterdir()
    return made


def with_what_is_compiled(tree: Path) -> Path:
    """So that the module is linked again, and nothing compiled that has not changed."""
    for built in bare.ROOT.glob("build/cpu-*"):
        shutil.copytree(built, tree / "build" / built.name)
    return tree


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A clone, in a folder of the package's own name."""
    return with_what_is_compiled(bare.export(tmp_path_factory.mktemp("parent") / PACKAGE))


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory) -> Path:
    # As an earlier version of the sources leaves it.
    for folder in (tree / "build" / "lib", tree / "build" / platform_folder()):
        (folder / PACKAGE).mkdir(parents=True)
        (folder / PACKAGE / "no_longer_there.py").touch()
    return build(tree, "wheel", tmp_path_factory.mktemp("wheel"))


def platform_folder() -> str:
    from setuptools import Distribution, Extension
    from setuptools.command.build import build

    command = build(Distribution({"ext_modules": [Extension("a", [])]}))
    command.finalize_options()
    return Path(command.build_lib).name


def install(made: Path, environment: Path) -> Path:
    """Installs it, and nothing that it asks for, as pip does; returns the environment's Python."""
    python = bare.environment(environment)
    options = ["--no-deps", "--no-index", "--no-compile", "--quiet", "--disable-pip-version-check"]
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, made, cwd=environment)
    return python


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The Python of an environment that has the wheel."""
    return install(wheel, tmp_path_factory.mktemp("installed") / "env")


def test_a_wheel_has_the_files_of_the_tree_and_the_module(tree, wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {n.removeprefix(f"{PACKAGE}/") for n in archive.namelist() if "dist-info" not in n}
    compiled = {name for name in names if name.startswith("_cpu.")}
    assert names - compiled == package_files(tree) and len(compiled) == 1


def test_an_sdist_makes_the_same_wheel(tree, wheel, tmp_path):
    sdist = build(tree, "sdist", tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        assert not [member.name for member in archive if member.issym() or member.islnk()]
        archive.extractall(tmp_path, filter="data")
    source = with_what_is_compiled(tmp_path / sdist.name.removesuffix(".tar.gz"))
    made = build(source, "wheel", tmp_path / "wheel")
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(made) as other:
        assert sorted(one.namelist()) == sorted(other.namelist())
        for name in one.namelist():
            if not name.endswith((".so", "RECORD")):
                assert one.read(name) == other.read(name), name


def test_the_package_is_the_same_from_any_folder(tree, installed, tmp_path):
    """From the clone's root Python imports the clone, from elsewhere what is installed; nowhere the
    clone's folder, which has the package's name, as a namespace."""
    empty, sources, path = tmp_path / "empty", str(tree / PACKAGE), {"PYTHONPATH": str(tree)}
    empty.mkdir()
    paths = "import sysconfig as s; print(s.get_path('purelib'))"
    packages = str(Path(run(installed, "-c", paths, cwd=empty).strip()) / PACKAGE)
    seen = [
        (sources, look(installed, tree)),
        (packages, look(installed, tree.parent)),
        (packages, look(installed, empty)),
    ]
    never = bare.environment(tmp_path / "never")
    seen += [
        (sources, look(never, tree)),
        (sources, look(never, tree.parent, **path)),
        (sources, look(never, empty, **path)),
    ]
    editable = install(build(tree, "editable", tmp_path / "editable"), tmp_path / "env")
    seen += [
        (sources, look(editable, tree)),
        (sources, look(editable, tree.parent)),
        (sources, look(editable, empty)),
    ]
    files = package_files(tree)
    for number, (folder, (found, names, compiled)) in enumerate(seen):
        assert found == folder, number
        assert {name for name in names if not name.startswith("_cpu.")} == files, number
        assert compiled and sum(name.startswith("_cpu.") for name in names) == 1, number


def look(python: Path, folder: Path, **environment: str) -> list:
    return json.loads(run(python, "-c", LOOK, cwd=folder, **environment))


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("doctor", "usable"),
        ("generate Once --seed 1 --max-new-tokens 4 --threads 1", ""),
        ("bench rms_norm --rounds 1 --backends cpu --threads 1", "rms_norm"),
        ("profile rms_norm --repeats 1 --threads 1 --trace t.json", "rms_norm"),
    ],
    ids=lambda word: word.split()[0] if word else "",
)
def test_the_commands_run_from_a_wheel(installed, tmp_path, command, says):
    said = run(installed.parent / "llama-fast", *command.split(), cwd=tmp_path)
    assert said.strip() and says in said
