"""Getting a model from the Hub: revisions, tokens, redirects that expire, and what offline means.

The Hub is a stand-in, a small HTTP server of the tests: there is no other to talk to.
"""

from __future__ import annotations

import shutil
from contextlib import closing

import pytest
from huggingface_hub import constants

from runtime.errors import StartupError
from runtime.storage import fetch as fetch_module
from runtime.storage.fetch import read_whole
from runtime.storage.hub import parse
from runtime.storage.registry import open_source, resolve
from tests.storage.conftest import NEEDED, content, needed

SHARD = "transformer/diffusion_pytorch_model-00001-of-00002.safetensors"


@pytest.fixture
def at(model, hub, options):
    shutil.copytree(model, hub.folder / "org/tiny")
    return lambda **changes: options(HF_ENDPOINT=hub.url, **changes)


def refused(uri, options) -> str:
    with pytest.raises(StartupError) as raised:
        resolve(uri, options)
    assert "\n" not in str(raised.value) and "t0ken" not in str(raised.value) and "SIGNED" not in str(raised.value)
    return str(raised.value)


def test_the_commit_is_the_revision_and_weights_have_checksums(at, hub):
    with closing(open_source("hf://org/tiny", at())) as source:
        assert source.revision == hub.commit and source.uri == "hf://org/tiny"
        weights = [file for file in source.files() if file.path.endswith(".safetensors")]
        assert len(weights) == 3 and all(file.sha256 for file in weights)


def test_a_token_goes_to_the_hub_and_not_to_its_store(at, hub, model):
    hub.token = "t0ken"
    assert "HF_TOKEN may not see it" in refused("hf://org/tiny", at())
    assert content(resolve("hf://org/tiny", at(HF_TOKEN="t0ken"))) == needed(model)
    assert not hub.tokens_at_the_store


def test_an_address_that_expires_is_asked_for_again(at, hub):
    with closing(open_source("hf://org/tiny", at())) as source:
        (file,) = (file for file in source.files() if file.path == SHARD)
        source.read(file, 0, memoryview(bytearray(10)))
        asked = sum(count for path, count in hub.requests.items() if "/resolve/" in path and path.endswith(SHARD))
        source.read(file, 10, memoryview(bytearray(10)))
        assert sum(n for path, n in hub.requests.items() if "/resolve/" in path and path.endswith(SHARD)) == asked
        hub.expire()
        buffer = bytearray(100)
        source.read(file, 20, memoryview(buffer))
        assert bytes(buffer) == (hub.folder / "org/tiny" / SHARD).read_bytes()[20:120]


def test_a_wrong_checksum_ends_the_start(at, hub, monkeypatch, tmp_path):
    """The weights are replaced after they were listed: the sha256 of the listing does not fit."""
    with closing(open_source("hf://org/tiny", at())) as source:
        files = {file.path: file for file in source.files()}
        path = hub.folder / "org/tiny/vae/diffusion_pytorch_model.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        monkeypatch.setattr(fetch_module, "LONGEST_WAIT", 0.01)
        with pytest.raises(StartupError, match=r"vae/diffusion_pytorch_model.*: wrong checksum"):
            read_whole(source, files["vae/diffusion_pytorch_model.safetensors"])


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("hf://org/none", "no such model"),
        ("org/none", "no such model"),
        ("hf://org/tiny@v9", "no such revision"),
        ("hf://org", "is no hf://owner/model"),
        ("hf://org/tiny/transformer", "is no hf://owner/model"),
        ("hf://org/tiny@", "is no hf://owner/model"),
        ("hf://org/../x", "is no hf://owner/model"),
        ("hf://org/ti ny", "is no hf://owner/model"),
    ],
)
def test_what_the_hub_has_not(uri, said, at):
    assert said in refused(uri, at())


def test_a_hub_that_is_not_there(at, options, monkeypatch):
    monkeypatch.setattr(fetch_module, "LONGEST_WAIT", 0.01)
    assert "check HF_ENDPOINT" in refused("hf://org/tiny", options(HF_ENDPOINT="http://127.0.0.1:9"))


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
@pytest.mark.parametrize("uri", ["hf://org/tiny", "org/tiny"])
def test_offline_is_refused_with_a_line_unless_it_is_cached(variable, uri, at, hub, model):
    assert "HF_HUB_OFFLINE is set and no copy is cached" in refused(uri, at(**{variable: "1"}))
    assert not hub.requests
    folder = resolve(uri, at())
    asked = sum(hub.requests.values())
    assert resolve(uri, at(**{variable: "1"})) == folder
    assert sum(hub.requests.values()) == asked


def test_the_hubs_own_cache_is_used_where_it_holds_the_commit(at, hub, model, monkeypatch, tmp_path):
    snapshot = tmp_path / "hf/models--org--tiny/snapshots" / hub.commit
    shutil.copytree(model, snapshot)
    (tmp_path / "hf/models--org--tiny/refs").mkdir()
    (tmp_path / "hf/models--org--tiny/refs/main").write_text(hub.commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    assert resolve("hf://org/tiny", at()) == snapshot
    assert resolve("org/tiny", at(HF_HUB_OFFLINE="1")) == snapshot
    (snapshot / "vae/config.json").unlink()
    assert sorted(content(resolve("hf://org/tiny", at()))) == NEEDED


def test_parse():
    assert parse("hf://a/b") == ("a/b", None)
    assert parse("hf://a/b@refs/pr/1") == ("a/b", "refs/pr/1")
    assert parse("hf://a/b:v1") == ("a/b", "v1")
