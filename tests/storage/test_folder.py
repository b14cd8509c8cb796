"""A folder of this machine as a source: links in it are followed as loading follows them."""

from __future__ import annotations

import shutil

import pytest

from runtime.errors import StartupError
from runtime.storage.folder import Folder
from tests.storage.conftest import NEEDED


@pytest.fixture
def copy(model, tmp_path):
    shutil.copytree(model, tmp_path / "m")
    return tmp_path / "m"


def test_a_component_behind_a_link(copy, tmp_path):
    (copy / "vae").rename(tmp_path / "elsewhere")
    (copy / "vae").symlink_to(tmp_path / "elsewhere")
    assert [file.path for file in Folder(copy).files()] == NEEDED


def test_links_to_nowhere_and_in_circles_do_not_matter(copy):
    (copy / "README.md").unlink()
    (copy / "README.md").symlink_to("nowhere")
    (copy / "zz").symlink_to(copy)
    assert [file.path for file in Folder(copy).files()] == NEEDED


def test_weights_behind_a_link_to_nowhere_are_missing(copy):
    shard = copy / "transformer/diffusion_pytorch_model-00001-of-00002.safetensors"
    shard.unlink()
    shard.symlink_to("nowhere")
    with pytest.raises(StartupError, match=f"{shard}: missing, though"):
        Folder(copy).files()
