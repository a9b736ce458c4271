"""What `benchmarks.gpu` measures of the CUDA C++ kernels, beside their peers: attention with both
of its prefill kernels, decoding, the linears of one row, and a model's steps by CUDA graphs.

The rehearsal without a GPU runs tiny shapes on the host, as the tests do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .gpu import Bench

OURS = "llama_fast"


@contextmanager
def kernels(gpu: bool) -> Iterator[None]:
    """Inside the block, ops run on the CUDA kernels or raise; without a GPU on the host."""
    from llama_fast.registry import use_backend

    if gpu:
        with use_backend("cuda", strict=True):
            yield
        return
    from tests.cuda_host import host

    with host.use_host(), use_backend("cuda", strict=True):
        yield


def with_setting(name: str, call: Callable[[], Any]) -> Callable[[], Any]:
    """The call with a constant of llama_fast.backends.cuda set to True."""
    from llama_fast.backends import cuda

    def set_and_call() -> Any:
        setattr(cuda, name, True)
        try:
            return call()
        finally:
            setattr(cuda, name, False)

    return set_and_call


def attention(b: Bench) -> None:
    """Causal, 32 query and 8 KV heads of 128, bfloat16; 16k tokens in all. First the two kernels
    must agree: what has not run on this GPU before is not timed unseen."""
    from llama_fast.registry import OPS

    from .gpu import sdpa

    op = OPS["attention"]
    for T in (2048, 4096, 8192, 16384) if b.gpu else (40,):
        B, H, K, D = max(1, b.size(16384, 40) // T), b.size(32, 4), b.size(8, 2), b.size(128, 64)
        q, k, v = b.randn(B, T, H, D), b.randn(B, T, K, D), b.randn(B, T, K, D)

        def run(q: Any = q, k: Any = k, v: Any = v) -> Any:
            return op(q, k, v, True, None, None, False)[0]

        warpgroups = with_setting("WARPGROUPS", run)
        contenders = {OURS: run}
        difference = (run().float() - warpgroups().float()).abs().max().item()
        if difference < 0.02:
            contenders[f"{OURS} warpgroups"] = warpgroups
        kinds = {"sdpa cudnn": "CUDNN_ATTENTION", "sdpa flash": "FLASH_ATTENTION"}
        for name, kind in (kinds if b.gpu else {"sdpa math": "MATH"}).items():
            contenders[name] = lambda kind=kind, q=q, k=k, v=v: sdpa(b, kind, q, k, v, True)
        b.row(
            f"cuda attention forward T={T}",
            contenders,
            flops=op.cost(q, k, v, True, None, None, False).flops,
            warpgroups_differ_by=difference,
        )
        if difference >= 0.02:
            raise ArithmeticError(f"T={T}: the kernel with warpgroups is off by {difference}")


def attention_decode(b: Bench) -> None:
    """One query against long caches, 32 query and 8 KV heads of 128, bfloat16."""
    from llama_fast.registry import OPS

    op = OPS["attention"]
    sizes = ((1, 8192), (1, 32768), (1, 131072), (16, 8192)) if b.gpu else ((1, 300),)
    for B, S in sizes:
        H, K, D = b.size(32, 4), b.size(8, 2), b.size(128, 64)
        q = b.randn(B, 1, H, D)
        k, v = (b.randn(B, K, S, D).transpose(1, 2) for _ in "kv")
        b.row(
            f"cuda attention decode B={B} S={S}",
            {OURS: lambda q=q, k=k, v=v: op(q, k, v, True, None, None, False)},
            nbytes=op.cost(q, k, v, True, None, None, False).bytes,
        )


def linear(b: Bench) -> None:
    """One row and 16 rows times the weights of the 8B shape, bfloat16 and quantised."""
    import llama_fast
    from llama_fast.ops.quantized_weight import QuantizedWeight

    functional = b.torch.nn.functional
    shapes = {"gate_up": (28672, 4096), "down": (4096, 14336)} if b.gpu else {"gate_up": (48, 64)}
    for name, (C_out, C_in) in shapes.items():
        weights: dict[str, Any] = {"bf16": b.randn(C_out, C_in, scale=C_in**-0.5)}
        for bits, group_size in ((8, 64), (4, 32)):
            weight = QuantizedWeight(C_out, C_in, bits, group_size, device=b.device)
            weight.codes.random_(256)
            weight.scales.fill_(0.01)
            weights[f"int{bits}"] = weight
        for M in (1, 16):
            x = b.randn(M, C_in)
            for form, weight in weights.items():
                contenders = {OURS: lambda x=x, w=weight: llama_fast.linear(x, w)}
                if form == "bf16":
                    contenders["torch"] = lambda x=x, w=weight: functional.linear(x, w)
                b.row(
                    f"cuda linear {form} {name} M={M}",
                    contenders,
                    nbytes=weight.nbytes + (M * (C_in + C_out)) * x.element_size(),
                )


def model(b: Bench) -> None:
    """A step of the 8B shape, one sequence of 1,024 tokens, through a CUDA graph; and once more
    with kernels that overlap, if both give the same tokens."""
    if not b.gpu:
        return
    from llama_fast.backends import cuda
    from llama_fast.cli.measure import bytes_per_token
    from llama_fast.config import LlamaConfig
    from llama_fast.decode import DecodeStep
    from llama_fast.model import Llama
    from llama_fast.ops.quantized_weight import QuantizedWeight
    from llama_fast.quantize import Quantization
    from llama_fast.registry import use_backend

    torch, context = b.torch, 1024
    for form in ("bf16", "int8", "int4"):
        config = LlamaConfig.preset("8b").shortened(2 * context)
        llama = Llama(config, device="meta", dtype=torch.bfloat16)
        settings = None if form == "bf16" else Quantization.of(form)
        for name, parameter in dict(llama.named_parameters()).items():
            kind = settings and settings.of_weight(name)
            if kind:
                weight = QuantizedWeight(
                    *parameter.shape, kind.bits, kind.group_size, kind.symmetric
                )
                weight = weight.to(b.device)
                weight.codes.random_(256)
                weight.scales.fill_(1e-3)
            elif parameter.ndim == 1:
                weight = torch.ones(parameter.shape, device=b.device)
            else:
                weight = b.randn(*parameter.shape, scale=parameter.shape[1] ** -0.5)
            llama.set_weight(name, weight)
        llama.rope = type(llama.rope)(config, b.device)
        llama.eval()
        prompt = torch.randint(config.vocab_size, (1, context), device=b.device)

        def step_with(overlap: bool, llama: Any = llama, prompt: Any = prompt) -> tuple[Any, list]:
            cuda.OVERLAP = overlap
            cache = llama.new_cache(1, 2 * context)
            step = DecodeStep(llama, cache)
            with use_backend("cuda"):  # quantised products of many rows are another backend's
                tokens = [llama(prompt, cache=cache, last_only=True)[:, -1].argmax(-1)]
            for _ in range(8):
                tokens.append(step(tokens[-1]).argmax(-1))
            assert step.replay is not None, "the step was not captured"
            cuda.OVERLAP = False

            def again() -> None:
                cache.reset()
                cache.advance(context)
                step(tokens[-1])

            return again, [int(token) for token in tokens]

        plain, expected = step_with(False)
        contenders = {OURS: plain}
        overlapping, found = step_with(True)
        if found == expected:
            contenders[f"{OURS} overlapping"] = overlapping
        b.row(
            f"cuda decode 8B {form}",
            contenders,
            nbytes=int(bytes_per_token(llama, context)),
            overlapping_tokens="equal" if found == expected else "DIFFER",
        )
        del llama, plain, overlapping, contenders
        torch.cuda.empty_cache()
        if found != expected:
            raise ArithmeticError(f"{form}: kernels that overlap give other tokens")
