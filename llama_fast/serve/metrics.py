"""What the server has done, as numbers for Prometheus."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable

# Upper bounds of the buckets of seconds.
BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
COUNTERS = {
    "prompt_tokens": "Tokens of prompts.",
    "reused_tokens": "Tokens of prompts whose keys and values a row held already.",
    "generated_tokens": "Tokens made.",
}
SECONDS = {
    "time_to_first_token": "Seconds from a request to its first token.",
    "request": "Seconds of a request, the stream of its answer included.",
}


class Metrics:
    """Counters and histograms; any thread may add to them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = Counter(dict.fromkeys(COUNTERS, 0))
        self._requests: Counter[tuple[str, int]] = Counter()
        self._seconds = {name: ([0] * (len(BUCKETS) + 1), [0.0]) for name in SECONDS}

    def count(self, name: str, amount: int) -> None:
        with self._lock:
            self._counts[name] += amount

    def request(self, path: str, status: int) -> None:
        with self._lock:
            self._requests[path, status] += 1

    def observe(self, name: str, seconds: float) -> None:
        with self._lock:
            buckets, total = self._seconds[name]
            buckets[bisect_left(BUCKETS, seconds)] += 1
            total[0] += seconds

    def text(self, gauges: dict[str, tuple[str, Callable[[], float]]]) -> str:
        """Returns all of it in Prometheus' text format. gauges: name to (help, value now)."""
        lines: list[str] = []

        def head(name: str, kind: str, about: str) -> str:
            full = f"llama_fast_{name}"
            lines.extend((f"# HELP {full} {about}", f"# TYPE {full} {kind}"))
            return full

        with self._lock:
            full = head("requests_total", "counter", "Requests by path and HTTP status.")
            for (path, status), n in sorted(self._requests.items()):
                lines.append(f'{full}{{path="{path}",status="{status}"}} {n}')
            for name, about in COUNTERS.items():
                lines.append(f"{head(f'{name}_total', 'counter', about)} {self._counts[name]}")
            for name, (about, value) in gauges.items():
                lines.append(f"{head(name, 'gauge', about)} {value()}")
            for name, about in SECONDS.items():
                full = head(f"{name}_seconds", "histogram", about)
                buckets, total = self._seconds[name]
                for n, bound in enumerate([*map(str, BUCKETS), "+Inf"]):
                    lines.append(f'{full}_bucket{{le="{bound}"}} {sum(buckets[: n + 1])}')
                lines += (f"{full}_sum {total[0]:.6f}", f"{full}_count {sum(buckets)}")
        return "\n".join(lines) + "\n"
