"""A figure of bench/results/glm_image.json: where the seconds of a picture go, by stock and by the engine.

pip install matplotlib==3.10.3
python -m bench.plot bench/results/glm_image.json bench/results/glm_image.svg
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot

STAGES = (("tokens", "#4c72b0"), ("denoise", "#dd8452"), ("decode", "#55a868"))
FLOOR_SECONDS = 12.8  # weights read once a token and 100 forwards at the card's own rates: docs/performance.md


def bars(told: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Seconds by stage for each way to draw the same picture."""
    found = {}
    for name, stock in zip(("first", "later"), told["full"]["stock"], strict=True):
        denoise = stock["total_s"] - stock["tokens"]  # and decode, 0.2 s
        found[f"stock diffusers, {name} picture"] = {**stock, "denoise": denoise}
    found["here, bfloat16"] = told["full"]["engine"][-1]
    for weights, lossy in told["eight_bit"].items():
        found[f"here, {weights} tokens, float8 DiT"] = lossy
    return found


def main() -> None:
    source, target = map(Path, sys.argv[1:3])
    told = json.loads(source.read_text())
    found = bars(told)
    pyplot.rcParams.update({"svg.hashsalt": "diffusion-runtime", "font.size": 9})
    figure, (all_of_it, ours) = pyplot.subplots(
        2, 1, figsize=(8, 4.5), gridspec_kw={"height_ratios": [len(found), len(found) - 2]}, layout="constrained"
    )
    for axes, names in ((all_of_it, list(found)), (ours, list(found)[2:])):
        left = [0.0] * len(names)
        for stage, colour in STAGES:
            seconds = [found[name].get(stage, 0.0) for name in names]
            axes.barh(names, seconds, left=left, color=colour, label=stage)
            left = [a + b for a, b in zip(left, seconds, strict=True)]
        for name, end in zip(names, left, strict=True):
            axes.text(end, name, f" {found[name]['total_s']:.1f} s", va="center")
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.spines[["top", "right"]].set_visible(False)
    ours.axvline(FLOOR_SECONDS, color="grey", linestyle=":", label="floor in bfloat16")
    ours.set_xlabel("seconds from request to pixels")
    figure.legend(*ours.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    versions = told["with"]
    figure.suptitle(f"GLM-Image, 1024 x 1024, 50 steps, {versions['gpu']}, torch {versions['torch']}", fontsize=10)
    figure.savefig(target, metadata={"Date": None})


if __name__ == "__main__":
    main()
