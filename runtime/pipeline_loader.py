"""From a model folder to a pipeline on its device, or to one line that says what is wrong with the folder."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import diffusers as diffusers_library
import torch
import transformers as transformers_library

from runtime import optimization_manager
from runtime.assembly import CannotStreamError, load_whole
from runtime.cgroup import host_memory_limit
from runtime.checkpoint import Tensor, read_json, read_tensors, revision, weight_files
from runtime.device_manager import Device, detect_device, free_memory
from runtime.dtype_selector import DtypePlan, dtype_name, select_dtypes
from runtime.errors import StartupError, shown
from runtime.families import registry
from runtime.streaming import Stream
from runtime.types import PLAIN, Acceleration

logger = logging.getLogger("diffusion_runtime.loader")

# Both libraries show a type checker untyped placeholders.
diffusers: Any = diffusers_library
transformers: Any = transformers_library


@dataclass(frozen=True)
class LoadedPipeline:
    """A pipeline on its device. `dtypes` holds what most of each component's weights are in, `optimizations` what
    came of each, `acceleration` what was asked for with each `auto` of weights decided, `model_bytes` the size of all
    weights as loaded, `revision` a name for the model folder's content."""

    pipeline: Any
    device: Device
    dtypes: Mapping[str, str]
    optimizations: Mapping[str, str]
    acceleration: Acceleration
    model_bytes: int
    revision: str


def read_model_index(folder: Path) -> dict[str, Any]:
    """The folder's model_index.json, checked: a pipeline class of diffusers, and components that need no code but
    diffusers' and transformers'.

    Raises StartupError, one line, for a folder that is missing, unreadable or not of that kind.
    """
    if not folder.is_dir():
        raise StartupError(f"{folder}: no such model folder")
    path = folder / "model_index.json"
    if not path.exists():
        raise StartupError(f"{path}: missing, so {folder} is not a diffusers model")
    index = read_json(path)
    if not isinstance(index, dict) or "_class_name" not in index:
        raise StartupError(f"{path}: has no _class_name")
    _check_class(path, index["_class_name"])
    if (folder / "None.py").exists():  # diffusers 0.42 takes it for a custom pipeline
        raise StartupError(f"{folder / 'None.py'}: models with code of their own are not loaded")
    for name, value in component_entries(index).items():
        _check_component(folder, name, value)
    return index


