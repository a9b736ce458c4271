"""A session on disk: its tokens with their keys and values, so that a long text goes on at once.

One safetensors file: the tensors of `KVCache.held`, and in its metadata the tokens and what made
them. Reading it executes no code.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..distributed.tensor_parallel import share_of
from ..errors import CheckpointError, ShapeError
from ..utils.files import atomic_file, given_path
from .session import Session

FORMAT = "llama_fast session 1"
SAMPLE = 1024  # elements of each weight that the fingerprint reads


def save_session(session: Session, path: str | Path) -> int:
    """Writes the tokens that a session holds, their keys and values; returns how many. Raises
    CheckpointError where it holds none, the file cannot be written, or the model is over ranks."""
    path = given_path(path, "the name of a file")
    _refuse_ranks(session)
    tokens = session.tokens
    if not tokens or session.kept_of([*tokens, 0]) < len(tokens):
        raise CheckpointError("the session holds no tokens of this model; let it answer first")
    held = session.engine.cache.held(0)
    metadata = {"format": FORMAT, "model": fingerprint(session.model), "tokens": json.dumps(tokens)}
    with atomic_file(path, CheckpointError, fails_with=(SafetensorError,)) as beside:
        tensors = {name: x[:, : len(tokens)].contiguous().cpu() for name, x in held.items()}
        save_file(tensors, beside, metadata)
    return len(tokens)


def load_session(session: Session, path: str | Path) -> int:
    """Puts what `save_session` wrote into a session, in the place of what it holds; returns the
    number of tokens. Raises CheckpointError for a file that is damaged, of another model, of
    another kv_cache, or too long, and for a model over ranks; the session stays as it was then."""
    path = given_path(path, "a file of a session")
    _refuse_ranks(session)
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise CheckpointError(f"{path} is no session of this package; give one it saved")
            if metadata.get("model") != fingerprint(session.model):
                raise CheckpointError(
                    f"{path} was made by another model, or other weights of it; open that model, "
                    "or leave the file out"
                )
            tokens = json.loads(metadata["tokens"])
            held = {name: file.get_tensor(name) for name in file.keys()}
        if held["k.0"].shape[1] != len(tokens):
            raise ValueError(f"{len(tokens)} tokens")
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as a session ({error})") from error
    try:
        session.restore(tokens, held)
    except ShapeError as error:
        raise CheckpointError(f"{path} does not fit this session: {error}") from error
    return len(tokens)


def _refuse_ranks(session: Session) -> None:
    if share := share_of(session.model):
        raise CheckpointError(
            f"the model is over {share.ranks} ranks, each of which has a part of the keys and "
            "values: they are neither saved nor read; start one process for that"
        )


@torch.no_grad()
def fingerprint(model: nn.Module) -> str:
    """Returns a text that differs between models: of their config, of their modules and what these
    say of themselves (such as which adapters are enabled), and of every weight the name, dtype,
    shape and up to 1,024 elements spread evenly over it."""
    said = f"{getattr(model, 'config', None)} {model}"
    digest = hashlib.blake2b(said.encode(), digest_size=16)
    for name, weight in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(_sample(weight).tobytes())
    return digest.hexdigest()


def _sample(weight: Tensor):
    flat = weight.detach().reshape(-1)
    step = max(1, flat.numel() // SAMPLE)
    return flat[::step].contiguous().view(torch.uint8).cpu().numpy()
