"""Which files of a listing a pipeline needs, and which listings are refused."""

from __future__ import annotations

import hashlib
import json

import pytest

from runtime.errors import StartupError
from runtime.storage.source import CHUNK, RemoteFile, checked_path, digest_of, select
from tests.storage.conftest import NEEDED

URI = "s3://bucket/model"


def chosen(files: dict[str, bytes]) -> dict[str, RemoteFile]:
    listing = [RemoteFile(path, len(data), hashlib.md5(data).hexdigest()) for path, data in files.items()]
    return {file.path: file for file in select(URI, listing, lambda file: files[file.path])}


@pytest.fixture
def files(model) -> dict[str, bytes]:
    """The model's files, the large ones cut short."""
    paths = (path for path in model.rglob("*") if path.is_file())
    return {path.relative_to(model).as_posix(): path.read_bytes()[:1000] for path in paths}


def refused(files: dict[str, bytes]) -> str:
    with pytest.raises(StartupError) as raised:
        chosen(files)
    assert "\n" not in str(raised.value) and str(raised.value).startswith(URI)
    return str(raised.value)


def test_what_is_needed(files):
    assert list(chosen(files)) == NEEDED
    files["generation_defaults.json"] = b"{}"
    files["vae/model.safetensors"] = b"the other stem"
    assert list(chosen(files)) == sorted([*NEEDED, "generation_defaults.json"])


def test_one_file_where_there_are_no_shards(files):
    for name in [name for name in files if "index" in name and name.startswith("transformer")]:
        del files[name]
    files["transformer/model.safetensors"] = b"x"
    found = chosen(files)
    assert "transformer/model.safetensors" in found
    assert not any("00001" in name for name in found)


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "model.pt", "model.pth", "x.ckpt", "x.pkl"])
def test_pickles_only(files, name):
    del files["vae/diffusion_pytorch_model.safetensors"]
    files[f"vae/{name}"] = b"x"
    assert f"vae/{name}" in refused(files)
    assert "pickles" in refused(files)


def test_a_variant_only(files):
    del files["vae/diffusion_pytorch_model.safetensors"]
    files["vae/diffusion_pytorch_model.fp16.safetensors"] = b"x"
    assert "fp16" in refused(files)


SHARD = "transformer/diffusion_pytorch_model-00002-of-00002.safetensors"
INDEX = "transformer/diffusion_pytorch_model.safetensors.index.json"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda f: f.pop(SHARD), f"{SHARD}: missing"),
        (lambda f: f.update({INDEX: b"{"}), f"{INDEX}: not valid JSON"),
        (lambda f: f.update({INDEX: b"{}"}), f"{INDEX}: names no shards"),
        (lambda f: f.update({INDEX: b'{"weight_map": {"a": "../x.safetensors"}}'}), "no name of a safetensors file"),
        (lambda f: f.update({INDEX: b'{"weight_map": {"a": "x.bin"}}'}), "no name of a safetensors file"),
        (lambda f: f.pop("model_index.json"), "not a diffusers model"),
        (lambda f: f.update({"model_index.json": b"[1]"}), "no object"),
        (lambda f: f.update({"model_index.json": b'{"../x": ["diffusers", "Y"]}'}), "no name of a component"),
        (lambda f: f.update({"model_index.json": b'{"..": ["diffusers", "Y"]}', "../x.json": b""}), "no name"),
        (lambda f: f.update({"model_index.json": b'{"unet": ["diffusers", "Y"]}'}), "unet: missing"),
        (lambda f: f.clear(), "nothing there"),
        (lambda f: [f.update({f"sub/{name}": f.pop(name)}) for name in list(f)], "one lies in 'sub'"),
        (lambda f: f.update({"MANIFEST.json": b"{}"}), "no list of files"),
        (
            lambda f: f.update({"MANIFEST.json": b'{"files": [{"path": "vae/config.json", "size": 77}]}'}),
            "vae/config.json: has 2 bytes and MANIFEST.json says 77",
        ),
        (
            lambda f: f.update(
                {"MANIFEST.json": b'{"files": [{"path": "vae/config.json", "size": 2, "sha256": "x"}]}'}
            ),
            "malformed",
        ),
    ],
)
def test_what_is_refused(files, change, said):
    change(files)
    assert said in refused(files)


EVIL = ["../../x.json", "a/../../x.json", "a//x.json", "./x.json", "a\\x.json", "a\nx.json", "\x1b[0m.json"]
EVIL += ["x" * 300 + ".json", "/".join(["abc"] * 400) + "/x.json", "\u202e.json"]


@pytest.mark.parametrize("name", EVIL)
def test_a_name_that_could_escape_is_refused(files, name):
    files[f"vae/{name}"] = b"{}"
    assert "no name that a model's file may have" in refused(files)


@pytest.mark.parametrize("name", ["../x.json", "/etc/passwd", "a\nb", "unused/../../x"])
def test_odd_names_that_nothing_asks_for_do_no_harm(files, name):
    files[name] = b"{}"
    assert list(chosen(files)) == NEEDED


def test_checked_path_lets_good_names_through():
    for name in ("a.json", "a/b c/ü.json", "..a/b..", "a/" + "x" * 255):
        assert checked_path(name, URI) == name


def test_a_manifest_gives_the_checksums(files):
    data = files["vae/config.json"]
    digest = hashlib.sha256(data).hexdigest()
    entry = {"path": "vae/config.json", "size": len(data), "sha256": digest, "chunks": [digest]}
    files["MANIFEST.json"] = json.dumps({"format": 1, "chunk_bytes": CHUNK, "files": [entry]}).encode()
    file = chosen(files)["vae/config.json"]
    assert (file.sha256, file.chunks) == (digest, (digest,))
    files["MANIFEST.json"] = json.dumps({"format": 1, "chunk_bytes": 1, "files": [entry]}).encode()
    assert chosen(files)["vae/config.json"].chunks == ()


def test_the_digest_follows_names_sizes_and_versions():
    file = RemoteFile("a", 1, "v")
    others = [RemoteFile("b", 1, "v"), RemoteFile("a", 2, "v"), RemoteFile("a", 1, "w")]
    assert len({digest_of([f]) for f in (file, *others)} | {digest_of([]), digest_of([file, file])}) == 6


def test_the_component_of_a_file():
    assert [RemoteFile(p, 0, "").component for p in ("a.json", "vae/a", "vae/b/a")] == ["", "vae", "vae"]
