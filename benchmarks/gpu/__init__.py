"""Everything that needs a GPU, in three calls: tests, the ops beside their peers, whole models.

    python -m benchmarks.gpu                   # build, tests, graphs, compute-sanitizer
    python -m benchmarks.gpu kernels           # ops
    python -m benchmarks.gpu models            # a decoded token, a training step
    python -m benchmarks.gpu [STAGE …] [--parts build,tests,…] [--seconds 540] [--out FOLDER]
    python -m benchmarks.gpu all --device cpu  # a rehearsal: tiny shapes, no GPU

Nothing is downloaded, installed or set up: it runs in a bare checkout, on the Python that starts
it, with the torch, Triton, setuptools, pybind11 and ninja that are there. Each part is a process of
its own with a limit of time; one that fails is reported, and the rest still runs. All that is to be
kept is written to one folder as it comes: rows of results as every other benchmark of this package
writes them (`llama-fast report` shows them) with the goals of the project's targets, a line for
each test, what the compiler says of the kernels, and all that was said.

In the rehearsal Triton's kernels run in its interpreter, and those of CUDA C++ compiled for the
host as in the tests.
"""
