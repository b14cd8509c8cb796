"""The sizing table of docs/deploy.md: what templates ask for, and what benchmarks measured.

A benchmark adds to it with a list under "sizing" in any JSON file of bench/results, one object a model and device:
{"model": "GLM-Image", "gpu": "NVIDIA H200", "what": "1024x1024, 50 steps", "seconds": 105.2, "cold_start_s": 31.5,
"gpu_memory_gib": 40.1, "host_memory_gib": 6.2}. What is left out is "not measured".
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# Model -> template, GB of weights in bfloat16 by the parts' parameter counts, card that its template advises, in GB.
MODELS = {
    "GLM-Image": ("glm-image-s3", 35, 48),
    "Wan 2.2 T2V-A14B": ("wan-t2v-a14b-s3", 70, 96),
    "Wan 2.2 I2V-A14B": ("wan-i2v-a14b-s3", 70, 96),
    "Wan 2.2 TI2V-5B": ("wan-ti2v-5b-s3", 24, 48),
    "Stable Diffusion 3.5 medium": ("redhat-dog", 16, 24),
}
HEAD = ("model", "weights, disk", "card advised", "memory asked", "GPU memory", "host memory", "cold start", "a result")


def measured(results: Path = ROOT / "bench" / "results") -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for path in sorted(results.glob("*.json")):
        content = json.loads(path.read_text())
        found += content.get("sizing", []) if isinstance(content, dict) else []
    return found


def sizing() -> str:
    """The table in Markdown."""
    lines = []
    for model, (template, weights, card) in MODELS.items():
        text = (ROOT / "templates" / f"{template}.yaml").read_text()
        memory = re.findall(r"limits: .*memory: (\w+)", text)[0]
        fixed = [model, f"{weights} GB", f"{card} GB", memory]
        rows = [fixed + cells(entry) for entry in measured() if entry["model"] == model]
        lines += rows or [fixed + cells({})]
    table = [list(HEAD), ["---"] * len(HEAD), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in table)


def cells(entry: dict[str, Any]) -> list[str]:
    def cell(key: str, unit: str, more: str = "") -> str:
        return f"{entry[key]:g} {unit}{more}" if key in entry else "not measured"

    of = ", ".join(str(entry[key]) for key in ("what", "gpu") if key in entry)
    return [
        cell("gpu_memory_gib", "GiB"),
        cell("host_memory_gib", "GiB"),
        cell("cold_start_s", "s"),
        cell("seconds", "s", f" ({of})" if of else ""),
    ]
