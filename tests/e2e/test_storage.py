"""A server whose model comes from S3: the folder's picture, progress while it downloads, one line where it fails."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import READY_SECONDS, Serve, Server
from tests.e2e.test_startup import ends_with, wait_live
from tests.storage.servers import FRESH, SECRET, Fault, Proxy, Store, proxy_to, rclone

WANTED = {"prompt": "a fox", "num_inference_steps": 2, "seed": 5, "width": 64, "height": 64}


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory, tiny_models: Path) -> Iterator[Store]:
    with rclone(tmp_path_factory.mktemp("s3"), *FRESH) as store:
        shutil.copytree(tiny_models / "sd15", store.folder / "models/sd15")
        yield store


@pytest.fixture
def proxy(s3: Store) -> Iterator[Proxy]:
    with proxy_to(s3.endpoint) as proxy:
        yield proxy


@pytest.fixture
def begin(start: Callable[..., Server], s3: Store, proxy: Proxy, tmp_path: Path) -> Callable[..., Server]:
    """`begin("sd15")`: a server on that prefix of the bucket, through the proxy."""

    def run(prefix: str, **changes: str) -> Server:
        environment = {"CACHE_DIR": str(tmp_path / "cache"), "AWS_EC2_METADATA_DISABLED": "true", **s3.environment}
        environment |= {"AWS_S3_ENDPOINT": proxy.url, "AWS_S3_BUCKET": "models", "LOAD_MODE": "cached", **changes}
        return start("unused", "--model_id", f"s3:///{prefix}", **environment)

    return run


def picture(server: Server) -> str:
    server.wait_ready()
    return server.predict(WANTED)[0]["image"]["b64"]


def test_the_same_picture_as_from_the_folder(begin: Callable[..., Server], serve: Serve, proxy: Proxy) -> None:
    server = begin("sd15")
    assert picture(server) == picture(serve("sd15"))
    assert server.stop() == 0
    assert proxy.count(".safetensors") and SECRET not in server.log.read_text()
    proxy.reset()
    again = begin("sd15")
    again.wait_ready()
    assert proxy.count(".safetensors") == 0  # from the cache
    assert again.stop() == 0


def test_the_readiness_body_tells_how_far_the_download_is(begin: Callable[..., Server], proxy: Proxy) -> None:
    proxy.faults = [Fault("hold", "unet/diffusion")]
    server = begin("sd15")
    wait_live(server)
    deadline = time.monotonic() + READY_SECONDS
    while not (told := server.json("GET", "/v2/models/tiny/ready")[1].get("error", "")).startswith("downloading, "):
        assert server.process.poll() is None and time.monotonic() < deadline, f"{told}\n{server.log.read_text()}"
        time.sleep(0.02)
    assert "%: " in told and " GiB, " in told and "MiB/s" in told
    proxy.release.set()
    server.wait_ready()
    assert server.stop() == 0
    lines = [json.loads(line) for line in server.log.read_text().splitlines() if line.startswith("{")]
    (done,) = [line for line in lines if line["message"].startswith("downloaded s3://models/sd15")]
    assert done["bytes"] == done["total_bytes"] > 0 and "mib_per_s" in done


@pytest.mark.parametrize(
    ("prefix", "changes", "said"),
    [
        ("none", {}, "s3://models/none: nothing there"),
        ("sd15", {"AWS_S3_BUCKET": "other"}, "no such bucket"),
        ("sd15", {"AWS_SECRET_ACCESS_KEY": "wrong-secret"}, "AWS_SECRET_ACCESS_KEY"),
        ("sd15", {"STORAGE_CONFIG": "{"}, "STORAGE_CONFIG: not valid JSON"),
        ("sd15", {"CACHE_DIR": "/proc/none"}, "CACHE_DIR"),
    ],
)
def test_what_fails_ends_with_one_line(
    begin: Callable[..., Server], prefix: str, changes: dict[str, str], said: str
) -> None:
    server = begin(prefix, **changes)
    status, lines = ends_with(server)
    assert status == 1
    assert len(lines) == 1 and lines[0].startswith("diffusion-runtime: ") and said in lines[0], lines
    log = server.log.read_text()
    assert SECRET not in log and "wrong-secret" not in log and "X-Amz-Signature" not in log
