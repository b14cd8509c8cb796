"""Compatible requests run together where that is asked for: the pictures are theirs, and none pays for another."""

from __future__ import annotations

import base64
import io
import resource
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.conftest import Serve, Server
from tests.e2e.test_load import SLOW, engine_of, known, metric, paused, post, requests, running, wait_for

QUICK = {"prompt": "a fox", "num_inference_steps": 3, "seed": 3}
BATCHED = ("--max_batch_size", "4", "--max_batch_wait_ms", "2000")
LONG_WAIT = ("--max_batch_size", "4", "--max_batch_wait_ms", "10000")
PAIR = {**SLOW, "size": "128x128", "n": 2}  # two of them are a whole batch: it begins once both are there
# Of 255: float32 kernels round by batch size, and a denoiser carries it on.
ROUNDING = 1


def pixels(prediction: dict[str, Any]) -> np.ndarray[Any, Any]:
    with Image.open(io.BytesIO(base64.b64decode(prediction["image"]["b64"]))) as picture:
        return np.asarray(picture).astype(int)


def alike(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return bool(np.abs(pixels(one) - pixels(other)).max() <= ROUNDING)


def instances(count: int, **fields: Any) -> list[dict[str, Any]]:
    prompts = ("a fox", "two owls in an old oak", "a cat", "a red boat on a quiet lake at dawn")
    return [{**QUICK, "prompt": prompts[i % 4], "seed": 10 + i, **fields} for i in range(count)]


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3", "flux"])
def test_each_member_gets_the_picture_it_has_alone(serve: Serve, family: str) -> None:
    alone, together = serve(family), serve(family, *BATCHED)
    asked = instances(4)
    wanted = [alone.predict(instance)[0] for instance in asked]
    got = together.predict(*asked)
    assert [p["batched"] for p in wanted] == [1] * 4
    assert [p["batched"] for p in got] == [4] * 4
    assert [p["seed"] for p in got] == [10, 11, 12, 13]
    assert all(alike(*pair) for pair in zip(got, wanted, strict=True))
    assert not alike(got[0], got[1])


def test_the_default_is_alone_and_byte_for_byte(serve: Serve) -> None:
    server = serve("sd15")
    first, second = server.predict(*instances(2)), server.predict(*reversed(instances(2)))
    assert [p["image"]["b64"] for p in first] == [p["image"]["b64"] for p in reversed(second)]
    assert {p["batched"] for p in first} == {1}


def test_strangers_run_together_and_what_differs_runs_apart(serve: Serve) -> None:
    server = serve("sd15", *BATCHED)
    passes = metric(server, "diffusion_batch_size_count")
    asked = [*instances(3), *instances(3, size="128x64"), {**QUICK, "num_inference_steps": 4}]
    with ThreadPoolExecutor(8) as pool:
        with paused(server):  # the device is busy until the others have met
            busy = pool.submit(post, server, {**SLOW, "num_inference_steps": 30}, X_Request_ID="busy")
            wait_for(lambda: known(server, "busy", "running"), "the device is busy")
            posted = [pool.submit(post, server, a, X_Request_ID=f"stranger-{i}") for i, a in enumerate(asked)]
            wait_for(lambda: all(known(server, f"stranger-{i}", "queued") for i in range(len(asked))), "all wait")
        answers = [answer.result()[2]["predictions"][0] for answer in posted]
        assert busy.result()[2]["predictions"][0]["batched"] == 1
    assert [p["batched"] for p in answers] == [3, 3, 3, 3, 3, 3, 1]
    assert metric(server, "diffusion_batch_size_count") == passes + 4
    assert {(p["width"], p["height"]) for p in answers[3:6]} == {(128, 64)}


def test_pictures_of_one_prompt_share_a_pass(serve: Serve) -> None:
    alone = serve("sd15").predict({**QUICK, "n": 6})[0]
    together = serve("sd15", *BATCHED).predict({**QUICK, "n": 6})[0]
    assert together["seeds"] == list(range(3, 9)) and together["batched"] == 4
    pairs = [({"image": a}, {"image": b}) for a, b in zip(together["images"], alone["images"], strict=True)]
    assert len(pairs) == 6 and all(alike(*pair) for pair in pairs)


@pytest.mark.parametrize("family", ["wan-ti2v-5b"])
def test_a_family_that_gains_nothing_runs_alone(serve: Serve, family: str) -> None:
    server = serve(family, *BATCHED)
    asked = [{"prompt": "a fox", "seed": seed, "num_inference_steps": 1} for seed in (1, 2)]
    assert [p["batched"] for p in server.predict(*asked)] == [1, 1]


def test_glm_image_shares_the_tokens_and_draws_one_after_another(serve: Serve) -> None:
    """Byte for byte what each draws alone, edits with edits and each delivered when it is there."""
    alone, together = serve("glm-image"), serve("glm-image", *LONG_WAIT)
    small = {"size": "64x64", "num_inference_steps": 2}
    asked = instances(4, **small)
    wanted = [alone.predict(instance)[0] for instance in asked]
    with ThreadPoolExecutor(5) as pool, paused(together):
        posted = []
        for i, fields in enumerate([*asked[:3], {**asked[3], "num_inference_steps": 200}]):
            posted.append(pool.submit(post, together, fields, X_Request_ID=f"shared-{i}"))
            wait_for(lambda i=i: known(together, f"shared-{i}"), "it is there")  # type: ignore[misc]
    answers = [answer.result()[2]["predictions"][0] for answer in posted]
    assert [p["batched"] for p in answers] == [4] * 4
    assert [p["image"]["b64"] for p in answers[:3]] == [p["image"]["b64"] for p in wanted[:3]]
    assert answers[3]["image"]["b64"] != wanted[3]["image"]["b64"], "it asked for more steps"
    assert len({p["timings"]["tokens"] for p in answers}) == 1
    last = answers[3]["timings"]
    assert all(p["timings"]["total"] < last["total"] - last["denoise"] / 2 for p in answers[:3])


@pytest.mark.parametrize("n", [2, 4, 6])
def test_pictures_of_one_prompt_share_glm_images_tokens_and_each_is_counted(serve: Serve, n: int) -> None:
    alone, together = serve("glm-image"), serve("glm-image", *BATCHED)
    fields = {**QUICK, "size": "64x64", "num_inference_steps": 2}
    counted = []
    for server, asked in ((alone, fields), (together, {**fields, "n": n})):
        before = metric(server, "diffusion_tokens_total"), metric(server, "diffusion_steps_total")
        prediction = server.predict(asked)[0]
        after = metric(server, "diffusion_tokens_total"), metric(server, "diffusion_steps_total")
        counted.append([b - a for a, b in zip(before, after, strict=True)])
    assert counted[1] == [n * count for count in counted[0]]
    assert prediction["batched"] == min(n, 4)
    for i, image in enumerate(prediction["images"]):
        assert image["b64"] == alone.predict({**fields, "seed": 3 + i})[0]["image"]["b64"]


def test_after_a_dead_engine_only_what_was_not_delivered_runs_again(start: Callable[..., Server]) -> None:
    server = start("glm-image", *LONG_WAIT)
    server.wait_ready()
    asked = instances(4, size="64x64", num_inference_steps=2)
    asked[1:] = [{**fields, "num_inference_steps": 200} for fields in asked[1:]]
    wanted = [server.predict(fields)[0]["image"]["b64"] for fields in asked]
    with ThreadPoolExecutor(4) as pool:
        with paused(server):
            posted = []
            for i, fields in enumerate(asked):
                posted.append(pool.submit(post, server, fields, X_Request_ID=f"member-{i}"))
                wait_for(lambda i=i: known(server, f"member-{i}"), "it is there")  # type: ignore[misc]
        first = posted[0].result()[2]["predictions"][0]
        engine_of(server).kill()
        answers = [first, *(answer.result()[2]["predictions"][0] for answer in posted[1:])]
    assert [p["image"]["b64"] for p in answers] == wanted
    assert answers[0]["batched"] == 4 and answers[-1]["batched"] == 1
    assert server.log.read_text().count("it runs once more") <= 3
    assert server.stop() == 0


def test_a_picture_of_glm_image_that_nobody_waits_for_is_not_drawn(serve: Serve) -> None:
    server = serve("glm-image", *LONG_WAIT)
    fields = {"prompt": "a fox", "size": "64x64", "num_inference_steps": 50, "n": 2}
    alone = serve("glm-image").predict({**fields, "seed": 21})[0]
    steps = metric(server, "diffusion_steps_total")
    with ThreadPoolExecutor(2) as pool:
        stays = pool.submit(post, server, {**fields, "seed": 21}, X_Request_ID="stays")
        wait_for(lambda: known(server, "stays", "queued"), "it waits for company")
        goes = pool.submit(post, server, {**fields, "seed": 31}, X_Request_ID="goes")
        wait_for(lambda: running(server, "goes"), "both run")
        assert server.json("DELETE", "/v2/models/tiny/requests/goes")[0] == 200
        assert goes.result()[0] == 499
        status, _, answer = stays.result()
    assert status == 200 and answer["predictions"][0]["batched"] == 4
    assert [i["b64"] for i in answer["predictions"][0]["images"]] == [i["b64"] for i in alone["images"]]
    assert metric(server, "diffusion_steps_total") - steps == 100


def test_a_cancelled_member_leaves_the_others_alone(serve: Serve) -> None:
    server = serve("sd15", *LONG_WAIT)
    fields = {**PAIR, "num_inference_steps": 100}
    wanted = serve("sd15").predict({**fields, "seed": 21})[0]
    with ThreadPoolExecutor(2) as pool:
        stays = pool.submit(post, server, {**fields, "seed": 21}, X_Request_ID="stays")
        goes = pool.submit(post, server, {**fields, "seed": 31}, X_Request_ID="goes")
        wait_for(lambda: running(server, "stays") and running(server, "goes"), "both run")
        assert server.json("DELETE", "/v2/models/tiny/requests/goes")[0] == 200
        assert goes.result()[0] == 499
        status, _, answer = stays.result()
    assert status == 200 and answer["predictions"][0]["batched"] == 4
    pairs = zip(answer["predictions"][0]["images"], wanted["images"], strict=True)
    assert all(alike({"image": one}, {"image": other}) for one, other in pairs)


def test_a_batch_that_all_left_stops(serve: Serve) -> None:
    server = serve("sd15", *LONG_WAIT)
    with ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(post, server, {**PAIR, "seed": 10 * i}, X_Request_ID=f"gone-{i}") for i in range(2)]
        wait_for(lambda: all(running(server, f"gone-{i}") for i in range(2)), "both run")
        for i in range(2):
            server.json("DELETE", f"/v2/models/tiny/requests/gone-{i}")
        assert {call.result()[0] for call in calls} == {499}
    steps = metric(server, "diffusion_steps_total")
    server.predict({**QUICK, "n": 4})
    assert metric(server, "diffusion_steps_total") - steps < 200  # of 400


