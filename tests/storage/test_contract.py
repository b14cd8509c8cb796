"""One contract for all schemes: the same model through each is the same files, and what is not there is one line."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import pytest

from runtime.errors import StartupError
from runtime.storage import local
from runtime.storage.registry import SCHEMES, open_source, resolve
from tests.storage.conftest import NEEDED, content, needed

CASES = [
    "path",
    "relative",
    "file",
    "pvc",
    "pvc whole",
    "s3",
    "s3 slash",
    "s3 default bucket",
    "hf",
    "hf bare",
    "hf @",
    "hf :",
]


@pytest.fixture
def named(request, model, bucket, hub, options, tmp_path, monkeypatch):
    """(MODEL_ID, options) of the model in the way that the test asks for."""
    case = request.param
    monkeypatch.setattr(local, "CLAIM_MOUNTS", (str(tmp_path / "mnt/pvc"), str(tmp_path / "mnt/models")))
    if case.startswith("s3"):
        shutil.copytree(model, bucket / "org/tiny")
    elif case.startswith("hf"):
        shutil.copytree(model, hub.folder / "org/tiny")
    elif case == "pvc":
        shutil.copytree(model, tmp_path / "mnt/pvc/org/tiny")
    elif case == "pvc whole":
        shutil.copytree(model, tmp_path / "mnt/models")
    monkeypatch.chdir(model.parent)
    names = {
        "path": str(model),
        "relative": "tiny",
        "file": f"file://{model}",
        "pvc": "pvc://claim/org/tiny",
        "pvc whole": "pvc://claim/org/tiny",
        "s3": f"s3://{bucket.name}/org/tiny",
        "s3 slash": f"S3://{bucket.name}/org/tiny//",
        "s3 default bucket": "s3:///org/tiny",
        "hf": "hf://org/tiny",
        "hf bare": "org/tiny",
        "hf @": "hf://org/tiny@v1",
        "hf :": "hf://org/tiny:v1",
    }
    return names[case], options(HF_ENDPOINT=hub.url, AWS_S3_BUCKET=bucket.name)


@pytest.mark.parametrize("named", CASES, indirect=True)
def test_the_same_files_through_every_scheme(named, model):
    folder = resolve(*named)
    found = content(folder)
    assert {name: found[name] for name in NEEDED} == needed(model)
    assert folder.is_absolute()
    if named[0].partition("://")[0].lower() in ("s3", "hf") or named[0] == "org/tiny":
        assert sorted(found) == sorted(NEEDED)  # nothing else is fetched
        with contextlib.closing(open_source(*named)) as source:
            files = source.files()
        assert [file.path for file in files] == sorted(NEEDED)
        assert [file.size for file in files] == [len(found[file.path]) for file in files]
        assert source.revision and resolve(*named) == folder
    else:
        assert open_source(*named) == folder


def test_every_scheme_is_in_the_contract():
    told = {case.split()[0] for case in CASES}
    assert set(SCHEMES) - {""} <= told


@pytest.mark.parametrize("model_id", ["pvc://claim/none", "pvc://claim", "pvc:///x", "pvc://claim/../../etc"])
def test_a_claim_that_is_not_mounted(model_id):
    with pytest.raises(StartupError, match="pvc://") as raised:
        resolve(model_id)
    assert "\n" not in str(raised.value)


def test_a_hub_id_never_hides_a_folder(tmp_path, monkeypatch):
    (tmp_path / "org/tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve("org/tiny") == Path.cwd() / "org/tiny"
