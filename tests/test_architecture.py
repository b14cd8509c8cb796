"""The rules that keep the design true, read from the source: who may import what, and that the docs name everything."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime import __version__
from runtime.errors import all_errors
from runtime.families.registry import FAMILIES
from runtime.settings import Settings, default_text

ROOT = Path(__file__).resolve().parent.parent
SOURCES = {path.relative_to(ROOT).as_posix(): path for path in sorted((ROOT / "runtime").rglob("*.py"))}
TREES = {name: ast.parse(path.read_bytes()) for name, path in SOURCES.items()}

ENGINE_HALF = re.compile(
    r"runtime/(engine/(worker|context|running)|families/\w+/pipeline|device_manager|dtype_selector"
    r"|families/glm_image/(decoder|kernels|memory|ops|reference|stages|tokens|transformer|weights)"
    r"|assembly|load_mode|optimization_manager|pipeline_loader|streaming|publish|tiny)\.py"
)
# package -> where it may be imported
RULES = {
    "kserve": r"runtime/(__main__|model|protocol/\w+|routes/\w+)\.py",
    "fastapi": r"runtime/(__main__|model|protocol/\w+|routes/\w+)\.py",
    "starlette": r"runtime/(__main__|model|middleware|protocol/\w+|routes/\w+)\.py",
    **dict.fromkeys(("torch", "diffusers", "transformers", "accelerate", "tokenizers"), ENGINE_HALF.pattern),
}


def imports(tree: ast.AST) -> Iterator[str]:
    """The dotted names that a module imports anywhere in it, those from a package with their own name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def file_of(name: str) -> str | None:
    """The file of the longest prefix of a dotted name that is a module of ours."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        stem = "/".join(parts[:count])
        for file in (f"{stem}.py", f"{stem}/__init__.py"):
            if file in SOURCES:
                return file
    return None


def reachable(start: str) -> set[str]:
    found, open_files = set(), [start]
    while open_files:
        file = open_files.pop()
        if file not in found:
            found.add(file)
            open_files += [other for name in imports(TREES[file]) if (other := file_of(name)) is not None]
    return found


# --- imports


@pytest.mark.parametrize("package", RULES)
def test_who_imports_a_package(package: str) -> None:
    users = {file for file, tree in TREES.items() if any(name.split(".")[0] == package for name in imports(tree))}
    assert not {file for file in users if not re.fullmatch(RULES[package], file)}
    assert users or package == "accelerate", "nobody imports it: the rule is out of date"


def test_the_server_does_not_reach_the_engines_half() -> None:
    """Neither at import nor later: `engine/client.py` starts the worker by its name."""
    server = reachable("runtime/__main__.py")
    server |= {file for file in SOURCES if file.endswith("/request.py")}  # imported by name
    assert {"runtime/scheduler.py", "runtime/engine/client.py", "runtime/protocol/v2.py"} <= server
    assert not {file for file in server if ENGINE_HALF.fullmatch(file)}


def test_the_engine_does_not_reach_the_server() -> None:
    engine = reachable("runtime/engine/worker.py") | reachable("runtime/families/wan/pipeline.py")
    assert "runtime/engine/messages.py" in engine
    server_only = r"runtime/(__main__|model|settings|scheduler|middleware|protocol/.*|routes/.*|engine/client)\.py"
    assert not {file for file in engine if re.fullmatch(server_only, file)}


def test_only_the_settings_read_the_environment() -> None:
    readers = set()
    for file, tree in TREES.items():
        for node in ast.walk(tree):
            name = node.attr if isinstance(node, ast.Attribute) else node.name if isinstance(node, ast.alias) else ""
            if name in ("environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"):
                readers.add(file)
    assert readers == {"runtime/settings.py"}


def test_nothing_happens_at_import() -> None:
    """Module bodies hold imports, definitions and values. The exceptions are Pillow's two process-wide switches."""
    deeds = set()
    for file, tree in TREES.items():
        for node in tree.body:
            match node:
                case ast.Import() | ast.ImportFrom() | ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                    pass
                case ast.Expr(ast.Constant()):
                    pass
                case ast.Assign(targets) if all(isinstance(t, ast.Name | ast.Tuple) for t in targets):
                    pass
                case ast.AnnAssign(ast.Name()):
                    pass
                case ast.If(test) if ast.unparse(test) in ("TYPE_CHECKING", "__name__ == '__main__'"):
                    pass
                case _:
                    deeds.add((file, ast.unparse(node).split("\n")[0]))
    assert deeds == {
        ("runtime/media.py", "Image.MAX_IMAGE_PIXELS = None"),
        ("runtime/media.py", "warnings.filterwarnings('ignore', category=UserWarning, module='PIL\\\\.')"),
    }


def imported_by(*modules: str) -> set[str]:
    """Top-level packages in the memory of a fresh process that imports `modules`."""
    code = (
        "import json, signal, sys, threading\n"
        f"for name in {modules}: __import__(name)\n"
        "assert threading.active_count() == 1, threading.enumerate()\n"
        "assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL\n"
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))\n"
    )
    made = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    return set(json.loads(made.stdout))


