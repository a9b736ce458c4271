"""The cases of `linear`: of floats, quantised, and with the epilogue."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config.quantization import BITS, GROUP_SIZES
from ..dispatch import Case
from .inputs import randn
from .quantized_layout import random_weight
from .quantized_weight import QuantizedWeight


def cases() -> list[Case]:
    def whole(case: Case, epilogue: str) -> Case:
        def make(g, dtype, device):
            given = case.make(g, dtype, device)
            return *given, *(None, None, 0, 0, 0)[len(given) - 2 :], epilogue

        return Case(case.name, make, case.dtypes)

    return [
        *(whole(case, "") for case in (*float_cases(), *quantized_cases())),
        *(whole(case, "swiglu") for case in swiglu_cases()),
    ]


def float_cases() -> list[Case]:
    def sizes(*rows: int, C_in: int, C_out: int):
        # A weight of the published models' scale: rows of y come out of the order of 1.
        return lambda g, dtype, device: (
            randn(g, *rows, C_in, dtype=dtype, device=device),
            randn(g, C_out, C_in, dtype=dtype, device=device, scale=C_in**-0.5 if C_in else 1.0),
        )

    def view(of: tuple[int, ...], take, C_out: int):
        def make(g, dtype, device):
            x = take(randn(g, *of, dtype=dtype, device=device))
            weight = randn(g, C_out, x.shape[-1], dtype=dtype, device=device)
            return x, weight

        return make

    def outliers(g, dtype, device):
        x, weight = sizes(3, C_in=1030, C_out=21)(g, dtype, device)
        x[:, 7] *= 200
        return x, weight

    return [
        Case("one product", sizes(1, C_in=1, C_out=1)),
        Case("a vector", sizes(C_in=96, C_out=40)),
        Case("1 row", sizes(1, C_in=128, C_out=64)),
        Case("2 rows", sizes(2, C_in=33, C_out=65)),
        Case("3 rows", sizes(3, C_in=7, C_out=1)),
        Case("5 rows", sizes(5, C_in=65, C_out=33)),
        Case("16 rows", sizes(16, C_in=515, C_out=35)),
        Case("17 rows", sizes(17, C_in=515, C_out=35)),
        Case("40 rows", sizes(2, 20, C_in=258, C_out=130)),
        Case("300 rows", sizes(300, C_in=67, C_out=19)),
        Case("no rows", sizes(0, C_in=16, C_out=8)),
        Case("no outputs", sizes(3, C_in=16, C_out=0)),
        Case("no inputs", sizes(3, C_in=0, C_out=8)),
        Case("decode", sizes(1, 1, C_in=2048, C_out=256)),
        Case("long rows", sizes(4, C_in=14336, C_out=8)),
        Case("outliers", outliers),
        Case("columns of a wider tensor", view((6, 300), lambda x: x[:, 21:278], 24)),
        Case("last token of each row", view((3, 9, 64), lambda x: x[:, -1:], 48)),
        Case("heads of a transposed tensor", view((2, 7, 5, 64), lambda x: x.transpose(1, 2), 12)),
    ]


def quantized_cases() -> list[Case]:
    def sizes(
        *rows: int,
        C_in: int,
        C_out: int,
        bits: int = 8,
        group_size: int = 64,
        symmetric: bool = True,
        take=lambda x: x,
    ):
        def make(g, dtype, device):
            x = take(randn(g, *rows, C_in, dtype=dtype, device=device))
            return x, *random_weight(g, C_out, x.shape[-1], bits, group_size, symmetric, device)

        return make

    def outliers(bits: int):
        def make(g, dtype, device):
            args = sizes(3, C_in=1030, C_out=21, bits=bits, group_size=128)(g, dtype, device)
            args[0][:, 7] *= 200
            args[0][1, 64:192] = 0
            return args

        return make

    kinds = [
        Case(
            f"{bits} bits, group of {group_size}, {'symmetric' if symmetric else 'with minima'}",
            sizes(3, C_in=515, C_out=37, bits=bits, group_size=group_size, symmetric=symmetric),
        )
        for bits in BITS
        for group_size in GROUP_SIZES
        for symmetric in (True, False)
    ]
    rows = [
        Case(
            f"{M} rows, {bits} bits",
            sizes(M, C_in=258, C_out=130, bits=bits, group_size=group_size),
        )
        for M in (0, 1, 2, 5, 16, 17, 40)
        for bits, group_size in ((8, 64), (4, 32))
    ]
    return [
        Case("quantised, one product", sizes(1, C_in=1, C_out=1)),
        *kinds,
        *rows,
        Case("quantised, a vector", sizes(C_in=96, C_out=40, bits=4, group_size=32)),
        Case("quantised, no outputs", sizes(3, C_in=16, C_out=0)),
        Case("quantised, no inputs", sizes(3, C_in=0, C_out=8, bits=4)),
        Case("quantised, decode, 8 bits", sizes(1, 1, C_in=2048, C_out=256, group_size=128)),
        Case("quantised, decode, 4 bits", sizes(1, 1, C_in=2048, C_out=256, bits=4, group_size=32)),
        Case("quantised, long rows", sizes(4, C_in=14336, C_out=8, bits=4, group_size=32)),
        Case("quantised, outliers, 8 bits", outliers(8)),
        Case("quantised, outliers, 4 bits", outliers(4)),
        Case(
            "quantised, columns of a wider tensor",
            sizes(6, C_in=300, C_out=24, take=lambda x: x[:, 21:278]),
        ),
        Case(
            "quantised, last token of each row",
            sizes(3, 9, C_in=64, C_out=48, bits=4, group_size=32, take=lambda x: x[:, -1:]),
        ),
        Case(
            "quantised, heads of a transposed tensor",
            sizes(2, 7, 5, C_in=64, C_out=12, bits=4, take=lambda x: x.transpose(1, 2)),
        ),
    ]


def swiglu_cases() -> list[Case]:
    def sizes(*rows: int, C_in: int, F: int, scale: float = 1.0, form=None, take=lambda x: x):
        """Gates of the order of `scale`; form: bits, group size and whether without minima."""

        def make(g, dtype, device):
            x = take(randn(g, *rows, C_in, dtype=dtype, device=device))
            C = x.shape[-1]
            at = {"dtype": torch.float32 if form else dtype, "device": device}
            w = randn(g, 2 * F, C, scale=scale * C**-0.5 if C else 1.0, **at)
            return x, *(QuantizedWeight.from_float(w, *form).arguments if form else (w,))

        return make

    def columns(x: Tensor) -> Tensor:
        return x[:, 21:278]

    def last(x: Tensor) -> Tensor:
        return x[:, -1:]

    int8, int4 = (8, 64, True), (4, 32, True)
    kinds = [
        Case(
            f"swiglu, {bits} bits, {'symmetric' if symmetric else 'with minima'}, {M} rows",
            sizes(M, C_in=330, F=37, form=(bits, group_size, symmetric)),
        )
        for bits, group_size, _ in (int8, int4)
        for symmetric in (True, False)
        for M in (3, 16)
    ]
    return [
        Case("swiglu, one product", sizes(1, C_in=1, F=1)),
        Case("swiglu, a vector", sizes(C_in=96, F=40)),
        Case("swiglu, odd", sizes(3, C_in=33, F=13)),
        Case("swiglu, 9 outputs", sizes(5, C_in=72, F=9)),
        Case("swiglu, 16 rows", sizes(16, C_in=520, F=35)),
        Case("swiglu, 17 rows", sizes(17, C_in=264, F=24)),
        Case("swiglu, 40 rows", sizes(2, 20, C_in=130, F=66)),
        Case("swiglu, no rows", sizes(0, C_in=16, F=8)),
        Case("swiglu, no outputs", sizes(3, C_in=16, F=0)),
        Case("swiglu, no inputs", sizes(3, C_in=0, F=8)),
        Case("swiglu, decode", sizes(1, 1, C_in=2048, F=128)),
        Case("swiglu, saturated", sizes(6, C_in=136, F=21, scale=30.0)),
        Case("swiglu, columns of a wider tensor", sizes(6, C_in=300, F=24, take=columns)),
        Case("swiglu, last token of each row", sizes(3, 9, C_in=64, F=48, take=last)),
        *kinds,
        Case("swiglu, quantised, one product", sizes(1, C_in=1, F=1, form=(8, 32, True))),
        Case("swiglu, quantised, a vector", sizes(C_in=96, F=40, form=int4)),
        Case("swiglu, quantised, 9 outputs", sizes(5, C_in=72, F=9, form=(8, 128, True))),
        Case("swiglu, quantised, 17 rows", sizes(17, C_in=130, F=24, form=int8)),
        Case("swiglu, quantised, no rows", sizes(0, C_in=64, F=8, form=int4)),
        Case("swiglu, quantised, no outputs", sizes(3, C_in=64, F=0, form=int8)),
        Case("swiglu, quantised, no inputs", sizes(3, C_in=0, F=8, form=int4)),
        Case("swiglu, decode, 8 bits", sizes(1, 1, C_in=2048, F=128, form=int8)),
        Case("swiglu, decode, 4 bits", sizes(1, 1, C_in=2048, F=128, form=int4)),
        Case("swiglu, quantised, columns of a wider tensor",
             sizes(6, C_in=300, F=24, form=int8, take=columns)),
        Case("swiglu, quantised, last token of each row",
             sizes(3, 9, C_in=64, F=48, form=int4, take=last)),
    ]  # fmt: skip
