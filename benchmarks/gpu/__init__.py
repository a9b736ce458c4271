"""Everything that needs a GPU, in one command: build, tests, the ops beside their peers, models.

    python -m benchmarks.gpu [--seconds 540] [--parts build,tests,…] [--json FILE]
    python -m benchmarks.gpu --device cpu      # a rehearsal: tiny shapes, no GPU

Nothing is downloaded and no environment is made: it runs on the Python that starts it, with the
torch, Triton, setuptools, pybind11 and ninja that are there. Each part is a process of its own with
a limit of time; one that fails is reported, and the rest still runs. The results are rows as every
other benchmark of this package writes them, with the goals of the project's targets beside them:
`llama-fast report` shows them.

In the rehearsal Triton's kernels run in its interpreter, and those of CUDA C++ compiled for the
host as in the tests.
"""
