"""What an op says of itself, whatever serves it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .arguments import Arguments
from .schema import fake_of
from .types import Case, Cost, Sharding


@dataclass(eq=False)
class Definition:
    """A named operation: its specification, and what tests and benchmarks must know of it.

    name     `torch.ops.llama_fast.<name>`; also the stem of every file that belongs to it
    check    raises ShapeError for arguments that no backend may be given
    eager    the reference in plain PyTorch: specification, fallback and test oracle. Its annotated
             signature is the op's schema
    fake     shapes and dtypes of the results, for tracing; by default found by running `eager` on
             the meta device
    writes   names of the arguments that a call writes
    save     (inputs, output) → what the gradient needs: tensors, and anything else
    gradient (saved tensors, ctx scalars, which inputs need one, *gradients of the outputs) → a
             gradient for each input or None
    made_again  whether the result costs so little that a later op, which needs it in the backward
             pass, makes it again from what `save` keeps: all arguments
    constants  names of float arguments that have no gradient
    forward_only  variants of an op with a gradient that have none
    non_differentiable  how many of the last results have no gradient: they are for `save` alone
    gradient_in_forward  whether the forward pass makes the gradients, where they are asked for
    grad_alternative  the op to use where a gradient is needed, for one that writes and has none
    autocast  what torch.autocast makes of its float arguments, constants and what it writes apart:
             "lower": autocast's dtype; "widest": the widest of theirs, or that of what it writes;
             "": nothing. Inside the op autocast is off, as it is in torch's own
    cost     arguments → Cost
    sharding  how ranks may share a call; or (arguments) → that. Absent on an op that writes: what a
             rank writes must be the part that it has
    cases    () → list[Case]; absent on an op that is only the backward of another
    variant  arguments → which of the op's forms they ask for, in words: "swiglu int8", or none
    at_model_size  (ops.model_inputs.ModelInputs) → what a model calls the op with: by a name such
             as "linear head int8", functions that make the arguments
    """

    name: str
    check: Callable[..., None]
    eager: Callable[..., Any]
    fake: Callable[..., Any] | None = None
    writes: tuple[str, ...] = ()
    save: Callable[..., tuple] | None = None
    gradient: Callable[..., tuple] | None = None
    made_again: bool = False
    constants: tuple[str, ...] = ()
    forward_only: tuple[str, ...] = ()
    non_differentiable: int = 0
    gradient_in_forward: bool = False
    grad_alternative: str = ""
    autocast: str = ""
    cost: Callable[..., Cost] | None = None
    sharding: Sharding | Callable[..., Sharding] | None = None
    cases: Callable[[], list[Case]] | None = None
    variant: Callable[..., str] | None = None
    at_model_size: Callable[[Any], dict[str, Callable[[], tuple]]] | None = None

    # Both are made of torch's reading of the schema, when the op is declared.
    torch_op: Any = None
    arguments: Arguments = None

    def __post_init__(self) -> None:
        self.fake = self.fake or fake_of(self.eager)

    def complete(self, args: tuple) -> tuple:
        """Returns the arguments with the trailing ones that a caller left out."""
        return self.arguments.complete(args)

    def label(self, *args: Any) -> str:
        """Returns the name and the variant that the arguments ask for: "linear swiglu int8"."""
        if self.variant is None:
            return self.name
        return f"{self.name} {self.variant(*self.complete(args))}".rstrip()

    def has_gradient(self, *args: Any) -> bool:
        if self.gradient is None:
            return False
        return not (self.forward_only and self.variant(*args) in self.forward_only)
