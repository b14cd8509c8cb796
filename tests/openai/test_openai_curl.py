"""The curl lines of others' documentation, run by real curl: the prior GLM-Image container's README, SGLang's and
vLLM-Omni's pages. Host and port are this server's; models go by the names in the lines, as aliases."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path

import pytest

from tests.conftest import Serve, Server
from tests.openai.clients import picture, shell, size_of, until
from tests.openai.test_openai_videos import frames_of

ALIASES = "zai-org/GLM-Image,xxx,Qwen/Qwen-Image"
SAVE = (
    "python3 -c \"import sys, json, base64; open('{}', 'wb').write("
    "base64.b64decode(json.load(sys.stdin)['data'][0]['b64_json']))\""
)
KEY = "sk-proj-1234567890"


@pytest.fixture(scope="module")
def glm(serve: Serve) -> Server:
    return serve("glm-image", MODEL_ALIASES=ALIASES)


@pytest.fixture(scope="module")
def wan(serve: Serve) -> Server:
    return serve("wan-t2v-a14b")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the files that the lines name."""
    for name in ("cond.jpg", "xx.png", "local_input_image.png", "input.png"):
        (tmp_path / name).write_bytes(picture(form="JPEG" if name.endswith("jpg") else "PNG"))
    return tmp_path


def run(server: Server, line: str, folder: Path) -> bytes:
    for program in ("curl", "jq"):
        if f"{program} " in line and shutil.which(program) is None:
            pytest.skip(f"this line needs {program}")
    for port in (30000, 30010, 8000, 8091):
        line = line.replace(f"http://localhost:{port}", server.http)
    return shell(line, folder)


# --- the prior container's README


def test_prior_text_to_image(glm: Server, folder: Path) -> None:
    line = """curl http://localhost:30000/v1/images/generations \\
  -H "Content-Type: application/json" \\
  -d '{
    "prompt": "A beautiful sunset over mountains",
    "size": "1024x1024",
    "response_format": "b64_json"
  }' | """ + SAVE.format("output.png")
    run(glm, line, folder)
    assert size_of((folder / "output.png").read_bytes()) == (1024, 1024)


def test_prior_image_to_image(glm: Server, folder: Path) -> None:
    line = """curl -s -X POST "http://localhost:30000/v1/images/edits" \\
  -F "model=zai-org/GLM-Image" \\
  -F "image=@cond.jpg" \\
  -F "prompt=Replace the background of the snow forest with an underground station featuring an automatic escalator." \\
  -F "response_format=b64_json" \\
  | """ + SAVE.format("output_i2i.png")
    run(glm, line, folder)
    assert size_of((folder / "output_i2i.png").read_bytes()) == (64, 64)


def test_prior_presets(glm: Server, folder: Path) -> None:
    """The fields of its table of presets, with the sizes of a laptop."""
    for size, steps, guidance in (("64x64", 20, 1.0), ("96x96", 50, 1.5), ("128x128", 100, 2.0)):
        body = {"prompt": "a knight", "size": size, "num_inference_steps": steps, "guidance_scale": guidance}
        run(glm, f"curl -sf http://localhost:30000/v1/images/generations -d '{json.dumps(body)}'", folder)


def test_prior_video(serve: Serve, folder: Path) -> None:
    """Its own documentation of /v1/video/generations, JSON and multipart; smaller and shorter."""
    body = (
        '{"model": "tiny", "prompt": "A cat walks", "size": "96x64", "num_frames": 17, "fps": 16, '
        '"num_inference_steps": 4, "guidance_scale": 5.0, "seed": 42, "response_format": "b64_json"}'
    )
    line = (
        "curl http://localhost:30000/v1/video/generations -H 'Content-Type: application/json' "
        f"-d '{body}' | {SAVE.format('video.mp4')}"
    )
    run(serve("wan-t2v-a14b"), line, folder)
    assert frames_of((folder / "video.mp4").read_bytes()) == (17, 96, 64, 16.0)
    line = """curl -X POST http://localhost:30000/v1/video/generations -F "image=@input.png" -F "prompt=it moves" \\
  -F "num_frames=17" -F "fps=16" -F "num_inference_steps=4" -F "size=96x64" | """ + SAVE.format("moved.mp4")
    run(serve("wan-i2v-a14b"), line, folder)
    assert frames_of((folder / "moved.mp4").read_bytes()) == (17, 96, 64, 16.0)


