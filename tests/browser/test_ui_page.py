"""The page in a real headless Chromium, against real servers. `visit` checks each page's console and origins."""

from __future__ import annotations

import base64
import io
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.browser.conftest import MILLISECONDS, Open
from tests.browser.proxy import below
from tests.conftest import Gate, Serve, Server

pytestmark = pytest.mark.browser

KEY = "key-of-the-page"
LONG = {"width": 512, "height": 512, "num_inference_steps": 200, "n": 4}  # some ten seconds on two cores
PHONE = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True, "device_scale_factor": 2}
NASTY = """it's a "fox" \\ $HOME `id` <b>&amp;</b> 火 🦊 @x;type=y"""


def picture(color: str = "red", size: tuple[int, int] = (64, 64)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, color).save(out, "PNG")
    return out.getvalue()


def of_api(server: Server, **fields: Any) -> bytes:
    """The bytes that the API gives for the same request."""
    (prediction,) = server.predict(fields)
    return base64.b64decode((prediction.get("video") or prediction["image"])["b64"])


def states(server: Server) -> list[str]:
    return [job["state"] for job in server.json("GET", f"/v2/models/{server.name}/requests")[1]["requests"]]


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def cells(card: Any) -> dict[str, str]:
    return dict(zip(card.locator("dt").all_inner_texts(), card.locator("dd").all_inner_texts(), strict=True))


# --- pictures


def test_a_picture(serve: Serve, visit: Open) -> None:
    server = serve("glm-image")
    page = visit(server.http)
    page.generate("<img src=x onerror=alert(1)>", seed=7, num_inference_steps=3)
    card = page.result()
    card.locator("img").wait_for()
    assert cells(card)["Seed"] == "7" and cells(card)["Size"] == "64 × 64"
    assert re.fullmatch(r"\d+\.\d s", cells(card)["Time"])
    assert "<img src=x onerror=alert(1)>" in card.inner_text()
    name, data = page.downloaded(card)
    assert name == "tiny-7.png"
    assert data == of_api(server, prompt="<img src=x onerror=alert(1)>", seed=7, num_inference_steps=3)
    assert page.seen("live")[-1] == "The result is there."
    assert page.page.is_enabled("#generate") and not page.page.is_visible("#progress")


def test_a_drawn_seed_is_used_again(serve: Serve, visit: Open) -> None:
    server = serve("glm-image")
    page = visit(server.http)
    page.generate(n=2, output_format="webp")
    first = page.result(2)
    seed, (name, data) = cells(first)["Seed"], page.downloaded(first)
    assert name == f"tiny-{seed}.webp"
    first.get_by_text("Use this seed").click()
    assert page.page.input_value("#p-seed") == seed
    page.generate(n=1)
    again = page.result(3)
    assert cells(again)["Seed"] == seed
    assert page.downloaded(again)[1] == data


def test_a_seed_beyond_doubles(serve: Serve, visit: Open) -> None:
    server = serve("glm-image")
    page = visit(server.http)
    page.generate(seed=2**63 - 5)
    card = page.result()
    assert cells(card)["Seed"] == str(2**63 - 5)
    assert page.downloaded(card)[1] == of_api(server, prompt="a red fox in the snow", seed=2**63 - 5)


