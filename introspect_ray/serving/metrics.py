"""What the gateway counts, as Prometheus text."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class GatewayMetrics:
    """Counts of one gateway replica; `gateway` names it, so that several may be scraped one after the other."""

    def __init__(self, gateway: str):
        self._registry = CollectorRegistry()
        self._gateway = gateway
        self.requests = self._counter("requests", "Requests by route and status.", "route", "status")
        self.items = self._counter("items", "Items of requests by outcome: ok, or an error code.", "outcome")
        self.lost = self._counter("lost_calls", "Calls whose replica died under them, by deployment.", "deployment")
        self.seconds = Histogram(
            "introspect_request_seconds",
            "Time from the first byte of a request to the last of its answer.",
            ("gateway", "route"),
            buckets=BUCKETS_S,
            registry=self._registry,
        )
        self.in_flight = Gauge(
            "introspect_requests_in_flight", "Requests under way.", ("gateway",), registry=self._registry
        ).labels(gateway)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"introspect_{name}", text, ("gateway", *labels), registry=self._registry)

    def count_request(self, route: str, status: int, seconds: float) -> None:
        self.requests.labels(self._gateway, route, str(status)).inc()
        self.seconds.labels(self._gateway, route).observe(seconds)

    def count_item(self, outcome: str) -> None:
        self.items.labels(self._gateway, outcome).inc()

    def count_lost(self, deployment: str) -> None:
        self.lost.labels(self._gateway, deployment).inc()

    def text(self) -> bytes:
        return generate_latest(self._registry)
