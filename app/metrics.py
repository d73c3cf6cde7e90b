"""The service's Prometheus metrics."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info
from prometheus_client.process_collector import ProcessCollector

_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
_IMAGES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """The metrics of one application, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter(
            "robust_requests",
            "Requests answered.",
            ["route", "method", "status"],
            registry=registry,
        )
        self.latency = Histogram(
            "robust_request_seconds",
            "Time from the first byte of a request to the last byte of its response.",
            ["route"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.in_flight = Gauge(
            "robust_requests_in_flight", "Requests being processed.", registry=registry
        )
        self.queue_wait = Histogram(
            "robust_queue_wait_seconds",
            "Time from admission to the start on the device.",
            ["kind"],
            buckets=_SECONDS,
            registry=registry,
        )
        for kind in ("predict", "attack", "evaluate"):  # 0 on an idle replica, not missing
            self.queue_wait.labels(kind)
        self.queued = Gauge(
            "robust_queued_forwards",
            "Work that is admitted and not finished, in forward passes.",
            ["kind"],
            registry=registry,
        )
        self.batch_images = Histogram(
            "robust_batch_images",
            "Images that shared a forward pass of predictions.",
            buckets=_IMAGES,
            registry=registry,
        )
        self.attack_images = Histogram(
            "robust_attack_images",
            "Images that shared the passes of an attack.",
            buckets=_IMAGES,
            registry=registry,
        )
        self.device_seconds = Counter(
            "robust_device_seconds", "Time spent on the device.", ["kind"], registry=registry
        )
        self.rejected = Counter(
            "robust_rejected", "Rejected requests and work.", ["reason"], registry=registry
        )
        self.out_of_memory = Counter(
            "robust_out_of_memory",
            "Forward passes of predictions that ran out of memory.",
            registry=registry,
        )
        self.jobs = Gauge("robust_jobs", "Stored evaluations.", ["state"], registry=registry)
        self.store_up = Gauge(
            "robust_store_up", "Whether evaluations can be stored and read.", registry=registry
        )
        self.store_up.set(1)
        self.model = Info("robust_model", "The served model.", registry=registry)
        self.runtime_rate = Gauge(
            "robust_runtime_images_per_second",
            "Measured rate of the runtime chosen for batches of up to that many images.",
            ["runtime", "images"],
            registry=registry,
        )
        self.runtime_failures = Counter(
            "robust_runtime_failures",
            "Failures of a runtime, when loaded or for a batch; torch took its place.",
            ["runtime", "reason"],
            registry=registry,
        )
        self.reloads = Counter(
            "robust_reloads",
            "New checkpoints that were loaded or refused.",
            ["result"],
            registry=registry,
        )
        for result in ("ok", "failed"):
            self.reloads.labels(result)
