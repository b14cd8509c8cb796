"""The pipeline of pipelines/, run by KFP's local runner against a live server and a local object store.

KFP lives in an environment of its own (.cache, made on the first run): its pins are not the runtime's.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import threading
import time
import venv
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import boto3
import pytest
from PIL import Image

from tests.conftest import ROOT, Serve, clean_environment, free_ports

PIPELINES = ROOT / "pipelines"
PROMPTS = """\
prompt,negative_prompt,key,width,height,seed
a red fox,blurry,dogs/fox one.png,64,64,7
"a wolf, at night",,,64,96,
2026,,,64,64,5
"""


@pytest.fixture(scope="session")
def python() -> Path:
    """The interpreter of an environment with pipelines/requirements.txt."""
    wanted = (PIPELINES / "requirements.txt").read_bytes() + sys.version.encode()
    folder = ROOT / ".cache" / f"pipelines-{hashlib.sha256(wanted).hexdigest()[:12]}"
    done = folder / "complete"
    if not done.exists():
        venv.create(folder, with_pip=True, clear=True)
        install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r"]
        subprocess.run([folder / "bin" / "python", *install, PIPELINES / "requirements.txt"], check=True)
        done.touch()
    return folder / "bin" / "python"


def environment(folder: Path, **more: str) -> dict[str, str]:
    kept = {k: v for k, v in clean_environment().items() if k not in ("PYTHONPATH", "PYTHONWARNINGS")}
    return {**kept, "HOME": str(folder), "PYTHONPATH": str(PIPELINES), "PYTHONDONTWRITEBYTECODE": "1", **more}


def local(python: Path, folder: Path, code: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run `code` with KFP's local runner, each step a process of its own."""
    head = (
        "from kfp import local\n"
        "from components import contact_sheet, generate, read_prompts, upload\n"
        f"local.init(local.SubprocessRunner(use_venv=False), pipeline_root={str(folder / 'root')!r})\n"
    )
    path = os.pathsep.join((str(python.parent), os.environ["PATH"]))
    return subprocess.run(
        [python, "-c", head + code],
        cwd=folder,
        env=environment(folder, PATH=path, **env),
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_compiled_pipeline_is_up_to_date(python: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [python, PIPELINES / "draw_prompts.py", "--check"], env=environment(tmp_path), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_example_from_prompts_to_contact_sheet(python: Path, serve: Serve, tmp_path: Path) -> None:
    server = serve("sd15")
    (port,) = free_ports(1)
    (tmp_path / "store" / "my-storage").mkdir(parents=True)
    env = {**os.environ, "RCLONE_CONFIG": str(tmp_path / "rclone.conf"), "HOME": str(tmp_path)}
    rclone = str(Path(sys.executable).parent / "rclone")
    command = [
        rclone,
        "serve",
        "s3",
        "--addr",
        f"127.0.0.1:{port}",
        "--auth-key",
        "key,secret",
        str(tmp_path / "store"),
    ]
    with (tmp_path / "store.log").open("wb") as log:
        store = subprocess.Popen(command, env=env, stdout=log, stderr=log)
    keys = {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_S3_ENDPOINT": f"http://127.0.0.1:{port}",
        "AWS_S3_BUCKET": "my-storage",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    client = boto3.client(
        "s3",
        endpoint_url=keys["AWS_S3_ENDPOINT"],
        aws_access_key_id="key",
        aws_secret_access_key="secret",
        region_name="us-east-1",
    )
    try:
        for _ in range(100):
            try:
                client.put_object(Bucket="my-storage", Key="prompts/prompts.csv", Body=PROMPTS.encode())
                break
            except Exception:
                time.sleep(0.1)
        code = (
            "from draw_prompts import draw_prompts\n"
            f"url, defaults = {server.http!r}, {{'num_inference_steps': 2}}\n"
            "task = draw_prompts(service_url=url, defaults=defaults, title='Foxes & co')\n"
            "print('OUTPUT', task.output)\n"
        )
        done = local(python, tmp_path, code, **keys)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "OUTPUT s3://my-storage/results/draw-prompts/index.html" in done.stdout
        listed = client.list_objects_v2(Bucket="my-storage", Prefix="results/")["Contents"]
        names = {entry["Key"].removeprefix("results/draw-prompts/") for entry in listed}
        assert names == {"index.html", "index.json", "dogs/fox_one.png", "0002-a-wolf-at-night.png", "0003-2026.png"}

        def read(name: str) -> bytes:
            content: bytes = client.get_object(Bucket="my-storage", Key=f"results/draw-prompts/{name}")["Body"].read()
            return content

        told = json.loads(read("index.json"))
        assert [(r["prompt"], r["width"], r["height"]) for r in told] == [
            ("a red fox", 64, 64),
            ("a wolf, at night", 64, 96),
            ("2026", 64, 64),
        ]
        assert told[0]["seed"] == 7 and told[0]["num_inference_steps"] == 2 and "b64" not in json.dumps(told)
        with Image.open(io.BytesIO(read("0002-a-wolf-at-night.png"))) as picture:
            assert picture.size == (64, 96)
        page = read("index.html").decode()
        assert page.count("data:image/jpeg;base64,") == 3 and 'href="dogs/fox_one.png"' in page
        assert "Foxes &amp; co" in page and "a wolf, at night" in page
    finally:
        client.close()
        store.terminate()
        store.wait(10)


class Busy(BaseHTTPRequestHandler):
    """A service that breaks the connection, is loading, is full, and then draws; one prompt it refuses."""

    seen: list[tuple[float, str, dict[str, Any]]]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        (instance,) = body["instances"]
        self.seen.append((time.monotonic(), self.headers["Idempotency-Key"], instance))
        asked = sum(key == self.headers["Idempotency-Key"] for _, key, _ in self.seen)
        if instance["prompt"] == "bad":
            return self.answer(400, {"error": "instances[0]: width 63 is not a multiple of 8"})
        if asked == 1:
            self.close_connection = True
            return None
        if asked in (2, 3):
            return self.answer(503 if asked == 2 else 429, {"error": "busy"}, {"Retry-After": "1"})
        picture = {"format": "PNG", "b64": "aGk="}
        return self.answer(200, {"predictions": [{"prompt": instance["prompt"], "image": picture}]})

    def answer(self, status: int, body: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def busy() -> Iterator[str]:
    Busy.seen = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Busy)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_waits_as_told_with_one_key_and_names_what_was_refused(python: Path, busy: str, tmp_path: Path) -> None:
    (tmp_path / "prompts.csv").write_text("prompt,seed\nbad,1\ngood,2\n")
    code = (
        "from kfp import dsl\n"
        "@dsl.pipeline\n"
        "def one(url: str):\n"
        f"    source = dsl.importer(artifact_uri={str(tmp_path / 'prompts.csv')!r}, artifact_class=dsl.Dataset)\n"
        "    generate(prompts=source.output, service_url=url)\n"
        f"one(url={busy!r})\n"
    )
    done = local(python, tmp_path, code)
    assert done.returncode != 0, "a refused line fails the step"
    text = done.stdout + done.stderr
    assert "1 of 2 lines were not drawn" in text and "width 63 is not a multiple of 8" in text
    good = [(when, key) for when, key, instance in Busy.seen if instance["prompt"] == "good"]
    assert len(good) == 4 and len({key for _, key in good}) == 1
    assert good[2][0] - good[1][0] >= 1 and good[3][0] - good[2][0] >= 1
    assert len([1 for _, _, instance in Busy.seen if instance["prompt"] == "bad"]) == 1
    (made,) = (tmp_path / "root").rglob("0002-good.png")
    assert made.read_bytes() == b"hi", "what was drawn is kept"
