"""Prometheus metrics, on KServe's /metrics. Every one has `model_name`; no label takes values from a request."""

from __future__ import annotations

from dataclasses import dataclass

from prometheus_client import Counter, Gauge, Histogram

from runtime.errors import DiffusionError
from runtime.types import GenerationResult

# From 50 ms to an hour: pictures and videos alike.
BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 15, 20, 30, 45, 60, 90, 120, 180, 300, 600, 1200, 1800, 3600)

REQUESTS = Counter(
    "diffusion_requests", "Prompts by how they ended and how they came.", ["model_name", "protocol", "outcome"]
)
QUEUE_DEPTH = Gauge("diffusion_queue_depth", "Prompts that wait.", ["model_name"])
QUEUE_SECONDS = Gauge("diffusion_queue_seconds", "Predicted device seconds of what waits and runs.", ["model_name"])
PROGRESS = Gauge("diffusion_running_progress_ratio", "How far the running prompt is, 0 to 1.", ["model_name"])
STAGE_SECONDS = Histogram(
    "diffusion_stage_seconds",
    "Seconds of a prompt by stage: wait, prepare, tokens, denoise, decode, encode, total.",
    ["model_name", "stage"],
    buckets=BUCKETS,
)
BATCH_SIZE = Histogram(
    "diffusion_batch_size", "Pictures or videos of one pass.", ["model_name"], buckets=(1, 2, 4, 8, 16, 32)
)
STEPS = Counter("diffusion_steps", "Denoising steps done.", ["model_name"])
TOKENS = Counter("diffusion_tokens", "Tokens of the autoregressive stage sampled.", ["model_name"])
IMAGES = Counter("diffusion_images", "Pictures made.", ["model_name"])
FRAMES = Counter("diffusion_frames", "Frames of videos made.", ["model_name"])
DEVICE_MEMORY = Gauge("diffusion_device_memory_bytes", "Device memory in use by the engine.", ["model_name"])
DEVICE_MEMORY_PEAK = Gauge("diffusion_device_memory_peak_bytes", "Its peak since the start.", ["model_name"])
HOST_MEMORY = Gauge("diffusion_host_memory_bytes", "Resident memory of server and engine.", ["model_name"])
LOAD_SECONDS = Gauge("diffusion_model_load_seconds", "Seconds of the last start by stage.", ["model_name", "stage"])
LOAD_BYTES = Gauge("diffusion_model_load_bytes", "Bytes of the model downloaded by the last start.", ["model_name"])
RESTARTS = Counter("diffusion_engine_restarts", "Engines started again after one died.", ["model_name"])
READY = Gauge("diffusion_ready", "1 while the model serves.", ["model_name"])

OUTCOMES = {
    "InvalidRequest": "invalid",
    "QueueFull": "refused",
    "Cancelled": "cancelled",
    "CancelledError": "cancelled",
    "DeadlineExceeded": "expired",
    "NotReady": "unavailable",
    "EngineDied": "unavailable",
    "OutOfMemory": "out_of_memory",
    "Conflict": "invalid",
}


@dataclass
class Count:
    """What a call's end adds to `diffusion_requests`."""

    prompts: int = 1
    outcome: str | None = "ok"  # None adds nothing, whatever happens


def outcome(error: BaseException) -> str:
    """One of a handful of words for how a prompt ended."""
    return OUTCOMES.get(type(error).__name__, "invalid" if client_fault(error) else "failed")


def client_fault(error: BaseException) -> bool:
    return isinstance(error, DiffusionError) and error.http_status < 500


def finished(model_name: str, result: GenerationResult) -> None:
    """Count one prompt's results and seconds."""
    for stage, seconds in result.timings.items():
        STAGE_SECONDS.labels(model_name, stage).observe(seconds)
    for item in result.media:
        if item.num_frames:
            FRAMES.labels(model_name).inc(item.num_frames)
        else:
            IMAGES.labels(model_name).inc()