def load_pipeline(
    folder: Path,
    device_setting: str,
    dtype_setting: str,
    optimizations: Mapping[str, str],
    on_stage: Callable[[str, float], None],
    stream: Stream | None = None,
    acceleration: Acceleration = PLAIN,
) -> LoadedPipeline:
    """Loads the pipeline in `folder` onto its device, once everything that can be checked without loading is right.

    `optimizations` maps names without ENABLE_ to auto, true or false. `acceleration` matters to a family whose pipeline
    half has `plan_memory` and `place_weights`: they decide where its weights lie. `on_stage("loading", fraction)` is
    called at the start, after each component (weighted by its bytes) and at the end, which alone is 1.0.

    Weights are mapped from their files. Without offload each component goes to the device as it comes, so that the
    host never holds the whole model. Only safetensors are read, nothing is downloaded, no code of the model is run.
    With a `stream`, `folder` is its skeleton, and the weights come from there.

    Raises StartupError, one line with the original chained, for whatever keeps the model from being loaded, and
    CannotStreamError.
    """
    on_stage("loading", 0.0)
    index = read_model_index(folder)
    classes = {name: value[1] for name, value in component_entries(index).items()}
    stored = read_tensors(folder, classes)
    # Now, while a skeleton still has its weights' sizes.
    told = revision(Path(stream.uri) if stream is not None and stream.local else folder, classes)
    device = detect_device(device_setting)
    dtypes = select_dtypes(dtype_setting, device, folder, classes)
    sizes = {name: _loaded_bytes(tensors, dtypes.of(name)) for name, tensors in stored.items()}
    free, limit = free_memory(device), host_memory_limit()
    half = registry.pipeline_half(registry.family_of(index["_class_name"]))
    placement: optimization_manager.Placement | None = None
    if hasattr(half, "plan_memory"):
        placement = half.plan_memory(folder, sizes, dtypes, device, acceleration, optimizations, free, limit)
    decisions = optimization_manager.plan(
        optimizations, device, sum(sizes.values()), free, limit, max(sizes.values(), default=0), placement
    )
    whole = optimization_manager.moves_whole(device, decisions) and (placement is None or placement.directly)
    low_cpu_mem = decisions["low_cpu_mem"].on
    directly = low_cpu_mem and whole
    logger.info("loading %s from %s onto %s", index["_class_name"], stream.uri if stream else folder, device.name)
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    models: dict[str, torch.nn.Module] = {}
    if stream is not None:
        if not low_cpu_mem:
            raise CannotStreamError("ENABLE_LOW_CPU_MEM is false")
        if not whole and (stream.local or placement is not None or sum(sizes.values()) > limit):
            raise CannotStreamError("weights that do not go to the device as they come are mapped from their files")
        target = device.torch if whole else torch.device("cpu")
        models = stream.components(component_entries(index), target, dtypes.of)
    with _component_progress(sizes, on_stage) as loaded_one:
        if stream is None:
            models = _transformers_models(folder, component_entries(index), device, dtypes, directly, loaded_one)
        pipeline = _from_pretrained(folder, index["_class_name"], device, dtypes, low_cpu_mem, directly, models)
    place = None if placement is None else partial(half.place_weights, chosen=placement)
    report = optimization_manager.apply(pipeline, device, decisions, place)
    report |= _lossy(acceleration, placement)
    pipeline.set_progress_bar_config(disable=True)
    modules = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    loaded = LoadedPipeline(
        pipeline=pipeline,
        device=device,
        dtypes={name: _main_dtype(module, dtypes.of(name)) for name, module in modules.items()},
        optimizations=report,
        acceleration=placement.acceleration if placement is not None else _plain(acceleration),
        model_bytes=sum(weight.nbytes for module in modules.values() for weight in _weights(module)),
        revision=told,
    )
    logger.info("loaded %.1f GiB, revision %s", loaded.model_bytes / 2**30, loaded.revision)
    on_stage("loading", 1.0)
    return loaded


def _transformers_models(
    folder: Path,
    entries: Mapping[str, list[Any]],
    device: Device,
    dtypes: DtypePlan,
    directly: bool,
    on_loaded: Callable[[str], None],
) -> dict[str, torch.nn.Module]:
    """The models of transformers, loaded as diffusers would, and refused where the checkpoint lacks weights."""
    models = {}
    for name, (library, class_name) in entries.items():
        cls = getattr(transformers, class_name, None) if library == "transformers" else None
        if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel) and weight_files(folder, name):
            models[name] = load_whole(
                cls,
                f"{folder}/{name}",
                str(folder / name),
                dtype=dtypes.of(name),
                use_safetensors=True,
                local_files_only=True,
                device_map=device.type if directly else None,
            )
            on_loaded(name)
    return models


def _from_pretrained(
    folder: Path,
    class_name: str,
    device: Device,
    dtypes: DtypePlan,
    low_cpu_mem: bool,
    directly: bool,
    models: Mapping[str, torch.nn.Module],
) -> Any:
    try:
        # Not DiffusionPipeline's own: that one reads a passed component which is optional from the folder again.
        return getattr(diffusers, class_name).from_pretrained(
            str(folder),
            dtype=dtypes.as_torch_dtype(),
            use_safetensors=True,
            local_files_only=True,
            low_cpu_mem_usage=low_cpu_mem,
            device_map=device.type if directly else None,
            **models,
        )
    except Exception as exc:
        lines = str(exc).strip().splitlines() or [type(exc).__name__]
        raise StartupError(f"{folder}: {class_name} cannot be loaded: {lines[0]}") from exc


# --- 8-bit weights that nobody asked for ---


def _lossy(asked: Acceleration, placement: optimization_manager.Placement | None) -> dict[str, str]:
    """For the metadata: what `auto` made 8-bit."""
    names = ("token_weights", "denoiser_weights") if placement is not None else ()
    return {
        name: f"on: auto, {getattr(placement.acceleration, name)}, {placement.offload.why}"
        for name in names
        if placement is not None and getattr(asked, name) == "auto" != getattr(placement.acceleration, name) != "plain"
    }


