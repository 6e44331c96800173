"""What the endpoint tells of itself, as Prometheus reads it.

Rates, as tokens per second, are made of the counters by who reads them: rate(mmada_tokens_total[1m]).
"""

from typing import Any

import prometheus_client as prometheus
from prometheus_client.core import CounterMetricFamily

from mmada_jax.serve.engine import Engine
from mmada_jax.serve.tickets import Ticket

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
STEPS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class Meters:
    """The metrics of an engine and of the rows that were asked of it."""

    def __init__(self, engine: Engine):
        self._engine, self._registry = engine, prometheus.CollectorRegistry()
        named = {"registry": self._registry}
        for name, what, value in (
            ("queue", "rows that wait", lambda: len(engine.waiting)),
            ("queue_limit", "rows that may wait", lambda: engine.queue),
            ("slots", "rows that can be decoded at once", lambda: engine.slots),
            ("slots_busy", "rows that are decoded", lambda: engine.live),
        ):
            prometheus.Gauge(f"mmada_{name}", what, **named).set_function(value)
        for name, what in (("tokens", "tokens of spans that are done"), ("steps", "steps of lanes")):
            self._registry.register(_Counter(f"mmada_{name}", what, engine, name))
        self._rows = prometheus.Counter("mmada_rows", "rows that ended, by outcome", ["outcome"], **named)
        self._first = prometheus.Histogram(
            "mmada_first_token_seconds",
            "until the first tokens of a row were there",
            buckets=SECONDS,
            **named,
        )
        self._seconds = prometheus.Histogram(
            "mmada_row_seconds", "from asking to the end of a row", buckets=SECONDS, **named
        )
        self._steps = prometheus.Histogram(
            "mmada_row_steps", "forward passes of a row", buckets=STEPS, **named
        )
        self._ended, self._spent = 0, 0.0

    def count(self, ticket: Ticket, enough: bool = False) -> None:
        """Counts a row that has ended; `enough` if it was given up since all that was wanted is known."""
        outcome = "done" if enough else ticket.state
        self._rows.labels(outcome).inc()
        if ticket.first is not None:
            self._first.observe(ticket.first)
        if outcome == "done":
            self._seconds.observe(ticket.ended)
            self._steps.observe(ticket.steps)
            self._ended, self._spent = self._ended + 1, self._spent + ticket.ended - ticket.begun

    @property
    def wait(self) -> int:
        """Seconds until a full queue has been worked off, about; 60 at most."""
        each = self._spent / max(1, self._ended)
        return max(1, min(60, round(each * len(self._engine.waiting) / self._engine.slots)))

    def now(self) -> dict[str, Any]:
        """The load at this moment."""
        return {"waiting": len(self._engine.waiting), "running": self._engine.live}

    def text(self) -> bytes:
        """All of them."""
        return prometheus.generate_latest(self._registry)


class _Counter:
    """A counter of the engine's."""

    def __init__(self, name, what, engine, key):
        self._about, self._engine, self._key = (name, what), engine, key

    def collect(self):
        family = CounterMetricFamily(*self._about)
        family.add_metric([], self._engine.counters[self._key])
        yield family
