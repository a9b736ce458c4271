"""The mix of instructions in a compiled kernel: which classes, how many, and where the loops are.

Counts are of the code as it lies there, not of what runs: a loop's body counts once. What lies in
loops is therefore counted apart, as it is what a long-running kernel mostly executes.
SASS, the machine code of NVIDIA's chips, is read as cuobjdump writes it ("CUDA Binary Utilities",
which also lists the opcodes); AMD's as LLVM's assembler writes it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple


class Instruction(NamedTuple):
    """target: where a jump goes, an address like its own; None for what is no jump."""

    address: int
    opcode: str
    target: int | None


@dataclass
class Class:
    """Instructions of one kind. forms: how often which, such as {"LDG 128 bit": 12}."""

    name: str
    count: int = 0
    in_loops: int = 0
    forms: Counter = field(default_factory=Counter)


MATRIX, SPECIAL, OTHER = "matrix product", "special function", "other"
FP32, FP16, FP64 = "float32 arithmetic", "float16/bfloat16 arithmetic", "float64 arithmetic"
COMPARE, CONVERT = "float compare, select", "conversion"
INTEGER, MOVE = "integer, address", "move"
GLOBAL_LOAD, GLOBAL_STORE = "global load", "global store"
SHARED_LOAD, SHARED_STORE = "shared load", "shared store"
LOCAL, CONSTANT, GENERIC = "local memory (spills)", "constant load", "generic load, store"
ATOMIC, ASYNC = "atomic", "asynchronous copy"
TENSOR_MEMORY = "tensor memory"
EXCHANGE, BARRIER, CONTROL = "exchange in a warp", "barrier, wait", "control"
# A loop without any of these only waits: for a barrier, or another program.
WORK = {MATRIX, FP32, FP16, FP64, SPECIAL, GLOBAL_LOAD, GLOBAL_STORE, SHARED_LOAD, SHARED_STORE,
        ASYNC, TENSOR_MEMORY}  # fmt: skip
CLASSES = (MATRIX, FP32, FP16, FP64, SPECIAL, COMPARE, CONVERT, GLOBAL_LOAD, GLOBAL_STORE, ASYNC,
           SHARED_LOAD, SHARED_STORE, TENSOR_MEMORY, LOCAL, CONSTANT, GENERIC, ATOMIC, EXCHANGE,
           BARRIER, INTEGER, MOVE, CONTROL, OTHER)  # fmt: skip


def mix(instructions: list[Instruction], classify: Callable[[str], tuple[str, str]]) -> list[Class]:
    """The classes that there are, in the order of CLASSES; `classify` is `sass_class` or
    `amd_class`."""
    classes = [classify(instruction.opcode) for instruction in instructions]
    work = [i.address for i, (name, _) in zip(instructions, classes, strict=True) if name in WORK]
    inside = loops(instructions, work)
    found: dict[str, Class] = {}
    for instruction, (name, form) in zip(instructions, classes, strict=True):
        one = found.setdefault(name, Class(name))
        one.count += 1
        one.in_loops += any(start <= instruction.address <= end for start, end in inside)
        one.forms[form] += 1
    return sorted(found.values(), key=lambda one: CLASSES.index(one.name))


def loops(instructions: list[Instruction], work: list[int]) -> list[tuple[int, int]]:
    """First and last address of each loop, which a jump back closes; those to one place are one
    loop. Loops in which none of the addresses of `work` lies are left out."""
    ends: dict[int, int] = {}
    for address, _, target in instructions:
        if target is not None and target < address:
            ends[target] = max(address, ends.get(target, 0))
    return [loop for loop in ends.items() if any(loop[0] <= at <= loop[1] for at in work)]


# --- NVIDIA -----------------------------------------------------------------------------------

_SASS = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*(?:\.\w+)*)([^;]*);")
_JUMPS = ("BRA", "JMP")
# By an opcode's name up to the first dot, without the U of what runs once for a warp.
_SASS_CLASSES = {
    FP32: "FADD FMUL FFMA FADD32I FMUL32I FFMA32I FADD2 FMUL2 FFMA2 FADD3 FSWZADD FHADD FHFMA",
    FP16: "HADD2 HMUL2 HFMA2 HADD2_32I HMUL2_32I HFMA2_32I",
    FP64: "DADD DMUL DFMA DSETP DMNMX",
    COMPARE: "FMNMX FMNMX3 FSEL FSET FSETP FCHK FCMP HMNMX2 HSET2 HSETP2 HMNMX3",
    CONVERT: "F2F F2FP F2I F2IP I2F I2FP I2I I2IP FRND",
    GLOBAL_STORE: "STG",
    LOCAL: "LDL STL",
    CONSTANT: "LDC LDCU",
    GENERIC: "LD ST",
    ATOMIC: "ATOM ATOMG ATOMS RED REDG REDAS ATOMCAS",
    ASYNC: "LDGSTS BLKCP BLKRED BLKPF TMALDG TMASTG TMAREDG TMAPF TMACCTL",
    TENSOR_MEMORY: "LDTM STTM TCCP TCSHIFT TCATOMSWS VIRTCOUNT LDTMC",
    EXCHANGE: "SHFL VOTE VOTEU REDUX CREDUX MATCH",
    BARRIER: "BAR BARRIER SYNCS MEMBAR FENCE ERRBAR DEPBAR LDGDEPBAR ARRIVES WARPSYNC WARPGROUP "
    "WARPGROUPSET ACQBULK ACQSHMINIT CGABAR_ARV CGABAR_WAIT CGABAR_GET CGABAR_SET TCBAR NANOSLEEP "
    "CCTL CCTLL CCTLT TMACMDFLUSH ENDCOLLECTIVE LDSDEPBAR SETMAXREG",
    INTEGER: "IMAD IMUL IADD IADD3 IADD32I IABS ISCADD ISETP ISET IMNMX IMNMX3 LEA LOP LOP3 LOP32I "
    "SHF SHL SHR PRMT SEL BFE BFI BMSK SGXT POPC FLO BREV IDP IDP4A PLOP3 PSETP P2R R2P VIADD "
    "VIMNMX VIMNMX3 VIADDMNMX VABSDIFF VABSDIFF4 VHMNMX ICMP ISBERD",
    MOVE: "MOV MOV32I CS2R S2R S2UR R2UR R2B B2R LEPC GETLMEMBASE CS2UR MOVM PMTRIG",
    CONTROL: "BRA BRX JMP JMX BRXU JMXU CALL RET EXIT BSSY BSYNC BREAK BMOV KILL YIELD RPCMOV RTT "
    "ELECT PREEXIT BPT NOP",
}
_CLASS_OF = {name: kind for kind, names in _SASS_CLASSES.items() for name in names.split()}
_PRODUCT = re.compile(r"(?P<kind>UTC)?[BDFHIOQ](?P<group>G)?MMA(_SP)?")
_WIDTH = re.compile(r"\.(?:(?P<bits>64|128|256)|[US](?P<narrow>8|16))(?:\.|$)")


def parse_sass(text: str) -> list[Instruction]:
    """One kernel's, as `cuobjdump -sass` writes it; without what fills up its end."""
    found = []
    for address, opcode, operands in _SASS.findall(text):
        target = re.search(r"\b0x([0-9a-f]+)\s*$", operands)
        jumps = opcode.split(".")[0] in _JUMPS and target
        found.append(Instruction(int(address, 16), opcode, int(target[1], 16) if jumps else None))
    while found and (found[-1].opcode == "NOP" or found[-1].target == found[-1].address):
        found.pop()
    return found


