"""What a patch replaced, by which op and backend, and what it left alone and why."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from ..utils.text import aligned


@dataclass(frozen=True)
class Row:
    """One module and one op: the backend that serves it, or the reason why it was left alone."""

    module: str
    kind: str
    op: str
    backend: str | None = None
    reason: str | None = None

    @property
    def replaced(self) -> bool:
        return self.reason is None


@dataclass
class Report:
    """The rows of a patch; printed, modules that fared the same share a line."""

    rows: list[Row] = field(default_factory=list)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def replaced(self) -> list[Row]:
        return [row for row in self.rows if row.replaced]

    @property
    def left_alone(self) -> list[Row]:
        return [row for row in self.rows if not row.replaced]

    def __str__(self) -> str:
        lines: dict[tuple, list[str]] = {}
        for row in self.rows:
            name = ".".join("*" if part.isdigit() else part for part in row.module.split("."))
            key = (name or "(model)", row.kind, row.op, row.backend, row.reason)
            lines.setdefault(key, []).append(row.module)
        table = [("module", "class", "op", "backend", "count")]
        why = []
        for (name, kind, op, backend, reason), modules in lines.items():
            table.append((name, kind, op, backend or "left alone", str(len(modules))))
            why.append(reason)
        return "\n".join(
            line if reason is None else f"{line}  {reason}"
            for line, reason in zip(aligned(table), [None, *why], strict=True)
        )