def test_controls_come_from_the_schema(serve: Serve, visit: Open) -> None:
    for family in ("glm-image", "sd15", "wan-t2v-a14b", "wan-ti2v-5b"):
        server = serve(family)
        properties = server.json("GET", "/v2/models/tiny")[1]["properties"]
        parameters = properties["parameters"]
        page = visit(server.http).page
        shown = {element.get_attribute("name") for element in page.locator("#form [name]").all()}
        hidden = {"image", "dry_run"} | ({"n"} if "num_frames" in parameters else set())  # a request makes one video
        assert shown == parameters.keys() - hidden, family
        assert not shown & properties["refused"].keys()
        assert page.is_visible("#pictures") == ("image" in parameters)
        steps, own = page.locator("#p-num_inference_steps"), parameters["num_inference_steps"]
        assert steps.get_attribute("max") == str(own["maximum"]) and steps.get_attribute("min") == str(own["minimum"])
        assert steps.get_attribute("placeholder") == str(own["default"])
        assert own["description"] in page.locator("#p-num_inference_steps-hint").inner_text()
        assert page.locator("#p-width").get_attribute("step") == str(parameters["width"]["multiple_of"])
        page.click("#more > summary")
        choices = parameters["output_format"]["choices"]
        assert page.locator("#p-output_format option").all_inner_texts() == choices


# --- source pictures


def test_an_edit_with_a_chosen_file(serve: Serve, visit: Open) -> None:
    server = serve("glm-image")
    page = visit(server.http)
    page.page.set_input_files("#file", [{"name": "a.png", "mimeType": "image/png", "buffer": picture("red")}])
    page.generate("make it blue", seed=7)
    card = page.result()
    encoded = base64.b64encode(picture("red")).decode()
    assert page.downloaded(card)[1] == of_api(server, prompt="make it blue", seed=7, image=encoded)
    card.get_by_text("Edit this").click()  # the result is a source picture in its turn
    assert page.page.locator("#thumbs img").count() == 2
    page.generate("make it green", seed=8)
    assert cells(page.result(2))["Seed"] == "8"


def test_pictures_are_dropped_pasted_and_removed(serve: Serve, visit: Open) -> None:
    server = serve("glm-image")
    page = visit(server.http)
    thumbs = page.page.locator("#thumbs li")
    page.give("drop", "body", ("a.png", "image/png", picture("red")), ("b.png", "image/png", picture("green")))
    page.give("paste", "#prompt", ("c.png", "image/png", picture("blue")))
    assert thumbs.count() == 3
    assert page.page.locator("#thumbs img").evaluate_all("list => list.map((i) => i.alt)") == [
        "a.png",
        "b.png",
        "c.png",
    ]
    page.page.get_by_label("Remove b.png").click()
    assert thumbs.count() == 2
    page.generate("both of them", seed=3)
    encoded = [base64.b64encode(picture(color)).decode() for color in ("red", "blue")]
    assert page.downloaded(page.result())[1] == of_api(server, prompt="both of them", seed=3, image=encoded)
    page.give("drop", "#drop", ("x.txt", "text/plain", b"no picture"))
    assert "Only PNG" in page.page.inner_text("#error") and thumbs.count() == 2
    page.give("drop", "#drop", *((f"{i}.png", "image/png", picture()) for i in range(3)))
    assert "At most 4" in page.page.inner_text("#error") and thumbs.count() == 4
    page.page.click("#reset")
    assert thumbs.count() == 0 and page.page.is_hidden("#error")


def test_a_model_without_pictures_takes_none(serve: Serve, visit: Open) -> None:
    page = visit(serve("sd15").http)
    page.give("paste", "#prompt", ("c.png", "image/png", picture("blue")))
    assert page.page.is_hidden("#pictures")
    page.generate(seed=1, negative_prompt="snow")
    assert cells(page.result())["Seed"] == "1"


# --- progress, cancel, errors


def test_progress_moves_forward(serve: Serve, visit: Open) -> None:
    page = visit(serve("glm-image").http)
    page.generate(**LONG)
    page.until("/\\d+ \\/ \\d+/.test(document.getElementById('step').textContent)")
    page.until("/\\d s left/.test(document.getElementById('eta').textContent)")
    page.result(4)
    bar = page.seen("bar")
    assert len(bar) > 10 and bar == sorted(bar) and bar[0] > 0 and bar[-1] <= 1
    stages = page.seen("stage")
    assert stages.index("Composing") < stages.index("Drawing")
    assert len(page.seen("live")) < 20, "a screen reader is told each fifth, not each step"