def test_importing_the_server_loads_nothing_heavy() -> None:
    heavy = {"torch", "diffusers", "transformers", "accelerate", "av"}
    modules = [
        file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for file in sorted(reachable("runtime/__main__.py") | {f for f in SOURCES if f.endswith("/request.py")})
    ]
    assert not imported_by(*modules) & heavy
    # SIGTERM is handled before kserve, which takes seconds to import.
    assert not imported_by("runtime.__main__") & (heavy | {"kserve", "fastapi", "uvicorn", "grpc"})


# --- names that must agree


def test_optimizations_and_their_settings() -> None:
    tree = TREES["runtime/optimization_manager.py"]
    (table,) = (
        node.value
        for node in tree.body
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "OPTIMIZATIONS"
    )
    assert isinstance(table, ast.Dict)
    names = [ast.literal_eval(key) for key in table.keys if key is not None]
    assert sorted(names) == sorted(Settings().optimizations)


def test_families_have_both_halves() -> None:
    folders = {file.split("/")[2] for file in SOURCES if re.fullmatch(r"runtime/families/\w+/\w+\.py", file)}
    assert folders == set(FAMILIES)
    for family in FAMILIES:
        for half, wanted in (("request", {"schema", "complete"}), ("pipeline", {"facts", "warmup", "Runner"})):
            body = TREES[f"runtime/families/{family}/{half}.py"].body
            defined = {node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
            assert wanted <= defined, f"{family}/{half}.py"


def test_the_version_is_the_changelogs() -> None:
    entries = re.findall(r"^## \[?(\d+\.\d+\.\d+)\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert entries[0] == __version__
    assert len(set(entries)) == len(entries)


# --- the docs name everything


def cells(text: str) -> list[list[str]]:
    """Rows of Markdown tables, without the backticks."""
    rows = [line.strip().strip("|").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip().strip("`") for cell in row] for row in rows]


def test_the_docs_name_every_setting() -> None:
    rows = {row[0]: row for row in cells((ROOT / "docs" / "operations.md").read_text())}
    for name, info in Settings.model_fields.items():
        row = rows.get(name.upper(), [])
        assert default_text(name) in row, name
        assert info.description in row, name
    settings = {name for name in rows if name.lower() in Settings.model_fields}
    assert len(settings) == len(Settings.model_fields)


def routes_of_the_app() -> list[tuple[str, str]]:
    """(method, path) of KServe's app as the server builds it, with our routers first."""
    code = """
import json, sys
sys.argv = sys.argv[:1]
import kserve.model_server as server
from kserve.model_repository import ModelRepository
from kserve.protocol.rest.server import RESTServer
from runtime.routes import ROUTERS

for router in ROUTERS:
    server.app.include_router(router(ModelRepository()))
parts = server.ModelServer(enable_grpc=False)
RESTServer("", parts.dataplane, parts.model_repository_extension, 8080).create_application()
for path, methods in server.app.openapi()["paths"].items():
    for method in methods:
        print(json.dumps([method.upper(), path]))
"""
    made = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert made.returncode == 0, made.stderr
    rows = [json.loads(line) for line in made.stdout.splitlines()]
    return sorted({(method, path) for method, path in rows})


def test_the_docs_name_every_route() -> None:
    text = (ROOT / "docs" / "api.md").read_text()
    rows = {tuple(row[:2]) for row in cells(text)}
    routes = routes_of_the_app()
    assert ("GET", "/metrics") in routes and ("POST", "/v1/models/{model_name}:predict") in routes
    missing = [
        (method, path)
        for method, path in routes
        if (method, path) not in rows and f"`{path}`" not in text and "{model_version}" not in path
    ]
    assert not missing
    assert "Model versions are not served" in " ".join(text.split())


def test_the_docs_name_every_error() -> None:
    rows = [set(row) for row in cells((ROOT / "docs" / "api.md").read_text())]
    for error in all_errors():
        told = {error.__name__, str(error.http_status), error.grpc_code}
        assert any(told <= row for row in rows), error.__name__


@pytest.mark.parametrize("family", FAMILIES)
def test_the_docs_name_every_family(family: str) -> None:
    text = (ROOT / "docs" / "api.md").read_text()
    assert f"`{family}`" in text
    for class_name in FAMILIES[family]:
        assert f"`{class_name}`" in text


# --- what no file of the repository may name


def files_of_the_repository() -> list[Path]:
    made = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    paths = [ROOT / name for name in made.stdout.decode().split("\0") if name]
    return [path for path in paths if path.is_file()]


# In parts, so that this file may be among those that are read.
FORBIDDEN = {
    "a folder of a developer's machine": r"(?<![\w.}-])/wo" r"rk(?![\w-])",
    "a scratch folder": r"/tmp/[a-z]\b",
    "a host of a package registry": r"py" r"pi\.org|files\.python" r"hosted",
    "other machinery": r"(?i)\bfa" r"rm\b",
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_file_names(what: str) -> None:
    files = files_of_the_repository()
    assert Path(__file__).resolve() in [path.resolve() for path in files]
    found = [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in files
        for match in re.finditer(FORBIDDEN[what], path.read_bytes().decode(errors="replace"))
    ]
    assert not found