def _plain(asked: Acceleration) -> Acceleration:
    """`auto` is plain where nothing else was chosen."""
    tokens, denoiser = ("plain" if kind == "auto" else kind for kind in (asked.token_weights, asked.denoiser_weights))
    return replace(asked, token_weights=tokens, denoiser_weights=denoiser)


# --- what model_index.json may say ---


def component_entries(index: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The components that a model_index.json has: name to [library, class]. [null, null] stands for an optional one
    left out; a list of numbers is an argument of the pipeline."""
    return {
        name: value
        for name, value in index.items()
        if isinstance(value, list) and not name.startswith("_") and any(isinstance(part, str) for part in value)
    }


def _check_class(path: Path, name: Any) -> None:
    pipeline_class = getattr(diffusers, name, None) if isinstance(name, str) else None
    if pipeline_class is None:
        raise StartupError(f"{path}: diffusers {diffusers.__version__} has no pipeline class {shown(name)}")
    if hasattr(pipeline_class, "_backends"):  # diffusers' stand-in for a class whose packages are missing
        raise StartupError(f"{path}: {name} needs packages not installed here: {', '.join(pipeline_class._backends)}")
    if not isinstance(pipeline_class, type) or not issubclass(pipeline_class, diffusers.DiffusionPipeline):
        raise StartupError(f"{path}: {name} is not a pipeline class")


def _check_component(folder: Path, name: str, value: list[Any]) -> None:
    path = folder / "model_index.json"
    if len(value) != 2 or not all(isinstance(part, str) for part in value):
        raise StartupError(f"{path}: {name} is {shown(value)}, not a library and a class")
    library = value[0]
    if library not in ("diffusers", "transformers") and not _is_pipeline_module(library):
        raise StartupError(f"{path}: {name} comes from {shown(library)}; models with code of their own are not loaded")
    home = folder / name
    if home.parent != folder or not home.is_dir():
        raise StartupError(f"{home}: missing, though model_index.json names {name}")
    if (home / f"{library}.py").exists():  # diffusers takes it for the component's code
        raise StartupError(f"{home / f'{library}.py'}: models with code of their own are not loaded")


def _is_pipeline_module(library: str) -> bool:
    """True for what lies in diffusers beside a pipeline, such as stable_diffusion's safety checker."""
    return library.isidentifier() and (Path(diffusers.pipelines.__path__[0]) / library).is_dir()


# --- sizes and progress ---


def _loaded_bytes(tensors: tuple[Tensor, ...], dtype: torch.dtype) -> int:
    return sum(t.elements * dtype.itemsize if "F" in t.dtype else t.bytes for t in tensors)


def _weights(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _main_dtype(module: torch.nn.Module, default: torch.dtype) -> str:
    counts: Counter[torch.dtype] = Counter()
    for parameter in module.parameters():
        counts[parameter.dtype] += parameter.nbytes
    return dtype_name(counts.most_common(1)[0][0] if counts else default)


@contextmanager
def _component_progress(
    sizes: Mapping[str, int], on_stage: Callable[[str, float], None]
) -> Iterator[Callable[[str], None]]:
    """Gives a function that reports a component as loaded, and reports those that diffusers logs as such. Should it
    stop logging that, only progress is lost."""
    total, done = sum(sizes.values()), 0

    def loaded(name: str) -> None:
        nonlocal done
        if name in sizes:
            done += sizes[name]
            on_stage("loading", 0.99 * done / total)

    def watch(record: logging.LogRecord) -> bool:
        words = record.getMessage().split()
        if words[:1] == ["Loaded"]:
            loaded(words[1])
        return record.levelno >= logging.WARNING

    library = logging.getLogger("diffusers.pipelines.pipeline_utils")
    level = library.level
    library.setLevel(logging.INFO)
    library.addFilter(watch)
    try:
        yield loaded
    finally:
        library.removeFilter(watch)
        library.setLevel(level)
