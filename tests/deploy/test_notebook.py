"""The notebook's cells, run one after the other against a live server; what a cell ends with is what it shows."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.conftest import ROOT, Serve

NOTEBOOK = ROOT / "notebooks" / "remote_inference.ipynb"


def run(cells: list[str], names: dict[str, Any]) -> list[Any]:
    """What each cell shows: the value of its last line, as in a notebook."""
    shown = []
    for number, source in enumerate(cells):
        tree = ast.parse(source, f"cell {number}")
        last = tree.body[-1]
        if isinstance(last, ast.Expr):
            tree.body.pop()
        exec(compile(tree, f"cell {number}", "exec"), names)
        if isinstance(last, ast.Expr):
            shown.append(eval(compile(ast.Expression(last.value), f"cell {number}", "eval"), names))
        else:
            shown.append(None)
    return shown


def test_every_cell_runs(serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve("sd15")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("INFER_ENDPOINT", server.http)
    notebook = json.loads(NOTEBOOK.read_text())
    code = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    names: dict[str, Any] = {"__name__": "__main__"}
    shown = run(code, names)
    names["session"].close()
    assert shown[1] == (200, {"name": "tiny", "ready": True}) or shown[1][0] == 200
    assert "num_inference_steps" in json.dumps(shown[2])
    pictures = [value for value in shown if isinstance(value, Image.Image)]
    assert len(pictures) == 2 and pictures[0].tobytes() != pictures[1].tobytes()
    assert any(isinstance(value, dict) and "predicted_seconds" in value for value in shown)
    with Image.open(tmp_path / "result.png") as saved:
        assert saved.tobytes() == pictures[0].tobytes()


def test_it_is_checked_in_without_outputs() -> None:
    notebook = json.loads(NOTEBOOK.read_text())
    for cell in notebook["cells"]:
        assert cell["cell_type"] != "code" or (cell["outputs"] == [] and cell["execution_count"] is None)
