"""A checkout and an environment in which the project was never installed."""

from __future__ import annotations

import shutil
import site
import subprocess
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent


def export(folder: Path) -> Path:
    """Copies the tree as a clone has it, links and times of change kept: no build output and no
    egg-info. Returns the folder."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        source, target = ROOT / name, folder / name
        if source.is_symlink() or source.exists():  # else it is deleted here, and not yet in git
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target, follow_symlinks=False)
    return folder


def environment(folder: Path) -> Path:
    """Makes an environment with the packages of this one, but this project; returns its Python."""
    venv.EnvBuilder(symlinks=True, with_pip=False).create(folder)
    packages = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder)}))
    for of in _site_packages():
        for entry in of.iterdir():
            own = "llama_fast" in entry.name  # the package, its metadata, what an editable one is
            if not own and entry.suffix != ".pth" and not (packages / entry.name).exists():
                (packages / entry.name).symlink_to(entry)
    tool = Path(sysconfig.get_path("scripts"), "ninja")  # the package is a shell around it
    if tool.exists():
        (folder / "bin" / tool.name).symlink_to(tool)
    return folder / "bin" / "python"


def _site_packages() -> list[Path]:
    """This environment's folders of packages, first those that are found first."""
    names = {"purelib": sysconfig.get_path("purelib"), "platlib": sysconfig.get_path("platlib")}
    folders = [*names.values(), *site.getsitepackages(), site.getusersitepackages()]
    return [folder for folder in map(Path, dict.fromkeys(folders)) if folder.is_dir()]
