"""`llama-fast finetune`: a model is trained on files of text or dialogs, by a LoRA or whole."""

from __future__ import annotations

import dataclasses
import sys
import time
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import DataError
from ..utils.environment import processes_started
from .finetune_report import figures, plan, summary
from .finetune_run import Run
from .interrupt import unwind_when_stopped
from .loading import load_model
from .options import (
    Debug,
    Device,
    DType,
    Named,
    Threads,
    device_named,
    example,
    folder_to_fill,
    model_folder,
    set_threads,
)
from .terminal import note, note_pairs, show

if TYPE_CHECKING:
    from ..checkpoint import Checkpoint
    from ..distributed import Processes
    from ..model import Llama
    from ..training import Adapter, TrainConfig
    from ..training.dpo import DPO

RANK = 16
TOKENS_PER_STEP, TOKENS_AT_ONCE, BLOCK = 4096, 2048, 2048
EPOCHS, LEAST_STEPS = 3, 100


class TrainOn(str, Enum):
    answers = "answers"
    last = "last"
    all = "all"


class Optimizer(str, Enum):
    """adamw: float32 moments, and float32 copies of bfloat16 weights. adamw-8bit: moments of 8
    bits, bfloat16 weights rounded at random. in-backward: as adamw-8bit, each weight updated as
    soon as its gradient is there."""

    adamw = "adamw"
    adamw_8bit = "adamw-8bit"
    in_backward = "in-backward"


