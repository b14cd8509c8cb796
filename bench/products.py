"""The matrix products of GLM-Image's DiT at 1024 x 1024, for seconds on end: they run into the card's power limit.

    python -m bench.products --alone > bench/results/glm_image_power.txt
    python -m bench.products > bench/results/glm_image_products.txt

`--alone`: each product by itself, its first seconds against its last, with the clock, watts, degrees and the reason of
the clock (4: the power limit). Else the products of whole forwards in milliseconds, by tokens: a conditional and an
unconditional one after another, and both in one product.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable

import torch

SHAPES = ((12288, 4096), (4096, 4096), (16384, 4096), (4096, 16384))  # queries, keys, values; out; feed-forward
BLOCKS = 30
CONDITIONAL, UNCONDITIONAL = 4102, 4098  # tokens: the picture's 4,096 and the text's
TOGETHER = (8200, 8228, 8448, 8192)


def sustained(work: Callable[[], None], seconds: float = 3.0) -> float:
    """Milliseconds."""
    for _ in range(3):
        work()
    torch.cuda.synchronize()
    count, begun = 0, time.perf_counter()
    while time.perf_counter() - begun < seconds:
        for _ in range(4):
            work()
        torch.cuda.synchronize()
        count += 4
    return (time.perf_counter() - begun) / count * 1e3


def alone(weights: list[list[torch.Tensor]], x: torch.Tensor) -> None:
    wide = torch.randn(len(x), SHAPES[3][1], device=x.device, dtype=x.dtype)
    for i, (n, k) in enumerate(SHAPES):

        def product(i: int = i, k: int = k) -> None:
            for block in weights:
                torch.mm(x if k == x.shape[1] else wide, block[i].t())

        torch.cuda.synchronize()
        time.sleep(2)  # the card cools down
        first, lasting = sustained(product, 0.1) / BLOCKS, sustained(product) / BLOCKS
        rates = [2 * len(x) * n * k / ms / 1e9 for ms in (first, lasting)]
        query = "--query-gpu=clocks.sm,power.draw,temperature.gpu,clocks_event_reasons.active"
        for _ in range(50):
            product()
        told = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True, check=True
        )
        torch.cuda.synchronize()
        rate = f"{rates[0]:.0f} -> {rates[1]:.0f} TFLOP/s"
        print(f"{len(x)} x {n} x {k}: {first:.3f} -> {lasting:.3f} ms, {rate}, {told.stdout}", end="", flush=True)


def main() -> None:
    made = {"device": "cuda", "dtype": torch.bfloat16}
    weights = [[torch.randn(n, k, **made) / 64 for n, k in SHAPES] for _ in range(BLOCKS)]  # type: ignore[call-overload]
    biases = [torch.zeros(n, **made) for n, _ in SHAPES]  # type: ignore[call-overload]
    inputs = {m: torch.randn(m, 4096, **made) for m in (CONDITIONAL, UNCONDITIONAL, *TOGETHER)}  # type: ignore[call-overload]

    def forward(x: torch.Tensor) -> None:
        for qkv, out, grow, shrink in weights:
            torch.addmm(biases[0], x, qkv.t())
            torch.addmm(biases[1], x, out.t())
            torch.addmm(biases[3], torch._addmm_activation(biases[2], x, grow.t(), use_gelu=True), shrink.t())

    def both() -> None:
        forward(inputs[CONDITIONAL])
        forward(inputs[UNCONDITIONAL])

    if "--alone" in sys.argv:
        alone(weights, inputs[CONDITIONAL])
        return
    for _ in range(2):
        print(f"{CONDITIONAL}+{UNCONDITIONAL}", round(sustained(both), 2), flush=True)
        for tokens in TOGETHER:
            print(tokens, round(sustained(lambda tokens=tokens: forward(inputs[tokens])), 2), flush=True)


if __name__ == "__main__":
    main()
