"""GLM-Image's source pictures: the size we give them is one that transformers' image processor leaves alone."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
from diffusers import GlmImagePipeline
from transformers.models.glm_image.image_processing_pil_glm_image import smart_resize

from runtime.families.glm_image.pipeline import facts
from runtime.families.glm_image.request import source_size

# The areas of the real checkpoint's processor and of the tiny one's.
AREAS = {"real": (512 * 512, 2048 * 2048), "tiny": (64 * 64, 256 * 256)}


@pytest.mark.parametrize("model", AREAS)
def test_the_token_path_keeps_the_size(model: str) -> None:
    smallest, largest = AREAS[model]
    edges = {"source_shortest_edge": math.isqrt(smallest), "source_longest_edge": math.isqrt(largest)}
    rng, checked = random.Random(model), 0
    while checked < 5000:
        height = round(2 ** rng.uniform(0, 13))
        width = round(height * 2 ** rng.uniform(-2, 2))
        if not width or max(width, height) > 4 * min(width, height):
            continue
        made_width, made_height = source_size(width, height, edges)
        # It works on half the sides: one token there covers 16 x 16 of them.
        kept = smart_resize(made_height, made_width, factor=16, min_pixels=smallest, max_pixels=largest)
        assert kept == (made_height // 2, made_width // 2), (width, height)
        if min(width, height) >= 16:  # where the processor's own choice is one that it keeps, it is ours
            own_height, own_width = smart_resize(height, width, 16, smallest, largest)
            own = 2 * own_height, 2 * own_width
            if max(own) <= 4 * min(own) and smart_resize(*own, 16, smallest, largest) == (own_height, own_width):
                assert (made_height, made_width) == own, (width, height)
        checked += 1


def test_the_tiny_model_is_what_is_checked_here(tiny_models: Path) -> None:
    pipeline = GlmImagePipeline.from_pretrained(tiny_models / "glm-image")
    processor = pipeline.processor.image_processor
    assert (processor.size["shortest_edge"], processor.size["longest_edge"]) == AREAS["tiny"]
    assert processor.patch_size * processor.merge_size == 16
    told = facts(pipeline, tiny_models)
    assert (told["source_shortest_edge"], told["source_longest_edge"]) == (64, 256)