def sass_class(opcode: str) -> tuple[str, str]:
    """(class, form) of an opcode with its modifiers: ("global load", "LDG 128 bit")."""
    base = opcode.split(".")[0]
    product = _PRODUCT.fullmatch(base)
    if product:
        kind = "tcgen05" if product["kind"] else "wgmma" if product["group"] else "mma"
        return MATRIX, f"{kind} {opcode}"
    if base == "MUFU":
        return SPECIAL, opcode
    if base == "IMAD" and ".MOV" in opcode:
        return MOVE, "IMAD.MOV"
    if base in ("LDG", "LDS", "LDSM", "STS", "STSM"):
        kind = {"LDG": GLOBAL_LOAD, "LDS": SHARED_LOAD, "STS": SHARED_STORE}[base[:3]]
        return kind, f"{base} {bits(opcode)} bit"
    kind = _CLASS_OF.get(base) or _CLASS_OF.get(base.removeprefix("U"), OTHER)
    if base == "UTCBAR":
        kind = BARRIER
    if kind in (GLOBAL_STORE, LOCAL, GENERIC) or base == "LDGSTS":
        return kind, f"{base} {bits(opcode)} bit"
    return kind, base


def bits(opcode: str) -> int:
    """That an instruction moves for one thread; of matrices, 32 for each of them."""
    if opcode.startswith(("LDSM", "STSM")):
        count = re.search(r"\.([124])$", opcode)
        return 32 * int(count[1] if count else 1)
    width = _WIDTH.search(opcode)
    return int(width["bits"] or width["narrow"]) if width else 32