@example("llama-fast finetune demo facts.jsonl --out run")
def finetune(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="Folder of the model; demo: the small one that ships."
        ),
    ],
    data: Annotated[
        list[Path],
        typer.Argument(
            metavar="DATA…",
            help="Files or folders: .txt, or JSON and JSONL of texts, dialogs or questions and "
            "answers.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            callback=folder_to_fill,
            metavar="RUN",
            help="Folder of the run. The same command goes on with a run that was interrupted.",
            show_default="needed, but for --show",
        ),
    ] = None,
    lora: Annotated[
        int | None,
        typer.Option(
            "--lora",
            min=1,
            metavar="RANK",
            help="Train a LoRA of this rank.",
            show_default=f"{RANK}, but for --new-rows",
        ),
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option(
            metavar="A", help="Its update is multiplied by A / RANK.", show_default="2 × RANK"
        ),
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="Train all weights instead of a LoRA.")
    ] = False,
    sharded: Annotated[
        bool,
        typer.Option(
            "--sharded",
            help="Of several processes each holds a part of the weights below a LoRA too, as it "
            "does with --full.",
        ),
    ] = False,
    new_rows: Annotated[
        bool,
        typer.Option(
            "--new-rows",
            help="Train the rows of the tokens that vocab extend has added, in the embedding and "
            "the head: alone, or beside a LoRA with --lora RANK.",
        ),
    ] = False,
    quantize: Annotated[
        Named | None,
        typer.Option(
            help="Round the weights below the LoRA to integers (QLoRA).", show_default="as stored"
        ),
    ] = None,
    epochs: Annotated[
        float | None,
        typer.Option(
            metavar="N",
            help="Passes over the data.",
            show_default=f"{EPOCHS}, or as many as {LEAST_STEPS} steps take",
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Steps, in place of --epochs.", show_default="none"),
    ] = None,
    block: Annotated[
        int | None,
        typer.Option(
            min=8,
            metavar="N",
            help="Tokens of a packed row: a dialog must fit into it.",
            show_default=f"the model's context, at most {BLOCK:,}",
        ),
    ] = None,
    tokens_per_step: Annotated[
        int, typer.Option(min=1, metavar="N", help="Tokens of a step, in whole packed rows.")
    ] = TOKENS_PER_STEP,
    lr: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="The highest learning rate.",
            show_default="by the model's size; for a LoRA 10 × that of --full; for --full with "
            "--dpo a 30th",
        ),
    ] = None,
    embedding_lr: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="That of the embedding, the head and new rows: for --full and --new-rows.",
            show_default="that of --lr",
        ),
    ] = None,
    held_out: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|SHARE",
            help="Texts to judge by that are not trained on: a file, or a share of the rows such "
            "as 0.05.",
            show_default="none",
        ),
    ] = None,
    train_on: Annotated[
        TrainOn, typer.Option(help="What of a dialog is trained: its answers, the last, or all.")
    ] = TrainOn.answers,
    dpo: Annotated[
        bool,
        typer.Option(
            "--dpo", help="Learn to prefer one answer to another: rows of prompt, chosen, rejected."
        ),
    ] = False,
    beta: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            help="Of --dpo: the less, the farther the model may go from what it was.",
            show_default="0.1",
        ),
    ] = None,
    skip_faults: Annotated[
        bool,
        typer.Option(
            "--skip-faults", help="Leave out rows that cannot be used or are too long, and count."
        ),
    ] = False,
    show_rows: Annotated[
        int | None,
        typer.Option(
            "--show",
            min=1,
            metavar="N",
            help="Show N rows, with what is trained in colour, and stop.",
            show_default="train",
        ),
    ] = None,
    sample: Annotated[
        str | None,
        typer.Option(
            metavar="PROMPT",
            help="Continue this text at each evaluation.",
            show_default="none",
        ),
    ] = None,
    checkpointing: Annotated[
        bool,
        typer.Option(
            "--checkpointing", help="Compute activations twice, in a fraction of the memory."
        ),
    ] = False,
    optimizer: Annotated[
        Optimizer,
        typer.Option(
            help="adamw-8bit: moments of 8 bits, without float32 copies of the weights; "
            "in-backward: no gradient is kept besides."
        ),
    ] = Optimizer.adamw,
    seed: Annotated[
        int, typer.Option(min=0, max=2**31 - 1, metavar="N", help="Of order and first values.")
    ] = 0,
    cache: Annotated[
        Path | None,
        typer.Option(
            callback=folder_to_fill,
            metavar="DIR",
            help="Keep the ids of the data files here, for other runs on them.",
            show_default="in RUN, until it is finished",
        ),
    ] = None,
    dtype: Annotated[
        DType | None,
        typer.Option(help="Of the model's weights.", show_default="as stored; float16: bfloat16"),
    ] = None,
    device: Device = "auto",
    threads: Threads = None,
    debug: Debug = False,
) -> int:
    """Train a model on your own texts or dialogs.

    It says what is trained on and what is not, and ends with the folder of a LoRA (or of the model
    with --full), figures, a table of the steps and the curve of the loss. An interrupted run goes
    on, to the same bits, when the same command is given again.
    """
    if out is None and show_rows is None:
        raise typer.BadParameter("a folder for the run is needed. Write: --out run",
                                 param_hint="--out")  # fmt: skip
    if full and quantize is not None:
        raise typer.BadParameter(
            "integers are not trained. Leave --full out, and a LoRA is trained beside them",
            param_hint="--quantize",
        )
    if sharded and quantize is not None:
        raise typer.BadParameter(
            "integers are not sharded. Leave one of the two out", param_hint="--quantize"
        )
    if sharded and processes_started() == 1:
        raise typer.BadParameter(
            "one process has nobody to share with. Write: torchrun --nproc-per-node 2 -m "
            "llama_fast finetune …",
            param_hint="--sharded",
        )
    if full and new_rows:
        raise typer.BadParameter(
            "all weights are trained, new rows among them. Give one of the two",
            param_hint="--new-rows",
        )
    if embedding_lr is not None and not (full or new_rows):
        raise typer.BadParameter(
            "a LoRA trains neither embedding nor head. Write: --new-rows, or --full",
            param_hint="--embedding-lr",
        )
    rank = (None if full or new_rows else RANK) if lora is None else lora
    if alpha is not None and rank is None:
        raise typer.BadParameter("it is a setting of a LoRA. Write: --lora RANK --alpha A",
                                 param_hint="--alpha")  # fmt: skip
    if epochs is not None and steps is not None:
        raise typer.BadParameter("it is given beside --steps. Give one of the two",
                                 param_hint="--epochs")  # fmt: skip
    if beta is not None and not dpo:
        raise typer.BadParameter("it is a setting of DPO. Write: --dpo --beta X",
                                 param_hint="--beta")  # fmt: skip
    if dpo and train_on is not TrainOn.answers:
        raise typer.BadParameter(
            "of preferences the two answers are trained. Leave it out", param_hint="--train-on"
        )
    if dtype is DType.float16:
        raise typer.BadParameter(
            "gradients are too small for float16. Write: --dtype bfloat16", param_hint="--dtype"
        )
    folder = model_folder(None) if model == "demo" else Path(model)

    from ..checkpoint import Checkpoint, open_checkpoint
    from ..distributed import Processes, started
    from ..tokenizer import Tokenizer
    from ..tokenizer.chat_choice import chat_format
    from ..tokenizer.vocabulary import tokens_after_specials
    from ..training import read, read_pairs
    from ..training.dpo import DPO
    from ..training.split import hold_out

    # Everything that can be wrong with the request is found before the weights are read.
    set_threads(threads)
    where = device_named(device)
    source = open_checkpoint(folder)
    quantized = not isinstance(source, Checkpoint)
    if quantized and (full or sharded or quantize is not None):
        raise typer.BadParameter(
            f"{folder} is quantised already. Leave it out: a LoRA is trained beside the integers",
            param_hint="--full" if full else "--sharded" if sharded else "--quantize",
        )
    context = source.config.max_seq_len
    block = min(context, BLOCK) if block is None else block
    if block > context:
        raise typer.BadParameter(
            f"{block:,} tokens are more than the model's context of {context:,}. Write: --block "
            f"{context}",
            param_hint="--block",
        )
    tokenizer = Tokenizer.from_pretrained(folder)
    ids = tokens_after_specials(tokenizer) if new_rows else None
    if ids == []:
        raise typer.BadParameter(
            f"the vocabulary of {folder} was not extended: no token follows the special ones. "
            "Write first: llama-fast vocab train, and vocab extend",
            param_hint="--new-rows",
        )
    objective = DPO(0.1 if beta is None else beta) if dpo else None
    how = {
        "block": block,
        "chat": partial(chat_format, folder, tokenizer),
        "on_error": "skip" if skip_faults else "raise",
        "too_long": "drop" if skip_faults else "raise",
        "cache": cache,
    }
    if dpo:
        read = read_pairs
    else:
        how["train_on"] = train_on.value
    if show_rows is not None:
        rows = read(data, tokenizer, **how)
        show(str(rows.report), "")
        print(rows.show(show_rows, color=sys.stdout.isatty()))
        return 0
    run = Run(
        out,
        {
            "MODEL": str(folder.resolve()),
            "DATA": [str(path.resolve()) for path in data],
            "--full": full,
            "--lora": rank,
            "--alpha": alpha,
            "--quantize": quantize and quantize.value,
            "--epochs": epochs,
            "--steps": steps,
            "--block": block,
            "--tokens-per-step": tokens_per_step,
            "--lr": lr,
            "--held-out": held_out,
            "--train-on": train_on.value,
            "--skip-faults": skip_faults,
            "--checkpointing": checkpointing,
            "--optimizer": optimizer.value,
            "--seed": seed,
            "--dtype": dtype and dtype.value,
            "--device": where.type,
            **({} if objective is None else {"--dpo": True, "--beta": objective.beta}),
            **({"--new-rows": True} if new_rows else {}),
            **({} if embedding_lr is None else {"--embedding-lr": embedding_lr}),
        },
    )
    if cache is not None and cache.resolve() == run.cache.resolve():
        raise typer.BadParameter(
            f"{cache} is the run's own, which is removed when it is finished. Name another folder "
            "to keep the ids, or leave the option out",
            param_hint="--cache",
        )
    finished = run.check()  # before the cache is kept there
    if not finished:
        how["cache"] = cache or run.cache
        run.make_folder()
        try:
            rows = read(data, tokenizer, **how)
            report, judged = rows.report, None
            if held_out is not None:
                share = _share(held_out)
                if share is None:
                    judged = read(held_out, tokenizer, **how)
                else:
                    rows, judged = hold_out(rows, share, seed)
            config = _config(
                len(rows), report.block, source.config.dim, full, epochs, steps, tokens_per_step,
                lr, embedding_lr, optimizer, checkpointing, seed, dpo,
            )  # fmt: skip
        except BaseException:
            run.remove_if_empty()
            raise
    with started(where) as where:
        processes = Processes()
        if finished:
            if processes.main:
                note(f"{out} is finished: {run.result}")
            return 0
        processes.wait()  # until all have seen the folder as it was
        if processes.main:
            run.begin()
        try:
            if processes.main:
                note(str(report))
            return _train(
                run, source, rows, judged, config,
                rank=rank, alpha=alpha, new_rows=ids,
                quantize=quantize and quantize.value, sample=sample, tokenizer=tokenizer,
                device=where, dtype=dtype and dtype.torch, block=report.block,
                objective=objective, processes=processes, sharded=sharded or full,
            )  # fmt: skip
        finally:
            if processes.main:
                run.remove_if_empty()


