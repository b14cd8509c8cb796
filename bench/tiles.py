"""Tiles of the kernels for several rows: how long GLM-Image's matrices take with each, on this GPU.

    python -m bench.tiles [--rows 8] [--results bench/results/glm_image_tiles.json]

The fastest are the tables ROWS_LINEAR and ROWS_GATED of runtime/families/glm_image/kernels.py. Kernels are compiled in
many processes, then measured in one: a graph of launches over so many copies of a matrix that no cache holds them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
from torch.nn import functional

from runtime.families.glm_image import kernels
from runtime.families.glm_image.reference import Weight, float8, int8

DEVICE, DTYPE = "cuda", torch.bfloat16
PROCESSES = 14
KINDS = {"plain": Weight, "int8": int8, "float8": float8}
# name -> outputs, inputs, with a bias, gated
MATRICES = {
    "qkv": (4608, 4096, True, False),
    "out": (4096, 4096, False, False),
    "gate": (2 * 13696, 4096, False, True),
    "down": (4096, 13696, False, False),
    "head": (16384, 4096, False, False),
}
BYTES_OF_COPIES = 8e8
Tile = tuple[int, int, int, int]  # rows and columns of the weight, warps, stages


def tiles() -> Iterator[Tile]:
    loops = ((128, 4), (128, 6), (256, 3), (256, 4), (512, 2), (512, 3), (1024, 2))
    for n, (k, stages), warps in product((16, 32, 64), loops, (4, 8)):
        yield n, k, warps, stages


def launch(x: Any, weight: Weight, bias: Any, out: Any, gated: bool, tile: Tile) -> None:
    (n, k), (block_n, block_k, warps, stages) = weight.values.shape, tile
    options: dict[str, Any] = {
        "SCALED": weight.scales is not None,
        "ROWS": max(16, triton.next_power_of_2(len(x))),
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "num_warps": warps,
        "num_stages": stages,
        **kernels._options(kernels.chains(x.device)),
    }
    scales = weight.scales if weight.scales is not None else x
    if gated:
        grid = (triton.cdiv(n // 2, block_n),)
        kernels._rows_gated_kernel[grid](x, weight.values, scales, out, k, n // 2, len(x), **options)
    else:
        grid = (triton.cdiv(n, block_n),)
        kernels._rows_linear_kernel[grid](
            x, weight.values, scales, x if bias is None else bias, out, k, n, len(x), BIAS=bias is not None, **options
        )


def compile_share(rows: int, share: int) -> None:
    """Fill Triton's cache with every PROCESSES-th kernel; those that do not fit the card fail later once more."""
    x, out = (torch.randn(rows, n, device=DEVICE, dtype=DTYPE) for n in (1024, 512))
    bias = torch.zeros(512, device=DEVICE, dtype=DTYPE)
    weights = {kind: made(torch.randn(1024, 1024, device=DEVICE, dtype=DTYPE)) for kind, made in KINDS.items()}
    halves = {kind: made(torch.randn(512, 1024, device=DEVICE, dtype=DTYPE)) for kind, made in KINDS.items()}
    work = list(product(KINDS, ((False, False), (False, True), (True, False)), tiles()))
    for kind, (gated, biased), tile in work[share::PROCESSES]:
        try:
            launch(x, (weights if gated else halves)[kind], bias if biased else None, out, gated, tile)
        except triton.runtime.errors.OutOfResources:
            continue
    torch.cuda.synchronize()


def measured(rows: int, kind: str, name: str) -> list[dict[str, Any]]:
    """Microseconds of each tile, the fastest first. Raises AssertionError for one that computes something else."""
    n, k, biased, gated = MATRICES[name]
    size = n * k * (2 if kind == "plain" else 1)
    weights = [
        KINDS[kind](torch.randn(n, k, device=DEVICE, dtype=DTYPE) / 64)
        for _ in range(max(2, int(BYTES_OF_COPIES / size)))
    ]
    x = torch.randn(rows, k, device=DEVICE, dtype=DTYPE)
    bias = torch.zeros(n, device=DEVICE, dtype=DTYPE) if biased else None
    out = torch.empty(rows, n // (2 if gated else 1), device=DEVICE, dtype=DTYPE)
    expected = functional.linear(x.float(), weights[0].whole(DTYPE).float())
    if gated:
        gate, up = expected.chunk(2, -1)
        expected = up * functional.silu(gate)
    found = []
    for tile in tiles():
        try:
            launch(x, weights[0], bias, out, gated, tile)
        except triton.runtime.errors.OutOfResources:
            continue
        error = float((out.float() - expected).norm() / expected.norm())
        assert error < 0.02, (kind, name, tile, error)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for weight in weights:
                launch(x, weight, bias, out, gated, tile)
        graph.replay()
        times = []
        for _ in range(5):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / len(weights) * 1e3)
        names = ("rows", "columns", "warps", "stages")
        found.append({"us": round(statistics.median(times), 1), **dict(zip(names, tile, strict=True))})
    return sorted(found, key=lambda row: float(row["us"]))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.tiles")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--results", type=Path, default=Path("bench/results/glm_image_tiles.json"))
    parser.add_argument("--share", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.share is not None:
        compile_share(options.rows, options.share)
        return
    command = [sys.executable, "-m", "bench.tiles", "--rows", str(options.rows), "--share"]
    for process in [subprocess.Popen([*command, str(i)]) for i in range(PROCESSES)]:
        if process.wait():
            sys.exit("a kernel could not be compiled")
    told = {}
    for kind, name in product(KINDS, MATRICES):
        told[f"{kind} {name}"] = measured(options.rows, kind, name)[:8]
        print(kind, name, told[f"{kind} {name}"][:3], flush=True)
    options.results.write_text(json.dumps(told, indent=0) + "\n")


if __name__ == "__main__":
    main()