def test_cancel_stops_the_engine(serve: Serve, visit: Open) -> None:
    server = serve("glm-image")
    page = visit(server.http)
    page.generate(**LONG)
    page.until("document.getElementById('bar').value > 0")
    assert "running" in states(server)
    page.page.click("#cancel")
    wait_for(lambda: "running" not in states(server))
    assert states(server)[-1] == "cancelled"
    page.until("document.getElementById('live').textContent == 'Cancelled.'")
    assert page.page.is_hidden("#error") and page.page.locator("#gallery > li").count() == 0
    page.generate(seed=1, width=64, height=64, num_inference_steps=2, n=1)
    assert cells(page.result())["Seed"] == "1"


def test_leaving_stops_the_engine(serve: Serve, visit: Open) -> None:
    server = serve("glm-image")
    page = visit(server.http)
    page.generate(**LONG)
    wait_for(lambda: "running" in states(server))
    page.page.goto("about:blank")
    wait_for(lambda: "running" not in states(server))
    assert states(server)[-1] == "cancelled"


def test_a_refusal_is_told_in_the_servers_words(serve: Serve, visit: Open) -> None:
    server = serve("glm-image")
    page = visit(server.http)
    page.statuses.add(400)
    page.generate(width=100)
    error = page.page.locator("#error")
    error.wait_for()
    assert "width: 100 is not an integer from 32 to 4096 that is a multiple of 32" in error.inner_text()
    assert re.search(r"Request id\s+[0-9a-f]{32}", error.inner_text())
    assert page.page.locator("#p-width").get_attribute("aria-invalid") == "true"
    page.generate("", width="")
    page.until("document.getElementById('error').textContent.includes('prompt')")
    assert page.page.locator("#p-width").get_attribute("aria-invalid") is None
    page.generate("a fox", timeout=0.001)
    page.until("document.getElementById('error').textContent.includes('timeout')")
    page.generate("a fox", timeout="", seed="one")
    assert "not a number" in error.inner_text()
    page.generate("a fox", seed=1)
    page.result()
    assert error.is_hidden()


def test_a_server_that_is_gone(start: Callable[..., Server], visit: Open) -> None:
    server = start("sd15")
    server.wait_ready()
    page = visit(server.http)
    page.goes_away = True
    server.process.kill()
    server.process.wait()
    page.page.fill("#prompt", "a fox")
    page.page.click("#generate")
    page.page.locator("#error").wait_for()
    assert "cannot be reached" in page.page.inner_text("#error")
    page.until("document.getElementById('state').className == 'waiting'")
    page.page.goto("about:blank")


def test_it_waits_for_the_model(start: Callable[..., Server], visit: Open, gate: Gate) -> None:
    """A page that is opened while the model loads tells so, and goes on by itself."""
    gate.shut("loading")
    server = start("glm-image", **gate.environment)

    def live() -> bool:
        try:
            return server.request("GET", "/v2/health/live")[0] == 200
        except OSError:
            return False

    wait_for(live)
    page = visit(server.http, ready=False)
    page.statuses.add(503)
    page.until("window.seen.state.length > 0")
    gate.open("loading")
    page.page.wait_for_selector("#main:not([hidden])", timeout=2 * MILLISECONDS)
    told = page.seen("state")
    assert len(told) > 1 and re.search("loading|warming|start", told[0]) and told[-1] == "ready"


# --- videos