def _share(held_out: str) -> float | None:
    """The number that is given for --held-out; None for a file."""
    try:
        return float(held_out)
    except ValueError:
        if not Path(held_out).exists():
            raise DataError(
                f"--held-out {held_out}: there is no such file; give one, or a share such as 0.05"
            ) from None
        return None


def _config(
    rows: int,
    block: int,
    dim: int,
    full: bool,
    epochs: float | None,
    steps: int | None,
    tokens_per_step: int,
    lr: float | None,
    embedding_lr: float | None,
    optimizer: Optimizer,
    checkpointing: bool,
    seed: int,
    dpo: bool,
) -> TrainConfig:
    from ..training import TrainConfig

    batch = max(1, min(round(tokens_per_step / block), rows))
    if steps is None:
        passes = -(-rows * EPOCHS // batch) if epochs is None else 0
        steps = max(passes, LEAST_STEPS) if epochs is None else None
    whole = optimizer is Optimizer.in_backward
    settings = TrainConfig(
        epochs=epochs or EPOCHS,
        steps=steps,
        batch_size=batch,
        micro_batch_size=None if whole else max(1, min(batch, TOKENS_AT_ONCE // block)),
        learning_rate=default_learning_rate(dim, full, dpo) if lr is None else lr,
        embedding_learning_rate=embedding_lr,
        weight_decay=0.01,
        grad_clip=None if whole else 1.0,
        moments="float32" if optimizer is Optimizer.adamw else "int8",
        half_weights="masters" if optimizer is Optimizer.adamw else "stochastic",
        step_in_backward=whole,
        checkpointing=checkpointing,
        seed=seed,
    )
    total = settings.steps_of(rows)
    often, seldom = max(1, total // 20), max(1, total // 10)
    return dataclasses.replace(settings, save_every=often, eval_every=seldom)


def default_learning_rate(dim: int, full: bool, dpo: bool = False) -> float:
    """Returns 5e-5 · (2000 / C)^0.781, and ten times that for a LoRA: what "LoRA Without Regret"
    (Schulman et al., 2025) found over models of several sizes, C the model dim. DPO of all weights
    takes a 30th, which is torchtune's 1e-6 for 8B; of a LoRA the same (torchtune: 5e-4)."""
    factor = (1 / 30 if dpo else 1) if full else 10
    return float(f"{factor * 5e-5 * (2000 / dim) ** 0.781:.2g}")


def _train(
    run: Run,
    source: Checkpoint,
    rows: Any,
    judged: Any,
    config: TrainConfig,
    *,
    rank: int | None,
    alpha: float | None,
    new_rows: list[int] | None,
    quantize: str | None,
    sample: str | None,
    tokenizer: Any,
    device: Any,
    dtype: Any,
    block: int,
    objective: DPO | None,
    processes: Processes,
    sharded: bool,
) -> int:
    import torch

    from ..generation.generate import check_prompts, encode_prompts, generate
    from ..training import finetune, finetune_dpo
    from ..training.state import STATE_FILE

    if sample is not None:
        check_prompts(source.config, tokenizer, encode_prompts(tokenizer, sample))
    if dtype is None and source.dtype is torch.float16:
        dtype = torch.bfloat16
    full = rank is None and new_rows is None
    how = {"dtype": dtype, "quantize": quantize, "fully_sharded": sharded and processes.size > 1}
    llama = load_model(source, device=device, **how)
    unwind_when_stopped()
    torch.manual_seed(config.seed)  # the first values of A
    adapter = None if full else _adapter(llama, rank, alpha, new_rows)
    steps = config.steps_of(len(rows))
    if processes.main:
        note_pairs(plan(llama, adapter, rows, config, steps, block, objective, processes.size))
        if (run.folder / STATE_FILE).is_file():
            note(f"going on with {run.folder}")

    def continued() -> str:
        made = generate(llama, tokenizer, [sample], max_new_tokens=40, temperature=0)
        return f"{sample}{made[0].text}"

    started = time.perf_counter()
    try:
        learn = finetune if objective is None else partial(finetune_dpo, beta=objective.beta)
        history = learn(
            llama, rows, config,
            held_out=judged, folder=run.folder, adapter=adapter,
            sample=continued if sample is not None else None,
        )  # fmt: skip
    except KeyboardInterrupt:
        note("llama-fast: interrupted; the same command goes on from the last saved step")
        return 130
    metrics = figures(llama, history, config, adapter)
    run.finish(llama, adapter, source, history, metrics, processes)
    if processes.main:
        summary(run, llama, history, metrics, time.perf_counter() - started, full)
    return 0


def _adapter(
    llama: Llama, rank: int | None, alpha: float | None, new_rows: list[int] | None
) -> Adapter:
    """A LoRA, the rows of new tokens, or both."""
    from ..training import lora

    if rank is None:
        return lora(llama, targets=(), rows=new_rows)
    return lora(llama, rank, 2.0 * rank if alpha is None else alpha, rows=new_rows)
