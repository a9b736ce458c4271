"""The logits of a training step whose loss was made without them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class DeferredLogits:
    """Stands where a tensor of logits (B,T,V) stood, and makes it at the first use: an attribute,
    an index, an operator or a function of torch. A training loop that looks at the loss alone never
    pays for it.
    """

    def __init__(self, head: nn.Module, hidden_states: Tensor) -> None:  # hidden_states (B,T,C)
        self._head = head
        self._hidden_states = hidden_states
        self._made: Tensor | None = None

    def tensor(self) -> Tensor:
        """The logits, with their gradient."""
        if self._made is None:
            with torch.enable_grad():
                self._made = self._head(self._hidden_states)
        return self._made

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        return function(*map(_made, args), **{k: _made(v) for k, v in kwargs.items()})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.tensor(), name)

    def __repr__(self) -> str:
        return repr(self._made) if self._made is not None else "<logits, made when they are used>"


def _made(value: Any) -> Any:
    if isinstance(value, DeferredLogits):
        return value.tensor()
    if isinstance(value, list | tuple):
        return type(value)(map(_made, value))
    return value


def _operator(name: str) -> Any:
    def run(self: DeferredLogits, *args: Any) -> Any:
        return getattr(self.tensor(), name)(*map(_made, args))

    run.__name__ = name
    return run


# Python looks these up on the type, not by __getattr__.
for _name in (
    *"add radd sub rsub mul rmul truediv rtruediv floordiv pow matmul neg abs getitem".split(),
    *"len iter eq ne lt le gt ge float int bool array".split(),
):
    setattr(DeferredLogits, f"__{_name}__", _operator(f"__{_name}__"))
DeferredLogits.__hash__ = object.__hash__