def test_a_video_plays(serve: Serve, visit: Open) -> None:
    server = serve("wan-ti2v-5b")
    page = visit(server.http)
    ranges: list[tuple[int, str | None]] = []
    page.page.on(
        "response",
        lambda answer: (
            ranges.append((answer.status, answer.headers.get("content-range")))
            if answer.url.endswith("/content")
            else None
        ),
    )
    page.generate(seed=7, num_frames=33, width=160, height=96)
    card = page.result()
    video = card.locator("video")
    video.evaluate("v => v.readyState >= 2 || new Promise((done) => v.addEventListener('loadeddata', done))")
    assert video.get_attribute("controls") is not None
    assert cells(card)["Seed"] == "7" and cells(card)["Size"] == "160 × 96"
    video.evaluate("v => v.play()")
    page.until("document.querySelector('video').currentTime > 0.3")
    duration = video.evaluate("v => v.duration")
    middle = video.evaluate(
        """v => { v.pause(); v.currentTime = v.duration / 2;
             return new Promise((done) => v.addEventListener('seeked', () => done(v.currentTime))); }"""
    )
    assert abs(middle - duration / 2) < 0.2
    assert (206, f"bytes 0-{(length := len(page.downloaded(card)[1])) - 1}/{length}") in ranges
    expected = of_api(server, prompt="a red fox in the snow", seed=7, num_frames=33, width=160, height=96)
    assert page.downloaded(card)[1] == expected


def test_a_videos_progress_and_cancel(serve: Serve, visit: Open) -> None:
    server = serve("wan-ti2v-5b")
    page = visit(server.http)
    page.generate(num_frames=97, width=320, height=320, num_inference_steps=200)
    page.until("window.seen.bar.length >= 3")
    bar = page.seen("bar")
    assert bar == sorted(bar) and bar[-1] < 1
    assert "Drawing" in page.seen("stage")
    page.page.click("#cancel")
    wait_for(lambda: "running" not in states(server))
    page.until("document.getElementById('live').textContent == 'Cancelled.'")
    (newest,) = server.json("GET", "/v1/videos?limit=1")[1]["data"]
    assert newest["status"] == "failed" and newest["error"]["code"] == "cancelled"
    assert page.page.is_hidden("#error")


def test_a_video_outlives_the_page(serve: Serve, visit: Open) -> None:
    page = visit(serve("wan-i2v-a14b").http)
    page.give("drop", "#drop", ("first.png", "image/png", picture("red", (256, 256))))
    page.generate("the first one", seed=5, num_frames=65, width=256, height=256, num_inference_steps=40)
    page.until("document.getElementById('bar').value > 0")
    page.page.reload()
    card = page.result()
    assert cells(card)["Seed"] == "5" and "the first one" in card.inner_text()


def test_the_first_frame_of_a_video(serve: Serve, visit: Open) -> None:
    server = serve("wan-i2v-a14b")
    page = visit(server.http)
    page.generate(seed=7, num_frames=5)
    assert "source picture" in page.page.inner_text("#error")
    page.give("drop", "#drop", ("first.png", "image/png", picture("red", (96, 64))))
    page.give("drop", "#drop", ("second.png", "image/png", picture("blue", (96, 64))))
    assert page.page.locator("#thumbs img").count() == 1  # takes the place
    page.page.click("#generate")
    card = page.result()
    encoded = base64.b64encode(picture("blue", (96, 64))).decode()
    expected = of_api(server, prompt="a red fox in the snow", seed=7, num_frames=5, image=encoded)
    assert page.downloaded(card)[1] == expected


def test_seconds_and_frames_exclude_each_other(serve: Serve, visit: Open) -> None:
    page = visit(serve("wan-ti2v-5b").http)
    page.page.fill("#p-num_frames", "9")
    page.page.fill("#p-seconds", "1")
    assert page.page.input_value("#p-num_frames") == ""
    page.page.fill("#p-num_frames", "5")
    assert page.page.input_value("#p-seconds") == ""


# --- behind a key, below a prefix