def test_prior_models_and_health(glm: Server, folder: Path) -> None:
    assert json.loads(run(glm, "curl -s http://localhost:30000/health", folder)) == {"status": "ok"}
    assert json.loads(run(glm, "curl -s http://localhost:30000/v1/models", folder))["data"][0]["id"] == "tiny"


# --- SGLang


def test_sglang_create_an_image(glm: Server, folder: Path) -> None:
    line = """curl -sS -X POST "http://localhost:30010/v1/images/generations" \\
  -H "Content-Type: application/json" \\
  -H "Authorization: Bearer sk-proj-1234567890" \\
  -d '{
        "prompt": "A calico cat playing a piano on stage",
        "size": "1024x1024",
        "n": 1,
        "response_format": "b64_json"
      }'"""
    told = json.loads(run(glm, line, folder))
    assert size_of(base64.b64decode(told["data"][0]["b64_json"])) == (1024, 1024)


def test_sglang_edit_an_image(glm: Server, folder: Path) -> None:
    """The page's url=image_url.jpg stands for an address; a data URL, in quotes for curl, needs no network."""
    address = "data:image/png;base64," + base64.b64encode(picture("blue")).decode()
    for response_format in ("b64_json", "url"):
        line = f"""curl -sS -X POST "http://localhost:30010/v1/images/edits" \\
  -H "Authorization: Bearer sk-proj-1234567890" \\
  -F "image=@local_input_image.png" \\
  -F 'url="{address}"' \\
  -F "prompt=A calico cat playing a piano on stage" \\
  -F "size=1024x1024" \\
  -F "response_format={response_format}" """
        told = json.loads(run(glm, line, folder))
        if response_format == "url":
            data = shell(f"curl -sS -L '{told['data'][0]['url']}' -H 'Authorization: Bearer {KEY}'", folder)
        else:
            data = base64.b64decode(told["data"][0]["b64_json"])
        assert size_of(data) == (1024, 1024)


def test_sglang_videos(wan: Server, folder: Path) -> None:
    """Create (with the size of a laptop), list, download."""
    line = """curl -sS -X POST "http://localhost:30010/v1/videos" \\
  -H "Content-Type: application/json" \\
  -H "Authorization: Bearer sk-proj-1234567890" \\
  -d '{
        "prompt": "A calico cat playing a piano on stage",
        "size": "128x64"
      }'"""
    video = json.loads(run(wan, line, folder))
    assert (video["object"], video["status"], video["size"]) == ("video", "queued", "128x64")

    def listed() -> bool:
        line = 'curl -sS -X GET "http://localhost:30010/v1/videos" -H "Authorization: Bearer sk-proj-1234567890"'
        found = {entry["id"]: entry["status"] for entry in json.loads(run(wan, line, folder))["data"]}
        return found[video["id"]] == "completed"

    until(listed)
    line = """curl -sS -L "http://localhost:30010/v1/videos/<VIDEO_ID>/content" \\
  -H "Authorization: Bearer sk-proj-1234567890" \\
  -o output.mp4"""
    run(wan, line.replace("<VIDEO_ID>", video["id"]), folder)
    assert frames_of((folder / "output.mp4").read_bytes())[1:3] == (128, 64)


# --- vLLM-Omni


def test_vllm_generate(glm: Server, folder: Path) -> None:
    line = """curl -X POST http://localhost:8000/v1/images/generations \\
  -H "Content-Type: application/json" \\
  -d '{
    "prompt": "a dragon laying over the spine of the Green Mountains of Vermont",
    "size": "1024x1024",
    "seed": 42
  }' | jq -r '.data[0].b64_json' | base64 -d > dragon.png"""
    run(glm, line, folder)
    dragon = (folder / "dragon.png").read_bytes()
    assert size_of(dragon) == (1024, 1024)
    line = """curl -o dragon.png -X POST http://localhost:8000/v1/images/generations \\
  -H "Content-Type: application/json" \\
  -d '{
    "prompt": "a dragon laying over the spine of the Green Mountains of Vermont",
    "size": "1024x1024",
    "seed": 42,
    "response_format":"file"
  }'"""
    run(glm, line, folder)
    assert (folder / "dragon.png").read_bytes() == dragon


