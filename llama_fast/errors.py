"""The package's exceptions: each says what was given, what is needed and what to do."""

from __future__ import annotations

import json


class LlamaFastError(ValueError):
    """Base of every refusal of this package; a ValueError too, so callers need not import it."""


class CheckpointError(LlamaFastError):
    """A folder of weights that is missing, incomplete, malformed or cannot be written."""


class ConfigError(LlamaFastError):
    """A model configuration that is invalid or contradicts the weights."""


class TokenizerError(LlamaFastError):
    """A tokenizer file that cannot be used, or text or ids that it cannot encode or decode."""


class PromptError(LlamaFastError):
    """A prompt or a message that the model cannot be given: empty, too long, malformed."""


class DataError(LlamaFastError):
    """A file of training data that cannot be read, or a row in it that cannot be trained on.

    file, line: where; None where it is no matter of a file or of a line (counted from 1). reason:
    the text without these.
    """

    def __init__(self, reason: str, file: object = None, line: int | None = None) -> None:
        self.reason, self.file, self.line = reason, file, line
        place = "" if file is None else f"{file}: " if line is None else f"{file}, line {line}: "
        super().__init__(place + reason)


class RequestError(LlamaFastError):
    """A request to the server that is malformed, or asks for what is not served. status: HTTP's;
    param: the field; code: OpenAI's word for the reason."""

    def __init__(
        self, text: str, *, param: str | None = None, code: str | None = None, status: int = 400
    ) -> None:
        super().__init__(text)
        self.param, self.code, self.status = param, code, status


class BusyError(LlamaFastError):
    """A request that the server cannot take now: its queue is full, or it is shutting down."""


class LogitsError(LlamaFastError):
    """Logits from which no token can be drawn, since they are NaN or infinite."""


class ProcessError(LlamaFastError):
    """Processes that have one model between them, or train one, of which one has ended or is at
    another place; or that were started for what one process does."""


class BackendError(LlamaFastError):
    """A backend that was asked for by name and cannot serve the call."""


class KernelError(LlamaFastError):
    """A kernel that its device would not run."""


class WrongResultError(LlamaFastError):
    """What was to be timed computed something else than its definition says."""


class ResultsError(LlamaFastError):
    """A file of measured figures that cannot be read, or is another machine's."""


class ShapeError(LlamaFastError):
    """A tensor given to an op whose shape, dtype, device or layout does not fit."""


class GradientError(LlamaFastError):
    """A gradient asked of an op, or of an argument, that has none."""


class FallbackWarning(UserWarning):
    """An op ran on a slower backend than the one that was first in line; the text says why."""


class PatchError(LlamaFastError):
    """A model that cannot be patched, or a patch that cannot be taken back; the text says why."""


LFS_START = "version https://git-lfs"
LFS_POINTER = "a Git LFS pointer stands in the file's place; run `git lfs pull`"
# What `json.loads` raises for a text that is no JSON, or that is too deep for it.
JSON_ERRORS = (ValueError, RecursionError)


def json_fault(error: Exception) -> str:
    """Returns where and why a file's bytes are no JSON, for one of the `JSON_ERRORS`."""
    if isinstance(error, RecursionError):
        return "its objects and lists are nested too deeply"
    if isinstance(error, UnicodeDecodeError):
        return f"it is not UTF-8 text (byte {error.start})"
    if isinstance(error, json.JSONDecodeError):
        if error.doc.startswith(LFS_START):
            return LFS_POINTER
        return f"it breaks at line {error.lineno}, column {error.colno}"
    return "a number in it has too many digits"
