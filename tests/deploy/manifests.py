"""The templates as KServe sees them: read, merged, filled in. And the image's own settings, from the Containerfile."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from tests.conftest import ROOT

TEMPLATES = ROOT / "templates"
RUNTIME = TEMPLATES / "diffusers-serving-runtime.yaml"
Object = dict[str, Any]


def documents(path: Path) -> list[Object]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


@cache
def all_objects() -> tuple[tuple[Path, Object], ...]:
    """Every object under templates/ with its file, those inside of OpenShift Templates too."""
    found: list[tuple[Path, Object]] = []
    for path in sorted(TEMPLATES.rglob("*.yaml")):
        for document in documents(path):
            found.append((path, document))
            found += [(path, inner) for inner in document.get("objects", [])]
    return tuple(found)


@cache
def services() -> dict[str, tuple[Path, Object]]:
    """The InferenceServices by name."""
    return {o["metadata"]["name"]: (p, o) for p, o in all_objects() if o["kind"] == "InferenceService"}


def containers(obj: Object) -> Iterator[Object]:
    """Every container that an object brings, at any depth."""
    if isinstance(obj, dict):
        for key, value in obj.items():
            if key in ("containers", "initContainers"):
                yield from value
            if key == "model" and "modelFormat" in value:
                yield value
            yield from containers(value)
    elif isinstance(obj, list):
        for value in obj:
            yield from containers(value)


def merged(name: str) -> Object:
    """The pod of an InferenceService, as KServe makes it: {"spec": pod fields, "container": the merged container}.

    The runtime's container is patched by the service's model: arguments one after the other, variables, mounts and
    ports by name, the rest replaced; then {{.Name}} is filled in.
    """
    (runtime,) = documents(RUNTIME)
    _, service = services()[name]
    predictor = service["spec"]["predictor"]
    assert predictor["model"]["runtime"] == runtime["metadata"]["name"]
    container: Object = {}
    for part in (runtime["spec"]["containers"][0], predictor["model"]):
        for key, value in part.items():
            if key == "args":
                container["args"] = container.get("args", []) + value
            elif key in ("env", "volumeMounts", "ports"):
                by = {item.get("name"): item for item in container.get(key, [])}
                container[key] = list((by | {item["name"]: item for item in value}).values())
            elif key not in ("modelFormat", "runtime", "protocolVersion"):
                container[key] = value
    container = json.loads(json.dumps(container).replace("{{.Name}}", name))
    pod = {
        key: value for key, value in predictor.items() if key not in ("model", "minReplicas", "maxReplicas", "timeout")
    }
    volumes = {volume["name"]: volume for volume in runtime["spec"]["volumes"] + predictor.get("volumes", [])}
    return {"spec": {**pod, "volumes": list(volumes.values())}, "container": container}


@cache
def image() -> Object:
    """ENTRYPOINT, ENV, USER and WORKDIR of the image's last stage."""
    text = re.sub(r"^#.*\n|\\\n", "", (ROOT / "Containerfile").read_text(), flags=re.MULTILINE)
    last = re.split(r"^FROM ", text, flags=re.MULTILINE)[-1]
    lines = re.findall(r"^ENV (.*)$", last, re.MULTILINE)
    env = dict(part.split("=", 1) for line in lines for part in shlex.split(line))
    (entrypoint,) = re.findall(r"^ENTRYPOINT (.*)$", last, re.MULTILINE)
    return {
        "entrypoint": json.loads(entrypoint),
        "env": env,
        "user": re.findall(r"^USER (.*)$", last, re.MULTILINE)[-1],
        "workdir": re.findall(r"^WORKDIR (.*)$", last, re.MULTILINE)[-1],
    }


def value_of(container: Object, setting: str) -> str | None:
    """What a container says about a setting; a flag wins, the last one of several."""
    flags = [a.split("=", 1)[1] for a in container.get("args", []) if a.startswith(f"--{setting}=")]
    variables = [e.get("value") for e in container.get("env", []) if e["name"] == setting.upper()]
    found: list[str | None] = flags or variables or [None]
    return found[-1]


def bytes_of(quantity: str) -> float:
    units = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "m": 1e-3, "": 1.0}
    number, unit = re.fullmatch(r"([\d.]+)([A-Za-z]*)", str(quantity)).groups()  # type: ignore[union-attr]
    return float(number) * units[unit]