def test_vllm_several_images(glm: Server, folder: Path) -> None:
    line = """curl -X POST http://localhost:8000/v1/images/generations \\
  -H "Content-Type: application/json" \\
  -d '{
    "prompt": "a steampunk city set in a valley of the Adirondack mountains",
    "n": 4,
    "size": "1024x1024",
    "seed": 123
  }'"""
    told = json.loads(run(glm, line, folder))
    assert [entry["seed"] for entry in told["data"]] == [123, 124, 125, 126]


@pytest.mark.parametrize("images", [1, 2])
def test_vllm_edit(glm: Server, folder: Path, images: int) -> None:
    files = '  -F "image=@./xx.png" \\\n' * images
    line = (
        """curl -s -D >(grep -i x-request-id >&2) \\
  -o >(jq -r '.data[0].b64_json' | base64 --decode > gift-basket.png) \\
  -X POST "http://localhost:8000/v1/images/edits" \\
  -F "model=xxx" \\
"""
        + files
        + """  -F "prompt='this bear is wearing sportwear. holding a basketball, and bending one leg.'" \\
  -F "size=1024x1024" \\
  -F "output_format=png\""""
    )
    run(glm, line, folder)
    until(lambda: _is_whole(folder / "gift-basket.png"))  # written by a process of its own


def _is_whole(file: Path) -> bool:
    try:
        return size_of(file.read_bytes()) == (1024, 1024)
    except OSError:
        return False


def test_vllm_prompt_alone(glm: Server, folder: Path) -> None:
    line = """curl http://localhost:8000/v1/images/generations \\
  -H "Content-Type: application/json" \\
  -d '{"prompt": "test"}'"""
    assert json.loads(run(glm, line, folder))["data"]


VLLM_VIDEO = """curl -s http://localhost:8091/v1/videos \\
-F "prompt=A cinematic tracking shot of a mountain lake at sunrise" \\
-F "width=1280" \\
-F "height=720" \\
-F "num_frames=80" \\
-F "fps=16" \\
-F "num_inference_steps=40\""""


def small(line: str, frames: int = 17) -> str:
    """The line for a laptop, with a number of frames that Wan can make (4k + 1) and sizes that are multiples of 16."""
    for before, after in (("=1280", "=128"), ("=720", "=64"), ("=854", "=128"), ("=480", "=64"), ("=40", "=4")):
        line = line.replace(before, after)
    return line.replace("num_frames=80", f"num_frames={frames}")


def test_vllm_videos(wan: Server, folder: Path) -> None:
    created = small(VLLM_VIDEO).replace("curl -s http", "create_response=$(curl -s http") + ")"
    line = f"""{created}
video_id=$(echo "${{create_response}}" | jq -r '.id')
until [ "$(curl -s "http://localhost:8091/v1/videos/${{video_id}}" | jq -r .status)" = completed ]; do sleep 0.2; done
curl -L "http://localhost:8091/v1/videos/${{video_id}}/content" -o output.mp4"""
    run(wan, line, folder)
    assert frames_of((folder / "output.mp4").read_bytes()) == (17, 128, 64, 16.0)


def test_vllm_frames_that_wan_cannot_make(wan: Server, folder: Path) -> None:
    """80 frames, as the page has them, become 81 there without a word; here they are refused, and told what fits."""
    told = json.loads(run(wan, small(VLLM_VIDEO, 80), folder))
    assert told["error"]["param"] == "num_frames" and "77 and 81" in told["error"]["message"]


def test_vllm_image_to_video(serve: Serve, folder: Path) -> None:
    line = """curl -s http://localhost:8091/v1/videos \\
  -F "prompt=animate this image with subtle camera movement" \\
  -F "input_reference=@input.png" \\
  -F "width=1280" \\
  -F "height=720" \\
  -F "num_frames=80" \\
  -F "fps=16\""""
    server = serve("wan-i2v-a14b")
    video = json.loads(run(server, small(line), folder))
    assert (video["size"], video["num_frames"]) == ("128x64", 17)
    until(lambda: server.json("GET", f"/v1/videos/{video['id']}")[1]["status"] == "completed")


def test_vllm_synchronous(wan: Server, folder: Path) -> None:
    line = """curl -X POST http://localhost:8091/v1/videos/sync \\
  -F "prompt=A small robot walking through a neon city" \\
  -F "width=854" \\
  -F "height=480" \\
  -F "num_frames=80" \\
  -F "fps=16" \\
  -o output.mp4"""
    run(wan, small(line), folder)
    assert frames_of((folder / "output.mp4").read_bytes()) == (17, 128, 64, 16.0)
