"""GLM-Image in less memory: what the planner chooses for a card, and what it costs.

    python -m bench.full_size DIR --family glm-image
    python -m bench.memory DIR/glm-image --gib 80,47,23.5 [--weights auto | plain | int8] [--results FILE]

Each size is a fresh process whose allocator is limited to it (torch.cuda.set_per_process_memory_fraction). It loads the
folder as the engine does and draws 1024 x 1024 with 4 steps three times. `--weights int8` is int8 for the token model
and float8 for the DiT. `host_gib` is anonymous memory: weights that are mapped from files are not of it.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.glm_image import REQUEST
from runtime.engine.context import Context
from runtime.engine.running import clean, isolated_random_state
from runtime.families.glm_image.pipeline import Runner
from runtime.families.glm_image.stages import stages_of
from runtime.load_mode import load_folder
from runtime.pipeline_loader import LoadedPipeline, load_pipeline
from runtime.settings import load
from runtime.types import Acceleration

GIB = 2**30
WEIGHTS = {
    "auto": Acceleration(token_weights="auto", denoiser_weights="auto"),
    "plain": Acceleration(),
    "int8": Acceleration(token_weights="int8", denoiser_weights="float8"),
}


def host_gib() -> float:
    found = re.search(r"^Anonymous: +(\d+) kB", Path("/proc/self/smaps_rollup").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024 / GIB


def measure(folder: Path, gib: float, weights: str, size: int) -> dict[str, Any]:
    device = torch.device("cuda")
    torch.cuda.set_per_process_memory_fraction(min(1.0, gib * GIB / torch.cuda.mem_get_info()[1]))
    settings = load([], {"MODEL_ID": str(folder)})
    begun = time.perf_counter()

    def loaded_from(place: Path, stream: Any) -> LoadedPipeline:
        return load_pipeline(
            place, "cuda", "bfloat16", settings.optimizations, lambda *_: None, stream, WEIGHTS[weights]
        )

    loaded = load_folder(folder, settings.storage, "cuda", lambda _: None, loaded_from)
    runner, stages = Runner(loaded.pipeline, loaded.acceleration), stages_of(loaded.pipeline)
    torch.cuda.synchronize()
    found: dict[str, Any] = {
        "gib": gib,
        "asked": weights,
        "size": size,
        "load_s": time.perf_counter() - begun,
        "load_peak_gib": torch.cuda.max_memory_reserved() / GIB,
        "optimizations": dict(loaded.optimizations),
        "variant": runner.variant,
        "device": loaded.device.name,
        "pictures": [],
    }
    torch.cuda.reset_peak_memory_stats()
    for seed in range(3):
        before, begun = stages.seconds if stages is not None else 0.0, time.perf_counter()
        context = Context(device, lambda: False, lambda _: None)
        with isolated_random_state(seed, device):
            runner.run(replace(REQUEST, width=size, height=size, num_inference_steps=4), seed, context)
        clean(loaded.pipeline)
        turns = stages.seconds - before if stages is not None else 0.0
        found["pictures"].append({"total_s": time.perf_counter() - begun, "turns_s": turns, **context.timings})
    found["peak_allocated_gib"] = torch.cuda.max_memory_allocated() / GIB
    found["peak_reserved_gib"] = torch.cuda.max_memory_reserved() / GIB
    return {**found, "host_gib": host_gib()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gib", default="80,47,23.5")
    parser.add_argument("--weights", default="auto", choices=WEIGHTS)
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--results", type=Path)
    args = parser.parse_args()
    sizes = [float(gib) for gib in args.gib.split(",")]
    if len(sizes) == 1 and args.results is None:
        print(json.dumps(measure(args.folder, sizes[0], args.weights, args.size)))
        return
    rows = []
    for gib in sizes:
        command = [sys.executable, "-m", "bench.memory", str(args.folder), "--gib", str(gib)]
        command += ["--weights", args.weights, "--size", str(args.size)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        last = (done.stdout.strip().splitlines() or [""])[-1]
        rows.append(json.loads(last) if not done.returncode else {"gib": gib, "failed": done.stderr[-2000:]})
        print(json.dumps(rows[-1], indent=1), flush=True)
    if args.results is not None:
        args.results.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
