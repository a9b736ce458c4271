"""Triton kernels, one file per op: `llama_fast.triton_kernels`."""
