"""The image's install steps, run in an empty folder; and what the Containerfile and the Makefile say about them.

The whole installation takes minutes: it runs once for each state of its inputs, which .cache remembers. The image
itself is not built here.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, clean_environment
from tests.deploy.manifests import image

INSTALL = ROOT / "image" / "install.sh"
SECONDS = 900


def environment(**more: str) -> dict[str, str]:
    kept = {k: v for k, v in clean_environment().items() if k not in ("PYTHONPATH", "VIRTUAL_ENV", "OFFLINE")}
    return {**kept, "PYTHON": getattr(sys, "_base_executable", sys.executable), **more}


def run(*arguments: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", *map(str, arguments)], env=environment(**env), capture_output=True, text=True, timeout=SECONDS
    )


@pytest.mark.timeout(SECONDS)  # it waits for the package index, and for two gigabytes from it
def test_the_steps_run_in_a_clean_environment(tmp_path: Path) -> None:
    """Dependencies and code, as the Containerfile installs them; then the code answers from there alone."""
    inputs = [INSTALL, ROOT / "requirements-base.txt"]
    wanted = hashlib.sha256(b"".join(path.read_bytes() for path in inputs) + sys.version.encode()).hexdigest()
    done_before = ROOT / ".cache" / f"image-steps-{wanted[:12]}"
    if done_before.exists():
        return
    folder, app = tmp_path / "venv", tmp_path / "app"
    made = run(INSTALL, "dependencies", folder, PYTHONNOUSERSITE="1")
    assert made.returncode == 0, made.stdout + made.stderr
    shutil.copytree(ROOT / "runtime", app / "runtime", ignore=shutil.ignore_patterns("__pycache__"))
    made = run(INSTALL, "code", app, VENV=str(folder), ROOT=str(tmp_path / "root"))
    assert made.returncode == 0, made.stdout + made.stderr
    for name in ("cache", "mnt/models"):
        place = (tmp_path / "root" / name).stat()
        assert place.st_gid == 0 and place.st_mode & 0o070 == (place.st_mode & 0o700) >> 3
    assert list((app / "runtime").glob("__pycache__/*.pyc"))
    python = folder / "bin" / "python"
    tiny = [str(python), "-m", "runtime.tiny", str(tmp_path / "tiny"), "--family", "sd15"]
    made = subprocess.run(tiny, cwd=app, env=environment(), capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    listed = subprocess.run([python, "-m", "pip", "freeze"], env=environment(), capture_output=True, text=True).stdout
    assert not re.search(r"(?m)^(pytest|ruff|mypy|kfp)==", listed), "only what is needed to serve"
    done_before.parent.mkdir(exist_ok=True)
    done_before.write_text(listed)
    shutil.rmtree(folder)


def test_offline_takes_the_wheelhouse_alone(tmp_path: Path) -> None:
    """A package that the wheelhouse lacks is not fetched; one that it has is installed."""
    tree = tmp_path / "src"
    (tree / "image" / "wheelhouse").mkdir(parents=True)
    shutil.copy(INSTALL, tree / "image")
    script = tree / "image" / "install.sh"
    (tree / "requirements-base.txt").write_text("ftfy==6.3.1\n")
    env = {"OFFLINE": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    made = run(script, "dependencies", tmp_path / "one", **env)
    assert made.returncode != 0 and "No matching distribution" in made.stderr
    made = run(script, "wheels", tree / "image" / "wheelhouse")
    assert made.returncode == 0, made.stderr
    names = {path.name.split("-")[0] for path in (tree / "image" / "wheelhouse").iterdir()}
    assert names == {"ftfy", "wcwidth"}
    made = run(script, "dependencies", tmp_path / "two", **env)
    assert made.returncode == 0, made.stderr


def test_an_unknown_step_is_told(tmp_path: Path) -> None:
    made = run(INSTALL, "everything")
    assert made.returncode == 2 and "dependencies VENV" in made.stderr


def test_the_container_file() -> None:
    text = (ROOT / "Containerfile").read_text()
    assert image()["user"] == "1001" and image()["workdir"] == "/app"
    assert image()["env"]["HF_HUB_OFFLINE"] == "1"
    bases = re.findall(r"^FROM (\S+)", text, re.MULTILINE)
    outside = [base for base in bases if "." in base or "/" in base]
    assert outside and all(re.search(r":\d", base) for base in outside)
    last = text[text.index(" AS runtime") :]
    assert "pip install" not in text, "the steps are image/install.sh's"
    assert last.index("/opt/venv /opt/venv") < last.index("COPY runtime"), "dependencies before code"
    for word in ("name=", "version=", "summary=", "io.k8s.description=", "org.opencontainers.image.revision="):
        assert word in last


def test_make_builds_with_the_tag_of_git(tmp_path: Path) -> None:
    def dry(*arguments: str) -> str:
        done = subprocess.run(["make", "-n", *arguments], cwd=ROOT, capture_output=True, text=True, env=os.environ)
        assert done.returncode == 0, done.stderr
        return done.stdout

    tag = subprocess.run(["git", "describe", "--tags", "--always"], cwd=ROOT, capture_output=True, text=True).stdout
    online, offline = dry("build"), dry("build", "OFFLINE=1")
    assert f"-t diffusion-runtime:{tag.strip()}" in online and "latest" not in online
    assert "OFFLINE" not in online and all(w in offline for w in ("OFFLINE=1", "--network=none", "--pull=never"))
    assert "install.sh wheels" in dry("wheels") and "flash-attn-wheel" in dry("wheels")
    saved, loaded = dry("save", "TAG=v1"), dry("load", "TAG=v1")
    assert re.findall(r"\S+\.tar", saved) == re.findall(r"\S+\.tar", loaded)
