"""Which family serves which pipeline class; the one place to add a family."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

# family -> class names in model_index.json; every other class is served by `generic`
FAMILIES: dict[str, tuple[str, ...]] = {
    "glm_image": ("GlmImagePipeline",),
    "wan": ("WanPipeline", "WanImageToVideoPipeline"),
    "generic": (),
}


def family_of(class_name: str) -> str:
    """The family that serves the pipeline class `class_name`."""
    return next((family for family, classes in FAMILIES.items() if class_name in classes), "generic")


def request_half(family: str) -> ModuleType:
    return import_module(f"runtime.families.{family}.request")


def pipeline_half(family: str) -> ModuleType:
    return import_module(f"runtime.families.{family}.pipeline")