@pytest.mark.parametrize("family", ["glm-image", "wan-ti2v-5b"])
def test_behind_a_key(serve: Serve, visit: Open, family: str) -> None:
    server = serve(family, "--api_key", KEY)
    page = visit(server.http, ready=False)
    page.statuses.add(401)
    page.page.wait_for_selector("#key:focus")
    assert page.page.is_hidden("#main")
    page.page.keyboard.type("not-the-key")
    page.page.keyboard.press("Enter")
    page.until("document.getElementById('key-error').textContent.includes('not valid')")
    page.page.fill("#key", KEY)
    page.page.keyboard.press("Enter")
    page.page.wait_for_selector("#main:not([hidden])")
    page.generate(seed=7)
    card = page.result()
    if family == "wan-ti2v-5b":
        card.locator("video").evaluate("v => v.play()")
        page.until("document.querySelector('video').currentTime > 0.2")
    kept = page.page.evaluate("[Object.values(sessionStorage), Object.values(localStorage), document.cookie]")
    assert kept == [[KEY], [], ""]
    for request in page.requests:
        assert "authorization" not in request.headers and KEY not in request.url
    drawing = [request for request in page.requests if "/v1/" in request.url]
    assert drawing and {request.headers.get("x-api-key") for request in drawing} == {KEY}
    page.page.reload()
    page.page.wait_for_selector("#main:not([hidden])")  # it stays for the session
    page.page.click("#code > summary")
    for language in ("curl", "python"):
        page.page.click(f"[data-copy={language}]")
        code = page.page.inner_text("#snippet")
        assert "API_KEY" in code and KEY not in code