# --- AMD --------------------------------------------------------------------------------------

_AMD_LINE = re.compile(r"^\s+([a-z]\w+)(?:\s+(.*?))?\s*(?:;.*)?$")
_AMD_LABEL = re.compile(r"^(\.L\w+|\w+):")
# The first that fits.
_AMD_CLASSES = [
    (r"v_s?mfmac?_", MATRIX),
    (r"v_(exp|log|rcp|rsq|sqrt|sin|cos)_", SPECIAL),
    (r"v_cvt_", CONVERT),
    (r"v_(cmpx?|max|max3|min|min3|med3|cndmask)_.*(f16|f32|f64|bf16)|v_cndmask", COMPARE),
    (r"v_(pk_)?(add|sub|subrev|mul|fma|fmac|mac|mad|fmaak|fmamk|ldexp|dot2c?)_.*f32", FP32),
    (r"v_(pk_)?(add|sub|mul|fma|fmac|mad|dot2)_.*(f16|bf16)", FP16),
    (r"v_.*_f64", FP64),
    (r"(global|buffer)_load_lds|buffer_load_.*_lds", ASYNC),
    (r"(global|buffer)_(atomic)|ds_(add|max|min|cmpst)", ATOMIC),
    (r"(global|buffer)_load", GLOBAL_LOAD),
    (r"(global|buffer)_store", GLOBAL_STORE),
    (r"ds_(bpermute|permute|swizzle)|v_(readlane|readfirstlane|writelane|permlane)|.*_dpp$",
     EXCHANGE),
    (r"ds_(read|load)", SHARED_LOAD),
    (r"ds_(write|store)", SHARED_STORE),
    (r"scratch_", LOCAL),
    (r"flat_", GENERIC),
    (r"s_(load|buffer_load)", CONSTANT),
    (r"s_(waitcnt|barrier|sleep|setprio|sched)|buffer_(wbl2|inv)", BARRIER),
    (r"s_(cbranch|branch|endpgm|setpc|swappc|getpc|nop|trap)", CONTROL),
    (r"[vs]_(mov|accvgpr|swap|cmov)", MOVE),
    (r"[vs]_", INTEGER),
]  # fmt: skip
_AMD_WIDTH = {"ubyte": 8, "sbyte": 8, "byte": 8, "ushort": 16, "short": 16, "dword": 32,
              "dwordx2": 64, "dwordx3": 96, "dwordx4": 128}  # fmt: skip


def parse_amd(text: str) -> list[Instruction]:
    """One kernel's assembler text: addresses are the numbers of the instructions."""
    found: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for line in text.split("s_endpgm", 1)[0].splitlines():
        if label := _AMD_LABEL.match(line):
            labels[label[1]] = len(found)
        elif (match := _AMD_LINE.match(line)) and re.match(r"(v|s|ds|global|buffer|flat|scratch)_",
                                                           match[1]):  # fmt: skip
            found.append((match[1], match[2] or ""))
    return [
        Instruction(i, opcode, labels.get(operands.strip()) if "branch" in opcode else None)
        for i, (opcode, operands) in enumerate(found)
    ]


def amd_class(opcode: str) -> tuple[str, str]:
    """(class, form) of an opcode."""
    kind = next((kind for pattern, kind in _AMD_CLASSES if re.match(pattern, opcode)), OTHER)
    last = opcode.rpartition("_")[2]
    if kind in (GLOBAL_LOAD, GLOBAL_STORE, LOCAL) and last in _AMD_WIDTH:
        return kind, f"{opcode.rpartition('_')[0]} {_AMD_WIDTH[last]} bit"
    return kind, opcode
