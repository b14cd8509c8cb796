"""What a picture or video says of itself: in its file when EMBED_METADATA is on, and beside it in an object store."""

from __future__ import annotations

import json
from typing import Any

from runtime.types import GenerationRequest

# `parameters` are those that any request may name; None where the model has no such thing.
PARAMETERS = (
    *("width", "height", "num_inference_steps", "guidance_scale", "guidance_scale_2", "flow_shift"),
    *("num_frames", "fps", "max_sequence_length", "output_format", "output_quality"),
)


def metadata_of(
    request: GenerationRequest, seed: int, model: str, revision: str, prompts: bool = False
) -> dict[str, str]:
    """What made one picture or video of `request`: model, revision, seed and, as JSON, the parameters.

    Neither times nor ids, so the same picture has the same metadata, drawn alone or as one of `n`. `prompts` adds
    prompt and negative_prompt; without it every text that the client chose stays out, also under a pipeline's own
    names (`prompt_2`). Source pictures are counted.
    """
    parameters: dict[str, Any] = {name: getattr(request, name) for name in PARAMETERS}
    parameters |= {k: v for k, v in request.extra.items() if prompts or not isinstance(v, str)}
    parameters["source_images"] = len(request.images) or None
    told = {
        "model": model,
        "revision": revision,
        "seed": str(seed),
        "parameters": json.dumps({k: v for k, v in parameters.items() if v is not None}, sort_keys=True),
    }
    if prompts:
        told["prompt"] = request.prompt
        if request.negative_prompt is not None:
            told["negative_prompt"] = request.negative_prompt
    return told
