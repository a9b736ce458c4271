"""Which GPUs and which drivers run what `llama_fast._cuda` was built of."""

from __future__ import annotations

import re


def serves(architecture: str, major: int, minor: int, *, compiles_ptx: bool = True) -> bool:
    """Whether code for `architecture` runs on a GPU of this compute capability.

    Code runs within its major version, on its own minor version and later ones; "a" means on that
    version alone; PTX is compiled by the driver for any later version. Source: the CUDA C++
    Programming Guide, "Binary Compatibility" and "PTX Compatibility".
    """
    number, suffix, ptx = re.fullmatch(r"(\d+)([af]?)(\+PTX)?", architecture).groups()
    its_major, its_minor = int(number[:-1]), int(number[-1])
    if suffix == "a":
        return (its_major, its_minor) == (major, minor)
    same = its_major == major and its_minor <= minor
    return same or (bool(ptx) and compiles_ptx and (its_major, its_minor) <= (major, minor))


def reasons(
    gpu: str, capability: tuple[int, int], architectures: list[str], driver: int, built_with: int
) -> list[str]:
    """Why a build for `architectures` does not run on a GPU; nothing where it does.

    driver, built_with  versions of CUDA, such as 13020 for 13.2: the latest that the driver serves
                        (0: it does not say), and that of the module's runtime

    A program runs on the drivers of its own major version of CUDA and on later ones, but a driver
    compiles no PTX that is newer than itself. Source: CUDA Compatibility, "Minor Version
    Compatibility".
    """
    if driver // 1000 < built_with // 1000:
        return [_driver_is_older(driver, built_with)]
    if any(serves(a, *capability, compiles_ptx=driver >= built_with) for a in architectures):
        return []
    if any(serves(a, *capability) for a in architectures):
        return [_driver_is_older(driver, built_with, ", and compiles no PTX of a later one")]
    if capability < (8, 0):
        return [f"{gpu} has compute capability {capability}; the kernels need 8.0 or later"]
    wanted = "".join(map(str, capability))
    return [
        f"llama_fast._cuda was built for {', '.join(architectures)} and {gpu} is {wanted}: "
        f"install again with LLAMA_FAST_CUDA={'90a' if wanted == '90' else wanted}"
    ]


def _driver_is_older(driver: int, built_with: int, limit: str = "") -> str:
    built, served = (f"{v // 1000}.{v % 1000 // 10}" for v in (built_with, driver))
    toolkit = f"of CUDA {served}"
    if not driver:
        served, toolkit = "of a version that it does not say", "that it serves"
    return (
        f"llama_fast._cuda was built with CUDA {built}, and the NVIDIA driver here serves CUDA "
        f"{served}{limit}: update the driver, or set CUDA_HOME to a toolkit {toolkit} and install "
        "again"
    )
