"""The pipeline of pipelines/, run by KFP's local runner against a live server and a local object store.

KFP lives in an environment of its own (.cache, made on the first run): its pins are not the runtime's.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
import venv
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import av
import boto3
import pytest
from PIL import Image

from tests.conftest import ROOT, Serve, Server, clean_environment, free_ports

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
        "from components import contact_sheet, generate, generate_video_job, read_prompts, upload\n"
        f"local.init(local.SubprocessRunner(use_venv=False), pipeline_root={str(folder / 'root')!r})\n"
    )
    path = os.pathsep.join((str(python.parent), os.environ["PATH"]))
    return subprocess.run(
        [python, "-c", head + code],
        cwd=folder,
        env=environment(folder, PATH=path, **env),
        capture_output=True,
        text=True,
        timeout=240,
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
        deadline = time.monotonic() + 60
        while True:
            try:
                client.put_object(Bucket="my-storage", Key="prompts/prompts.csv", Body=PROMPTS.encode())
                break
            except Exception:
                assert time.monotonic() < deadline, (tmp_path / "store.log").read_text()
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
        store.wait(60)


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


# --- long videos


def video_step(server: str, fields: dict[str, Any], **more: Any) -> str:
    """Code of a pipeline of one step, and of a contact sheet of what it made."""
    return (
        "from kfp import dsl\n"
        "@dsl.pipeline\n"
        "def film(url: str) -> str:\n"
        f"    made = generate_video_job(service_url=url, fields={fields!r}, **{more!r})\n"
        "    contact_sheet(media=made.outputs['media'])\n"
        "    return made.outputs['Output']\n"
        f"print('JOB', film(url={server!r}).output)\n"
    )


def job_of(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("JOB ")]
    return line.removeprefix("JOB ")


def jobs(server: Server) -> list[dict[str, Any]]:
    listed: list[dict[str, Any]] = server.json("GET", "/v1/videos?limit=100")[1]["data"]
    return listed


FILM = {"size": "64x64", "num_inference_steps": 4, "num_frames": 5, "seed": 7}


def test_a_long_video_is_a_job_and_a_retry_finds_it(python: Path, serve: Serve, tmp_path: Path) -> None:
    server = serve("wan-ti2v-5b", JOB_TTL_S="86401")  # nobody else's jobs in it
    step = video_step(server.http, FILM, prompt="a red fox", name="../fox & co")
    done = local(python, tmp_path, step)
    job = job_of(done)
    assert f"job {job}: " in done.stdout
    (made,) = (tmp_path / "root").rglob("*.mp4")
    assert made.name == "_fox___co.mp4"
    with av.open(str(made)) as video:
        assert sum(1 for _ in video.decode(video=0)) == 5
    (told,) = json.loads((made.parent / "index.json").read_text())
    assert (told["file"], told["prompt"], told["seed"], told["width"]) == (made.name, "a red fox", 7, 64)
    assert (told["num_frames"], told["job"]) == (5, job) and told["model_revision"]
    assert any(made.name in page.read_text() for page in (tmp_path / "root").rglob("*sheet*") if page.is_file())
    (tmp_path / "again").mkdir()
    assert job_of(local(python, tmp_path / "again", step)) == job
    assert [entry["id"] for entry in jobs(server)] == [job], "drawn once"
    assert next((tmp_path / "again" / "root").rglob("*.mp4")).read_bytes() == made.read_bytes()
    refused = local(python, tmp_path, video_step(server.http, {**FILM, "num_frames": 6}, prompt="a red fox"))
    assert refused.returncode != 0 and "num_frames" in refused.stdout + refused.stderr


def test_a_video_that_takes_too_long_is_cancelled(python: Path, serve: Serve, tmp_path: Path) -> None:
    server = serve("wan-ti2v-5b", JOB_TTL_S="86402")
    long = {"size": "512x512", "num_inference_steps": 200, "num_frames": 81, "seed": 7}  # minutes
    done = local(python, tmp_path, video_step(server.http, long, prompt="a red fox", patience_s=3))
    text = done.stdout + done.stderr
    assert done.returncode != 0 and "cancelling job" in text and "not done after 3 s" in text
    deadline = time.monotonic() + 60
    while (entry := jobs(server)[0])["status"] != "failed":
        assert time.monotonic() < deadline, entry
        time.sleep(0.1)
    assert entry["error"]["code"] == "cancelled"
    (tmp_path / "short").mkdir()
    again = local(python, tmp_path / "short", video_step(server.http, FILM, prompt="a red fox"))
    assert job_of(again), "the service goes on"


class Shaky(BaseHTTPRequestHandler):
    """A service of jobs where everything that can break breaks once; `endless` jobs never end."""

    seen: list[tuple[str, str]]  # method and path, of POSTs the idempotency key
    endless: bool
    video = b"all of the video" * 1000

    def times(self) -> int:
        return self.seen.count(self.seen[-1])

    def do_POST(self) -> None:
        key = self.headers["Idempotency-Key"]
        self.rfile.read(int(self.headers["Content-Length"]))
        self.seen.append(("POST", key))
        assert (self.headers["Authorization"], self.headers["X-API-Key"]) == ("Bearer tok", "key-one")
        if self.times() == 1 and key.endswith("-0"):  # accepted, and the answer is lost
            self.close_connection = True
            return
        if self.times() == 2 and key.endswith("-0"):
            return self.answer(503, {"error": {"message": "restarting"}}, {"Retry-After": "1"})
        if key.endswith("-0"):  # what an earlier run of the step left
            return self.job("job0", "failed", error={"code": "cancelled", "message": "cancelled"})
        self.job("job1", "queued")

    def do_GET(self) -> None:
        self.seen.append(("GET", self.path))
        times = self.times()
        if self.path.endswith("/content"):
            if times == 1:  # cut off in the middle
                self.send_response(200)
                self.send_header("Content-Length", str(len(self.video)))
                self.end_headers()
                self.wfile.write(self.video[:1000])
                self.close_connection = True
                return
            return self.answer(200, self.video)
        if self.endless or times == 1:
            return self.job("job1", "in_progress", progress=10)
        if times == 2:
            self.close_connection = True
            return
        if times == 3:
            return self.answer(502, b"<html>a proxy's page</html>")
        if times == 4:
            return self.job("job1", "in_progress", progress=60, eta_seconds=1.5)
        self.job("job1", "completed", progress=100, expires_at=int(time.time()) + 3600)

    def do_DELETE(self) -> None:
        self.seen.append(("DELETE", self.path))
        self.answer(200, {"deleted": True})

    def job(self, name: str, status: str, **more: Any) -> None:
        told = {"id": name, "status": status, "progress": 0, "size": "64x48", "seed": 3, "error": None, **more}
        self.answer(200, told, {"openai-poll-after-ms": "50"})

    def answer(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def shaky(tmp_path: Path) -> Iterator[str]:
    Shaky.seen, Shaky.endless = [], False
    (tmp_path / "token").write_text("tok\n")
    (tmp_path / "keys").write_text("key-one\nkey-two\n")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Shaky)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_video_survives_what_breaks_once(python: Path, shaky: str, tmp_path: Path) -> None:
    keys = {"token_file": str(tmp_path / "token"), "api_key_file": str(tmp_path / "keys")}
    done = local(python, tmp_path, video_step(shaky, {}, prompt="a fox", **keys))
    assert job_of(done) == "job1"
    posts = [key for method, key in Shaky.seen if method == "POST"]
    assert [key.rsplit("-", 1)[1] for key in posts] == ["0", "0", "0", "1"], "a new job only for one that has failed"
    assert len({key.rsplit("-", 1)[0] for key in posts}) == 1
    assert not [path for method, path in Shaky.seen if method == "DELETE"]
    (made,) = (tmp_path / "root").rglob("video.mp4")
    assert made.read_bytes() == Shaky.video and not list(made.parent.glob("*.part"))
    for line in ("job job1: in_progress 10 %", "job job1: in_progress 60 %, 2 s to go", "job job1: completed 100 %"):
        assert line in done.stdout
    assert "tok" not in done.stdout.replace("token", "") and "key-one" not in done.stdout


def test_a_step_that_is_stopped_cancels_its_job(python: Path, shaky: str, tmp_path: Path) -> None:
    """The function by itself, as KFP's executor calls it in a pod."""
    Shaky.endless = True
    code = (
        "from types import SimpleNamespace\nfrom components import generate_video_job\n"
        f"media = SimpleNamespace(path={str(tmp_path / 'media')!r})\n"
        f"generate_video_job.python_func('a fox', media, {shaky!r}, token_file={str(tmp_path / 'token')!r},\n"
        f"    api_key_file={str(tmp_path / 'keys')!r})\n"
    )
    step = subprocess.Popen([python, "-c", code], env=environment(tmp_path), stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while ("GET", "/v1/videos/job1") not in Shaky.seen:
        assert time.monotonic() < deadline and step.poll() is None
        time.sleep(0.05)
    step.send_signal(signal.SIGTERM)
    said, _ = step.communicate(timeout=60)
    assert step.returncode == 1 and "cancelling job job1" in said
    assert [path for method, path in Shaky.seen if method == "DELETE"] == ["/v1/videos/job1"]