def test_a_deadline_within_a_batch_is_its_members_own(serve: Serve) -> None:
    server = serve("sd15", *LONG_WAIT)
    fields = {**PAIR, "num_inference_steps": 20}
    with ThreadPoolExecutor(2) as pool:
        with paused(server):  # until the deadline has passed
            patient = pool.submit(post, server, fields, X_Request_ID="patient")
            wait_for(lambda: known(server, "patient", "queued"), "it waits for company")
            hurried = pool.submit(post, server, {**fields, "seed": 13, "timeout": 3})
            assert hurried.result()[0] == 504
        status, _, answer = patient.result()
    assert status == 200 and answer["predictions"][0]["batched"] == 4


def test_a_batch_that_does_not_fit_is_drawn_one_by_one(start: Callable[..., Server]) -> None:
    server = start("sd15", *BATCHED)
    server.wait_ready()
    fields = {"size": "256x256", "num_inference_steps": 1}
    wanted = [server.predict(instance)[0] for instance in instances(4, **fields)]
    engine = engine_of(server)
    size = engine.memory_info().vms
    resource.prlimit(engine.pid, resource.RLIMIT_AS, (size + 24 * 2**20, resource.RLIM_INFINITY))
    got = server.predict(*instances(4, **fields))
    assert [p["batched"] for p in got] == [1] * 4
    assert [p["image"]["b64"] for p in got] == [p["image"]["b64"] for p in wanted]
    assert "a batch failed; its pictures are drawn one by one" in server.log.read_text()
    assert engine_of(server).pid == engine.pid
    assert server.stop() == 0


