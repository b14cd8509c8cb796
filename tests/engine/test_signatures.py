"""What a family passes to its pipeline is what that pipeline's `__call__` takes."""

from __future__ import annotations

import ast
import inspect
from types import ModuleType
from typing import Any

import diffusers
import pytest

from runtime.engine import running
from runtime.families.registry import FAMILIES, pipeline_half

# Ours, taken out by Hooks.call before the pipeline sees the rest.
OWN = {"reports_steps"}


def keys_stored(node: ast.AST, variable: str) -> set[str]:
    """Names put into a dict called `variable`: `variable["x"] = …` and `variable: … = {"x": …}`."""
    found = set()
    for part in ast.walk(node):
        targets = (
            part.targets if isinstance(part, ast.Assign) else [part.target] if isinstance(part, ast.AnnAssign) else []
        )
        for target in targets:
            if isinstance(target, ast.Subscript) and ast.unparse(target.value) == variable:
                found.add(ast.literal_eval(target.slice))
            elif isinstance(target, ast.Name) and target.id == variable and isinstance(part.value, ast.Dict):  # type: ignore[union-attr]
                found |= {ast.literal_eval(key) for key in part.value.keys if key is not None}  # type: ignore[union-attr]
    return found


def function(tree: ast.AST, name: str) -> ast.AST:
    return next(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == name)


def passed(half: ModuleType) -> set[str]:
    """Every name that the Runner may pass to the pipeline, `**dicts` and the callback of Hooks.call included."""
    tree = ast.parse(inspect.getsource(half))
    run = next(
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and "self._hooks.call(" in ast.unparse(node)
    )
    (call,) = (n for n in ast.walk(run) if isinstance(n, ast.Call) and ast.unparse(n.func) == "self._hooks.call")
    names = {keyword.arg for keyword in call.keywords if keyword.arg is not None}
    for keyword in call.keywords:
        if keyword.arg is not None:
            continue
        names |= keys_stored(run, ast.unparse(keyword.value))
    hooks = function(ast.parse(inspect.getsource(running)), "call")
    return (names | keys_stored(hooks, "arguments")) - OWN


def signature(class_name: str) -> dict[str, Any]:
    return dict(inspect.signature(getattr(diffusers, class_name).__call__).parameters)


CLASSES = [(family, name) for family, names in FAMILIES.items() for name in names]


@pytest.mark.parametrize(("family", "class_name"), CLASSES)
def test_what_is_passed_is_taken(family: str, class_name: str) -> None:
    names = passed(pipeline_half(family))
    if class_name == "WanPipeline":  # source pictures go to its sister, WanImageToVideoPipeline
        names -= {"image"}
    assert names <= set(signature(class_name))


@pytest.mark.parametrize(
    ("family", "some"),
    [
        ("glm_image", {"prompt", "image", "generator", "prior_token_ids", "prior_token_image_ids"}),
        ("glm_image", {"source_image_grid_thw", "callback_on_step_end", "max_sequence_length"}),
        ("wan", {"prompt", "negative_prompt", "image", "guidance_scale_2", "num_frames", "callback_on_step_end"}),
    ],
)
def test_the_names_are_really_read_from_the_source(family: str, some: set[str]) -> None:
    assert some <= passed(pipeline_half(family))


@pytest.mark.parametrize(("family", "class_name"), CLASSES)
def test_what_the_pipeline_needs_is_passed(family: str, class_name: str) -> None:
    needed = {
        name
        for name, parameter in signature(class_name).items()
        if parameter.default is inspect.Parameter.empty and name != "self" and parameter.kind.name != "VAR_KEYWORD"
    }
    assert needed <= passed(pipeline_half(family))


@pytest.mark.parametrize(("family", "class_name"), CLASSES)
def test_steps_are_reported_with_the_callback_of_this_form(family: str, class_name: str) -> None:
    assert "callback_on_step_end" in signature(class_name)
    assert callable(getattr(diffusers, class_name).maybe_free_model_hooks)
