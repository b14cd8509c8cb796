"""Every example of docs/api.md runs against a real server; the docs' tables are what the code says; the demo works."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import av
import pytest
from PIL import Image

from tests.conftest import ROOT, Serve, clean_environment

API = ROOT / "docs" / "api.md"
EXAMPLES = re.findall(r"```(sh|python)( video)?\n(.*?)```", API.read_text(), re.DOTALL)


@pytest.mark.parametrize(("language", "video", "code"), EXAMPLES, ids=[f"{i}-{e[0]}" for i, e in enumerate(EXAMPLES)])
def test_example_of_the_api_page(serve: Serve, tmp_path: Path, language: str, video: str, code: str) -> None:
    server = serve("wan-ti2v-5b" if video else "sd15")
    code = code.replace("localhost:8080", server.http.removeprefix("http://")).replace("localhost:8081", server.grpc)
    command = ["bash", "-euo", "pipefail", "-c", code] if language == "sh" else [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=clean_environment(), capture_output=True, timeout=240)
    assert done.returncode == 0, done.stderr.decode()
    if language == "sh":
        answer = json.loads(done.stdout)
        expected = re.search(r"^# (\{.*\})$", code, re.MULTILINE)
        if expected:
            assert answer == json.loads(expected.group(1))
        else:
            assert answer.keys() & {"predictions", "outputs", "data", "status"}
    elif video:
        with av.open(str(tmp_path / "fox.mp4")) as clip:
            assert sum(1 for _ in clip.decode(video=0)) == 25
    else:
        pictures = list(tmp_path.glob("*.png"))
        assert pictures, "the example saved no picture"
        for picture in pictures:
            with Image.open(picture) as image:
                assert image.size == (64, 64)


def test_there_are_examples_of_each_protocol() -> None:
    text = "".join(code for *_, code in EXAMPLES)
    words = (
        ":predict",
        "/infer",
        "tritonclient.http",
        "tritonclient.grpc",
        "images.generate",
        "videos.create_and_poll",
    )
    assert all(word in text for word in (*words, "respond-async"))


def test_tables_in_the_docs_are_up_to_date() -> None:
    done = subprocess.run([sys.executable, "docs/generate.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_demo_leaves_a_picture_and_a_video(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "runtime.demo", "--output", str(tmp_path / "out")],
        cwd=tmp_path,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    picture = Image.open(io.BytesIO((tmp_path / "out" / "glm-image.png").read_bytes()))
    picture.load()
    assert picture.size == (256, 256)
    with av.open(str(tmp_path / "out" / "wan-t2v-a14b.mp4")) as video:
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
        assert video.streams.video[0].average_rate == 16
    assert len(frames) == 33 and frames[0].shape == (256, 256, 3)
    assert str(tmp_path / "out" / "glm-image.png") in done.stdout
