"""Fixtures: an S3 server for the session, a proxy and a bucket for each test, models of random bytes."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from runtime import settings
from runtime.storage.options import StorageOptions
from tests.conftest import ROOT, clean_environment
from tests.storage.mirror import mirrored
from tests.storage.servers import FRESH, SECRET, Hub, Proxy, Store, hub_server, proxy_to, rclone

MIB = 2**20
WAIT_SECONDS = 120


def write_model(folder: Path, shards: int = 2, shard_bytes: int = 17 * MIB, seed: int = 1) -> Path:
    """A folder laid out as a pipeline, its weights random (the second shard has 1 MiB), with files that none needs."""
    generator = np.random.default_rng(seed)
    names = [f"diffusion_pytorch_model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    (folder / "transformer").mkdir(parents=True)
    for i, name in enumerate(names):
        data = generator.integers(0, 256, shard_bytes if i != 1 else MIB, dtype=np.uint8)
        save_file({f"layer{i}": data}, folder / "transformer" / name)
    index = {"metadata": {}, "weight_map": {f"layer{i}": name for i, name in enumerate(names)}}
    files: dict[str, str | bytes] = {
        "model_index.json": json.dumps(
            {
                "_class_name": "WanPipeline",
                "transformer": ["diffusers", "WanTransformer3DModel"],
                "vae": ["diffusers", "AutoencoderKLWan"],
                "tokenizer": ["transformers", "T5TokenizerFast"],
                "scheduler": ["diffusers", "UniPCMultistepScheduler"],
                "image_encoder": [None, None],
            }
        ),
        "transformer/config.json": "{}",
        "transformer/diffusion_pytorch_model.safetensors.index.json": json.dumps(index),
        "vae/config.json": "{}",
        "tokenizer/tokenizer_config.json": "{}",
        "tokenizer/spiece.model": random.Random(seed).randbytes(1000),
        "tokenizer/empty.txt": "",
        "tokenizer/chat/other.jinja": "{{ x }}",
        "scheduler/scheduler_config.json": "{}",
        # What no pipeline loads:
        "README.md": "about",
        "model_index.json.bak": "{",
        "original.safetensors": "x",
        "transformer/diffusion_pytorch_model.bin": "pickle",
        "transformer/diffusion_pytorch_model.fp16.safetensors": "half",
        "vae/flax_model.msgpack": "flax",
        "unused/config.json": "{}",
        "tokenizer/evil.py": "raise SystemExit",
    }
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content.encode() if isinstance(content, str) else content)
    save_file(
        {"w": generator.integers(0, 256, 100_000, dtype=np.uint8)}, folder / "vae/diffusion_pytorch_model.safetensors"
    )
    return folder


NEEDED = [
    "model_index.json",
    "scheduler/scheduler_config.json",
    "tokenizer/chat/other.jinja",
    "tokenizer/empty.txt",
    "tokenizer/spiece.model",
    "tokenizer/tokenizer_config.json",
    "transformer/config.json",
    "transformer/diffusion_pytorch_model-00001-of-00002.safetensors",
    "transformer/diffusion_pytorch_model-00002-of-00002.safetensors",
    "transformer/diffusion_pytorch_model.safetensors.index.json",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
]


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a model folder but the cache's own marker."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != "COMPLETE")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def needed(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in NEEDED}


@pytest.fixture(autouse=True)
def no_credentials_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 18 MiB in two shards, the first of two chunks. Not to be changed."""
    return write_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")  # no longer: with FRESH rclone keeps a core busy, asked or not
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    folder, real = tmp_path_factory.mktemp("s3"), os.environ.get("TEST_S3_ENDPOINT")
    with mirrored(folder, real) if real else rclone(folder, *FRESH) as store:
        yield store


@pytest.fixture
def bucket(s3: Store, tmp_path: Path) -> Path:
    """A bucket of the test's own: a folder; what is put there is an object."""
    folder = s3.folder / f"b-{abs(hash(str(tmp_path))):x}"
    folder.mkdir()
    return folder


@pytest.fixture
def proxy(s3: Store) -> Iterator[Proxy]:
    with proxy_to(s3.endpoint) as proxy:
        yield proxy


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub_server(tmp_path / "hub") as hub:
        yield hub


@pytest.fixture
def options(s3: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., StorageOptions]:
    """`options(CACHE_DIR=…)`: what the settings make of a data connection's variables and these."""

    def make(**changes: str | None) -> StorageOptions:
        environ = {**s3.environment, "CACHE_DIR": str(tmp_path / "cache"), **changes}
        environ = {name: value for name, value in environ.items() if value is not None}
        for name, value in environ.items():
            if name.startswith("AWS_") and not name.endswith("ENDPOINT"):
                monkeypatch.setenv(name, value)
        return settings.load([], environ).storage

    return make


@pytest.fixture
def fill(s3: Store, tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """`fill("s3://…", CACHE_DIR=…)`: a process that gets the model; killed in the end if it still runs."""
    started: list[subprocess.Popen[str]] = []

    def begin(uri: str, *before: str, user: int | None = None, **changes: str) -> subprocess.Popen[str]:
        environ = {
            **s3.environment,
            "CACHE_DIR": str(tmp_path / "cache"),
            "AWS_EC2_METADATA_DISABLED": "true",
            **changes,
        }
        process = subprocess.Popen(
            [*before, sys.executable, "-m", "tests.storage.fill", uri],
            cwd=ROOT,
            env=clean_environment(**environ),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            user=user,
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def uri(model, bucket) -> str:
    shutil.copytree(model, bucket / "m")
    return f"s3://{bucket.name}/m"


@pytest.fixture
def large(bucket) -> str:
    """A model of three shards of two chunks and a small one."""
    write_model(bucket / "large", shards=4)
    return f"s3://{bucket.name}/large"


def told(process: subprocess.Popen[str]) -> str:
    """The one line of a process that failed."""
    _, err = process.communicate(timeout=WAIT_SECONDS)
    (line,) = [line for line in err.splitlines() if not line.startswith("{")]
    assert process.returncode == 1 and line.startswith("diffusion-runtime: ") and SECRET not in err
    return line


def ended(process: subprocess.Popen[str]) -> Path:
    out, err = process.communicate(timeout=WAIT_SECONDS)
    assert process.returncode == 0, err
    assert SECRET not in err and "X-Amz-Signature" not in err
    return Path(out.splitlines()[0])