def test_a_key_that_is_withdrawn(serve: Serve, visit: Open, start: Callable[..., Server], tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(KEY)
    server = start("sd15", "--api_key_file", str(keys))
    wait_for(lambda: _is_ready(server), 120)
    page = visit(server.http, ready=False)
    page.statuses.add(401)
    page.page.fill("#key", KEY)
    page.page.keyboard.press("Enter")
    page.page.wait_for_selector("#main:not([hidden])")
    keys.write_text("another-key")
    wait_for(lambda: server.request("GET", "/v2/models/tiny", headers={"X-API-Key": KEY})[0] == 401)
    page.generate("kept words")
    page.page.wait_for_selector("#key:focus")
    page.page.fill("#key", "another-key")
    page.page.keyboard.press("Enter")
    page.page.wait_for_selector("#key-form", state="hidden")
    page.page.wait_for_selector("#generate:enabled")
    assert page.page.input_value("#prompt") == "kept words"
    page.page.click("#generate")
    page.result()


def _is_ready(server: Server) -> bool:
    try:
        return server.request("GET", "/v2/health/ready")[0] == 200
    except OSError:
        return False


@pytest.mark.parametrize("path", ["/ui", "/ui/"])
def test_below_a_prefix(serve: Serve, visit: Open, path: str) -> None:
    server = serve("glm-image")
    with below("/some/prefix", server.http) as url:
        page = visit(url, path)
        assert page.page.url == f"{url}/ui/"
        page.generate(**LONG)
        page.until("document.getElementById('bar').value > 0")
        page.page.click("#cancel")
        wait_for(lambda: "running" not in states(server))
        assert states(server)[-1] == "cancelled"
        page.generate(seed=7, width=64, height=64, num_inference_steps=3, n=1)
        data = page.downloaded(page.result())[1]
        asked = [request.url for request in page.requests if request.url.startswith("http")]
        assert all(address.startswith(f"{url}/") for address in asked)
        page.page.goto("about:blank")
    fields = {"width": 64, "height": 64, "num_inference_steps": 3}
    assert data == of_api(server, prompt="a red fox in the snow", seed=7, **fields)


def test_a_video_below_a_prefix(serve: Serve, visit: Open) -> None:
    with below("/p", serve("wan-ti2v-5b").http) as url:
        page = visit(url)
        page.generate(seed=7)
        video = page.result().locator("video")
        video.evaluate("v => v.play()")
        page.until("document.querySelector('video').currentTime > 0.2")
        page.page.goto("about:blank")


# --- code


def run_copied(page: Any, language: str, folder: Path) -> dict[str, bytes]:
    """Run what the page copies, in `folder`; the files that it wrote."""
    before = {path.name for path in folder.iterdir()}
    page.page.locator("#code").evaluate("element => { element.open = true; }")
    page.page.click(f"[data-copy={language}]")
    page.until("document.getElementById('copied').textContent == 'Copied'")
    code = page.page.evaluate("navigator.clipboard.readText()")
    assert code == page.page.inner_text("#snippet")
    command = ["bash", "-euo", "pipefail", "-c", code] if language == "curl" else [sys.executable, "-c", code]
    environment = {**os.environ, "API_KEY": KEY, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{code}\n{done.stdout}{done.stderr}"
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in before}


CLIPBOARD = {"permissions": ["clipboard-read", "clipboard-write"]}


@pytest.mark.parametrize("language", ["curl", "python"])
def test_copied_code_draws_the_same_picture(serve: Serve, visit: Open, tmp_path: Path, language: str) -> None:
    server = serve("glm-image")
    page = visit(server.http, **CLIPBOARD)
    fields = {"width": 96, "height": 64, "num_inference_steps": 3, "guidance_scale": 2.5, "seed": 2**53 + 1, "n": 2}
    page.generate(NASTY, **fields)
    shown = page.downloaded(page.result(2))[1]
    made = run_copied(page, language, tmp_path)
    assert sorted(made) == ["picture-0.png", "picture-1.png"] and made["picture-1.png"] == shown


@pytest.mark.parametrize("language", ["curl", "python"])
def test_copied_code_edits_the_same_picture(serve: Serve, visit: Open, tmp_path: Path, language: str) -> None:
    server = serve("glm-image", "--api_key", KEY)
    page = visit(server.http, ready=False, **CLIPBOARD)
    page.statuses.add(401)
    page.page.fill("#key", KEY)
    page.page.keyboard.press("Enter")
    page.page.wait_for_selector("#main:not([hidden])")
    for name, color in (("it's; a, fox.png", "red"), ("b.png", "blue")):
        (tmp_path / name).write_bytes(picture(color))
        page.page.set_input_files("#file", tmp_path / name)
    page.generate(NASTY, seed=7, num_inference_steps=3, output_format="jpeg")
    shown = page.downloaded(page.result())[1]
    assert run_copied(page, language, tmp_path) == {"picture-0.jpeg": shown}


@pytest.mark.parametrize("language", ["curl", "python"])
@pytest.mark.parametrize("with_picture", [False, True], ids=["text", "picture"])
def test_copied_code_makes_the_same_video(
    serve: Serve, visit: Open, tmp_path: Path, language: str, with_picture: bool
) -> None:
    page = visit(serve("wan-ti2v-5b").http, **CLIPBOARD)
    if with_picture:
        (tmp_path / "first.png").write_bytes(picture("red", (96, 64)))
        page.page.set_input_files("#file", tmp_path / "first.png")
    page.generate(NASTY, seed=7, seconds=0.5, fps=16, num_inference_steps=3)
    shown = page.downloaded(page.result())[1]
    assert run_copied(page, language, tmp_path) == {"video.mp4": shown}


# --- everybody can use it


def violations(page: Any) -> list[str]:
    """What axe-core says against the page as it is."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page.page).response["violations"]
    return [f"{rule['id']}: {node['html'][:200]} {node['failureSummary']}" for rule in found for node in rule["nodes"]]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("family", ["glm-image", "wan-ti2v-5b"])
def test_axe_finds_nothing(serve: Serve, visit: Open, family: str, scheme: str) -> None:
    page = visit(serve(family).http, color_scheme=scheme)
    page.statuses.add(400)
    assert violations(page) == []
    page.page.click("#more > summary")
    page.page.click("#code > summary")
    page.give("drop", "#drop", ("first.png", "image/png", picture("red", (96, 64))))
    page.generate(seed=1)
    page.result()
    page.page.fill("#p-width", "33")
    page.page.click("#generate")
    page.page.locator("#error").wait_for()
    assert violations(page) == []


def test_axe_finds_nothing_while_it_works_and_where_a_key_is_needed(serve: Serve, visit: Open) -> None:
    page = visit(serve("glm-image", "--api_key", KEY).http, ready=False)
    page.statuses.add(401)
    page.page.wait_for_selector("#key:focus")
    assert violations(page) == []
    page.page.fill("#key", KEY)
    page.page.keyboard.press("Enter")
    page.page.wait_for_selector("#main:not([hidden])")
    page.generate(**LONG)
    page.until("document.getElementById('bar').value > 0")
    assert violations(page) == []
    page.page.click("#cancel")


def test_every_control_has_a_label_and_a_description(serve: Serve, visit: Open) -> None:
    page = visit(serve("wan-ti2v-5b").http).page
    page.click("#more > summary")
    for control in page.locator("#form input, #form select, #form textarea").all():
        told = control.evaluate(
            """e => [e.labels.length, (e.getAttribute('aria-describedby') ?? '').split(' ')
                 .map((id) => document.getElementById(id)?.textContent).join(' ').trim()]"""
        )
        assert told[0] == 1 and told[1], control.get_attribute("id")


def test_the_keyboard_alone(serve: Serve, visit: Open) -> None:
    page = visit(serve("glm-image").http)
    keyboard, focused = page.page.keyboard, lambda: page.page.evaluate("document.activeElement.id")
    page.page.focus("#prompt")
    keyboard.type("a fox")
    order = []
    while not order or order[-1] != "generate":
        keyboard.press("Tab")
        order.append(focused())
        assert len(order) < 30
    assert order[0] == "file" and order.index("p-width") < order.index("p-height") < order.index("p-seed")
    keyboard.press("Enter")
    page.result()
    page.page.focus("#prompt")
    keyboard.press("Control+Enter")
    page.result(2)
    page.page.fill("#p-num_inference_steps", "200")
    page.page.fill("#p-width", "512")
    page.page.focus("#generate")
    keyboard.press("Enter")
    page.page.wait_for_selector("#cancel:focus")
    keyboard.press("Enter")
    page.until("document.getElementById('live').textContent == 'Cancelled.'")
    page.page.wait_for_selector("#generate:focus")


def test_on_a_phone(serve: Serve, visit: Open) -> None:
    page = visit(serve("glm-image").http, **PHONE)
    page.statuses.add(400)

    def wide() -> int:
        found: int = page.page.evaluate("document.documentElement.scrollWidth")
        return found

    assert wide() == 360
    page.page.locator("#more > summary").tap()
    page.page.locator("#code > summary").tap()
    page.page.locator("[data-copy=python]").tap()
    page.generate("x" * 300, seed=2**63 - 1, width=64)
    page.result()
    assert wide() == 360
    page.generate("x" * 300, width=33)
    page.page.locator("#error").wait_for()
    assert wide() == 360
    small = page.page.evaluate(
        """[...document.querySelectorAll('button, a, summary, input:not([type=file]), select')]
             .filter((e) => e.checkVisibility()).map((e) => [e.id, e.textContent, e.getBoundingClientRect()])
             .filter(([, , box]) => box.height < 24 || box.width < 24).map(([id, text]) => id + text)"""
    )
    assert small == []  # WCAG 2.2: targets of at least 24 pixels
    page.page.evaluate("document.documentElement.style.fontSize = '32px'")  # text at 200 %
    assert wide() == 360


def test_less_motion_where_it_is_asked_for(serve: Serve, visit: Open) -> None:
    server = serve("glm-image")
    for motion, name in (("no-preference", "slide"), ("reduce", "none")):
        page = visit(server.http, reduced_motion=motion).page
        page.evaluate("document.getElementById('progress').hidden = false")
        assert page.locator("#bar").evaluate("e => getComputedStyle(e).animationName") == name
