"""Where GLM-Image's time goes, kernel by kernel, at 1024 x 1024 with full-size random weights.

python -m bench.glm_profile > bench/results/glm_image_profile.txt
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from bench.glm_image import DEVICE, ROWS, Arms, forwards, lengthened, wanted
from runtime.engine.context import Context
from runtime.types import Acceleration

KERNELS = 16
CACHED = 1200  # positions, about


def told(title: str, work: Callable[[], object], before: int) -> None:
    for _ in range(before):
        work()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        for _ in range(2):
            work()
        torch.cuda.synchronize()
    table = seen.key_averages().table(sort_by="self_cuda_time_total", row_limit=KERNELS, max_name_column_width=70)
    print(f"{title}\n{table}\n", flush=True)


@torch.no_grad()
def tokens(arms: Arms, rows: int) -> None:
    """Steps without the graph, whose kernels a profiler cannot tell apart."""
    inputs = lengthened(arms.inputs(1024, 1024, None), CACHED)
    context = Context(DEVICE, lambda: False, lambda _: None)
    arms.runner._tokens.generate([wanted(inputs, 32, seed) for seed in range(rows)], context)
    arms.runner._tokens.forget()
    decoder = arms.runner._tokens.decoder
    assert decoder is not None
    decoder._graph = None
    decoder._state[:, 0] = 2  # as if it had just begun
    told(f"Two tokens of {rows} rows, at some {CACHED} cached positions", decoder._step, 2)


def main() -> None:
    arms = Arms()
    print(torch.cuda.get_device_name(), f"torch {torch.__version__}", arms.runner.variant)
    told("Two times two forwards of the DiT after fifteen times two", lambda: forwards(arms), 15)
    tokens(arms, 1)
    arms.take(Acceleration(rows=ROWS))
    tokens(arms, ROWS)
    arms = Arms(Acceleration(denoiser_weights="float8"))
    told(f"Two times two forwards of the DiT, {arms.runner.variant}", lambda: forwards(arms), 15)


if __name__ == "__main__":
    main()
