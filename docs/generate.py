"""Write the tables of settings, routes, families, fields and errors into the docs, from the code.

    python docs/generate.py            rewrite them
    python docs/generate.py --check    fail when one is out of date

A table stands between `<!-- begin: NAME -->` and `<!-- end: NAME -->`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent))


def rows(head: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    table = [list(head), *map(list, lines)]
    table.insert(1, ["---"] * len(table[0]))
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in table)


def settings() -> str:
    from runtime.settings import Settings, default_text

    return rows(
        ("variable", "flag", "default", "what it does"),
        (
            (f"`{name.upper()}`", f"`--{name}`", f"`{default_text(name)}`", info.description or "")
            for name, info in Settings.model_fields.items()
        ),
    )


def routes() -> str:
    from fastapi import FastAPI
    from kserve.model_repository import ModelRepository

    from runtime.routes import ROUTERS

    app = FastAPI()
    for router in ROUTERS:
        app.include_router(router(ModelRepository()))
    found = sorted((path, method.upper()) for path, methods in app.openapi()["paths"].items() for method in methods)
    return rows(("method", "path"), ((method, f"`{path}`") for path, method in found))


def errors() -> str:
    from runtime.errors import all_errors

    return rows(
        ("HTTP", "gRPC", "error"),
        (
            (str(kind.http_status), kind.grpc_code, f"`{kind.__name__}`")
            for kind in sorted(all_errors(), key=lambda kind: kind.http_status)
        ),
    )


def families() -> str:
    from runtime.families.registry import FAMILIES

    return rows(
        ("family", "pipeline classes"),
        ((f"`{name}`", ", ".join(f"`{c}`" for c in classes) or "every other") for name, classes in FAMILIES.items()),
    )


def fields() -> str:
    from runtime.families.base import ALIASES, COMMON

    aliases: dict[str, list[str]] = {}
    for alias, name in ALIASES.items():
        aliases.setdefault(name, []).append(f"`{alias}`")
    return rows(
        ("field", "also", "type", "what it is"),
        ((f"`{p.name}`", ", ".join(aliases.get(p.name, [])), p.kind, p.description) for p in COMMON.values()),
    )


def protocols() -> str:
    from runtime.families.base import COMMON
    from runtime.protocol import openai

    video_only = {"num_frames", "fps", "seconds", "guidance_scale_2", "flow_shift"}
    pictures = [name for name in openai.VIDEO_PICTURES if name != "image"]
    images = {**dict.fromkeys(video_only, "no"), "image": "edits"}
    table = [(f"`{n}`", "yes", images.get(n, "yes"), "one only" if n == "n" else "yes") for n in COMMON]
    choices = ", ".join(openai.RESPONSE_FORMATS)
    table += [
        ("`size`", "yes", "yes, or auto", "yes, or auto"),
        ("`model`", "in the path", "the name or an alias", "the name or an alias"),
        *((f"`{name}`", "`images`" if name == "images" else "no",
           "edits" if name in openai.PICTURES else "no", "yes") for name in pictures),
        ("`response_format`", "no", choices, "b64_json, url (`/v1/video/generations`)"),
        ("`stream`", "no", "yes", "no"),
        ("`background`", "no", ", ".join(openai.BACKGROUNDS), "no"),
        ("`output_compression`", "no", "the quality of jpeg and webp; ignored for png", "no"),
        *((f"`{name}`", "no", "ignored, and told so", "ignored, and told so") for name in sorted(openai.IGNORED)),
        *((f"`{name}`", "no", f"refused: {reason}", "no") for name, reason in openai.REFUSED.items()),
    ]  # fmt: skip
    return rows(("field", "v1 and v2", "OpenAI images", "OpenAI videos"), table)


def metrics() -> str:
    from prometheus_client.metrics import MetricWrapperBase

    from runtime import metrics as module

    found = [value for value in vars(module).values() if isinstance(value, MetricWrapperBase)]
    return rows(
        ("metric", "type", "labels", "what it is"),
        (
            (
                f"`{metric._name}{'_total' if metric._type == 'counter' else ''}`",
                metric._type,
                ", ".join(metric._labelnames),
                metric._documentation,
            )
            for metric in found
        ),
    )


def sizing() -> str:
    from docs.sizing import sizing

    return sizing()


TABLES: dict[str, Callable[[], str]] = {
    f.__name__: f for f in (settings, routes, errors, families, fields, protocols, metrics, sizing)
}


def rewritten(text: str) -> str:
    """`text` with each of its tables made anew."""

    def table(match: re.Match[str]) -> str:
        name = match.group(1)
        return f"<!-- begin: {name} -->\n{TABLES[name]()}\n<!-- end: {name} -->"

    return re.sub(r"<!-- begin: (\w+) -->.*?<!-- end: \1 -->", table, text, flags=re.DOTALL)


def main() -> int:
    check, stale = "--check" in sys.argv[1:], []
    for path in sorted(DOCS.glob("*.md")):
        text = path.read_text()
        if (new := rewritten(text)) != text:
            stale.append(path.name)
            if not check:
                path.write_text(new)
    if check and stale:
        print(f"out of date: {', '.join(stale)}; run make docs")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
