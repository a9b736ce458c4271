"""What chips can do at most, as their makers publish it: peak rates for estimates without one."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """bandwidth  bytes a second to and from memory
    bfloat16   FLOP/s of dense matrix instructions that add up in float32
    float32    FLOP/s of ordinary multiply-adds
    """

    product: str
    bandwidth: float
    bfloat16: float
    float32: float
    source: str


# One product for each architecture of `triton_kernels.chips`. Figures with sparsity are halved.
LIMITS = {
    "sm_80": Limits("A100 SXM 80 GB", 2039e9, 312e12, 19.5e12, "NVIDIA A100 datasheet"),
    "sm_86": Limits("RTX 3090", 936e9, 71e12, 35.6e12, "NVIDIA Ampere GA102 whitepaper, table 9"),
    "sm_89": Limits("RTX 4090", 1008e9, 165.2e12, 82.6e12, "NVIDIA Ada GPU Architecture, table 2"),
    "sm_90": Limits("H100 SXM", 3350e9, 989.4e12, 66.9e12, "NVIDIA H100 datasheet"),
    "sm_100": Limits("B200", 7700e9, 2250e12, 75e12, "NVIDIA HGX B200 datasheet"),
    "sm_120": Limits(
        "RTX 5090", 1792e9, 209.5e12, 104.8e12, "NVIDIA RTX Blackwell GPU Architecture"
    ),
    "gfx942": Limits("MI300X", 5300e9, 1307.4e12, 163.4e12, "AMD Instinct MI300X data sheet"),
}