def test_members_of_a_dead_engine_run_again_alone(start: Callable[..., Server]) -> None:
    server = start("sd15", *LONG_WAIT)
    server.wait_ready()
    fields = {**PAIR, "num_inference_steps": 20}
    answers: dict[int, Any] = {}

    def ask(seed: int) -> None:
        answers[seed] = post(server, {**fields, "seed": seed}, X_Request_ID=f"again-{seed}")

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in (1, 11)]
    with paused(server) as engine:
        for thread in threads:
            thread.start()
        wait_for(lambda: known(server, "again-1", "running") and known(server, "again-11", "running"), "both run")
        engine.kill()
    for thread in threads:
        thread.join()
    assert [answers[seed][0] for seed in (1, 11)] == [200, 200]
    assert [answers[seed][2]["predictions"][0]["batched"] for seed in (1, 11)] == [1, 1]
    assert [answers[seed][2]["predictions"][0]["seed"] for seed in (1, 11)] == [1, 11]
    assert server.stop() == 0


# --- the wait for company


def test_sigterm_ends_the_wait_for_company(start: Callable[..., Server]) -> None:
    server = start("sd15", *LONG_WAIT, "--grace_period", "12")  # work is given up three seconds before
    server.wait_ready()
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(post, server, QUICK, X_Request_ID="lonely")
        wait_for(lambda: known(server, "lonely"), "queued")
        server.process.send_signal(signal.SIGTERM)
        assert call.result()[0] == 200
    assert server.process.wait(60) == 0


def test_a_deadline_or_a_cancel_ends_the_wait_for_company(serve: Serve) -> None:
    server = serve("sd15", *LONG_WAIT)
    status, _, answer = post(server, QUICK, X_Request_Timeout="8")  # the device is idle all the time
    assert status == 200, answer
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(post, server, QUICK, X_Request_ID="first")
        wait_for(lambda: known(server, "first"), "queued")
        others = pool.submit(server.predict, *({**QUICK, "size": "128x64", "seed": i} for i in range(4)))
        wait_for(lambda: sum(told["state"] == "queued" for told in requests(server)) >= 5, "all queued")
        server.json("DELETE", "/v2/models/tiny/requests/first")
        assert first.result()[0] == 499
        # A whole batch of another kind has nobody to wait for.
        assert all(p["batched"] == 4 and p["timings"]["wait"] < 9 for p in others.result())
