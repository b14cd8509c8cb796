"""The server's half needs no torch: its tests pass, and its process answers probes, where there is none."""

from __future__ import annotations

import re
import site
import subprocess
import sys
import time
import urllib.error
import urllib.request
import venv
from pathlib import Path

import pytest

from tests.conftest import ROOT, Gate, clean_environment, free_ports

# Of the engine's half alone; a name stands for the package, its metadata and its libraries.
ENGINE_ONLY = ("torch", "functorch", "diffusers", "transformers", "accelerate", "tokenizers", "safetensors", "triton")
KEPT = ("tritonclient",)
SECONDS = 120


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with everything this one has but the engine's packages."""
    folder = tmp_path_factory.mktemp("without-torch")
    venv.create(folder, symlinks=True, with_pip=False)
    (packages,) = folder.glob("lib/python*/site-packages")
    for source in map(Path, site.getsitepackages()):
        for entry in source.iterdir() if source.is_dir() else ():
            theirs = entry.name.startswith(ENGINE_ONLY) and not entry.name.startswith(KEPT)
            link = packages / entry.name
            if not theirs and not link.exists():
                link.symlink_to(entry)
    return folder / "bin" / "python"


def environment() -> dict[str, str]:
    """Without what a parallel or a measured run of these tests hands to its children."""
    prefixes = ("PYTEST_", "COV_", "COVERAGE_")
    kept = {name: value for name, value in clean_environment().items() if not name.startswith(prefixes)}
    return {**kept, "PYTHONDONTWRITEBYTECODE": "1"}


def run(python: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [python, *arguments], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=10 * SECONDS
    )


@pytest.mark.parametrize("package", [name for name in ENGINE_ONLY if name not in ("triton", "functorch")])
def test_the_packages_are_not_there(python: Path, package: str) -> None:
    assert subprocess.run([sys.executable, "-c", f"import {package}"], capture_output=True).returncode == 0
    made = run(python, "-c", f"import {package}")
    assert made.returncode == 1
    assert f"ModuleNotFoundError: No module named '{package}'" in made.stderr


@pytest.mark.timeout(11 * SECONDS)  # hundreds of tests in one
def test_the_servers_tests_pass(python: Path) -> None:
    made = run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "tests/server")
    assert made.returncode == 0, made.stdout[-10_000:] + made.stderr
    assert " passed" in made.stdout
    assert "skipped" not in made.stdout


def test_the_server_answers_probes_and_ends_with_one_line(python: Path, tmp_path: Path, gate: Gate) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    http, grpc = free_ports(2)
    log = tmp_path / "log"
    gate.shut("loading")  # the engine would end before a slow machine has asked
    with log.open("wb") as output:
        process = subprocess.Popen(
            [python, "-m", "runtime", "--model_id", str(model), "--http_port", str(http), "--grpc_port", str(grpc)],
            cwd=tmp_path,
            env={**environment(), **gate.environment, "LOG_FORMAT": "json"},
            stdout=output,
            stderr=output,
        )
    live = False
    try:
        deadline = time.monotonic() + SECONDS
        while process.poll() is None and not live:
            assert time.monotonic() < deadline, log.read_text()
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{http}/v2/health/live", timeout=SECONDS) as answer:
                    live = answer.status == 200
            except urllib.error.URLError:
                time.sleep(0.02)
        gate.open("loading")
        assert process.wait(SECONDS) == 1
    finally:
        process.kill()
        process.wait()
    text = log.read_text()
    assert live, text
    told = [line for line in text.splitlines() if line.startswith("diffusion-runtime: ")]
    (line,) = told
    reason = r"the model could not be loaded: ModuleNotFoundError: No module named '(torch|diffusers|transformers)'"
    assert re.fullmatch(f"diffusion-runtime: {reason}", line)
    # Every other line is a line of the log.
    assert all(line.startswith("{") for line in text.splitlines() if line not in told), text
