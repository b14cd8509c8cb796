"""docs/deploy.md names flags, files and make targets that exist, and its sizes come from where it says."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest

from tests.conftest import ROOT

TEXT = (ROOT / "docs" / "deploy.md").read_text()


def test_flags_and_targets_exist() -> None:
    setup = (ROOT / "setup.sh").read_text()
    makefile = (ROOT / "Makefile").read_text()
    commands = re.sub(r"\\\n\s*", "", TEXT)
    for line in re.findall(r"\./setup\.sh ([^\n`]*)", commands):
        for flag in re.findall(r"--[a-z-]+", line):
            assert f" {flag} " in setup or f"{flag})" in setup, flag
    for target in re.findall(r"\bmake ([a-z][a-z0-9-]+)", TEXT):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE) or target in ("your", "a"), target


def test_files_exist() -> None:
    for name in re.findall(r"`((?:templates|pipelines|tests|image|notebooks|docs)/[\w./-]+\.\w+)`", TEXT):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"`([\w-]+\.yaml)`", TEXT):
        assert (ROOT / "templates" / name).exists(), name
    for name in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert (ROOT / "docs" / name).exists(), name


def test_the_symptoms_that_were_asked_for() -> None:
    for symptom in ("restarts while it loads", "OOMKilled, no log", "504 after 30 s", "Edits fail", "version conflict"):
        assert symptom in TEXT
    assert "No module named 'torch'" in TEXT and "moving image tag" in TEXT


def test_sizes_come_from_the_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("sizing", ROOT / "docs" / "sizing.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    entry = {"model": "GLM-Image", "gpu": "NVIDIA H200", "what": "1024x1024", "seconds": 105.2, "cold_start_s": 31}
    (tmp_path / "x.json").write_text(json.dumps({"sizing": [entry]}))
    found = module.measured(tmp_path)
    assert found == [entry]
    monkeypatch.setattr(module, "measured", lambda: found)
    (glm,) = [line for line in module.sizing().splitlines() if line.startswith("| GLM-Image")]
    assert "| not measured | not measured | 31 s | 105.2 s (1024x1024, NVIDIA H200) |" in glm
    assert module.sizing().count("not measured") == 2 + 4 * 4
