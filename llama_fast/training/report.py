"""What became of the rows of training data, and what a model will be trained on."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..utils.text import aligned


@dataclass
class DataReport:
    """Counts of what was read.

    files, cached: all, and those whose ids came from the cache. rows: of the files. documents:
    those that are kept. tokens: positions of all packed rows, so overlapping windows count twice.
    kept: those that ask for a trained token. packed: rows after packing. block: positions that a
    packed row can hold. dropped: rows left out, by reason. cut: rows that lost their end.
    examples: a place of each reason.
    """

    files: int = 0
    cached: int = 0
    rows: int = 0
    documents: int = 0
    tokens: int = 0
    kept: int = 0
    packed: int = 0
    block: int = 0
    cut: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)

    @property
    def use(self) -> float:
        """The share of the packed rows that holds tokens; the rest is not computed."""
        return self.tokens / (self.packed * self.block) if self.packed else 0.0

    def drop(self, reason: str, place: str) -> None:
        """Counts a row that is left out."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        self.examples.setdefault(reason, place)

    def __str__(self) -> str:
        share = self.kept / self.tokens if self.tokens else 0.0
        lines = [
            ("files", f"{self.files:,}", f"{self.cached:,} from the cache" if self.cached else ""),
            ("rows", f"{self.rows:,}", f"{sum(self.dropped.values()):,} dropped, {self.cut:,} cut"),
            ("documents", f"{self.documents:,}", ""),
            ("tokens", f"{self.tokens:,}", ""),
            ("trained tokens", f"{self.kept:,}", f"{share:.1%}"),
            ("packed rows", f"{self.packed:,}", f"of {self.block:,} tokens, {self.use:.1%} used"),
        ]
        for reason, count in sorted(self.dropped.items(), key=lambda item: -item[1]):
            lines.append(("  dropped", f"{count:,}", f"{reason} (first: {self.examples[reason]})"))
        width = max(len(number) for _, number, _ in lines)
        return "\n".join(aligned([(name, n.rjust(width), more) for name, n, more in lines]))
