"""Triton kernels, a file per op, or a folder: `llama_fast.triton_kernels`.

A file reads from the formula over the kernels and their launch configuration to the launcher, which
takes the arguments of the op. `launch.py`, `chips.py` and `rows.py` are what they share.
"""
