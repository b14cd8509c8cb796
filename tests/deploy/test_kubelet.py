"""A stand-in of kubelet starts the templates' pods: read-only root, any user id, probes, a request, SIGTERM.

By default one service of each group that starts the same process on the same kind of source; DEPLOY_ALL=1 runs all.
The preStop sleep is left out: nothing routes to these pods. The object store is rclone and the Hub a stand-in, both
inside the pod's network.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import pytest
from PIL import Image

from tests.deploy import kubelet
from tests.deploy.kubelet import Pod
from tests.deploy.manifests import merged, services, value_of
from tests.jobs.seaweed import Store, seaweed
from tests.storage.servers import hub_server

pytestmark = pytest.mark.skipif(not kubelet.can_run(), reason="needs root, to make mounts and namespaces")

HURRY = 40  # times faster than the templates' periods; tiny-cpu runs at their own
CONNECTION = {
    "AWS_ACCESS_KEY_ID": "access",
    "AWS_SECRET_ACCESS_KEY": "verysecret",
    "AWS_S3_ENDPOINT": "http://127.0.0.1:9000",
    "AWS_S3_BUCKET": "my-storage",
    "AWS_DEFAULT_REGION": "us-east-1",
}
FAMILY = {"glm-image": "glm-image", "redhat-dog": "sd3", "tiny": "sd15"}
# Services that start the same process but for names and seconds, by what they are run on; the first stands for all.
GROUPS = {
    "folder": (
        ("glm-image-initializer", "glm-image-pvc"),
        ("wan-i2v-a14b-pvc", "wan-t2v-a14b-pvc", "wan-ti2v-5b-pvc"),
        ("redhat-dog", "redhat-dog-pvc"),
    ),
    "store": (
        ("glm-image-s3", "glm-image-keda"),
        ("wan-ti2v-5b-s3", "wan-i2v-a14b-s3", "wan-t2v-a14b-s3"),
    ),
    "jobs": (("wan-t2v-a14b-jobs",),),
    "hub": (("redhat-dog-hf", "glm-image-hf", "tiny-sd-gpu"),),
    "nothing": (("tiny-cpu",),),
}


def chosen(source: str) -> list[str]:
    every = bool(os.environ.get("DEPLOY_ALL"))
    return [name for group in GROUPS[source] for name in (group if every else group[:1])]


def family(name: str) -> str:
    if name.startswith("wan"):
        return name.rsplit("-", 1)[0]
    return next(model for prefix, model in FAMILY.items() if name.startswith(prefix))


def request(name: str, **fields: Any) -> dict[str, Any]:
    body: dict[str, Any] = {"prompt": "a fox", "size": "64x64", "num_inference_steps": 2, "seed": 7, **fields}
    if name.startswith("wan"):
        body["num_frames"] = 5
    if "i2v-a14b" in name:
        picture = io.BytesIO()
        Image.new("RGB", (64, 64), "orange").save(picture, "PNG")
        body["image"] = base64.b64encode(picture.getvalue()).decode()
    return {"instances": [body]}


def check(name: str, answer: tuple[int, bytes]) -> None:
    """A prediction that holds a picture or a video of the size that was asked for."""
    status, content = answer
    assert status == 200, content
    (prediction,) = json.loads(content)["predictions"]
    media = prediction.get("video") or prediction["image"]
    data = io.BytesIO(base64.b64decode(media["b64"]))
    if "video" in prediction:
        with av.open(data) as video:
            frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
        assert len(frames) == 5 and frames[0].shape == (64, 64, 3)
    else:
        with Image.open(data) as picture:
            picture.load()
            assert picture.size == (64, 64)


Run = Callable[..., Pod]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Run]:
    pods: list[Pod] = []

    def pod(name: str, **more: Any) -> Pod:
        pods.append(Pod(name, tmp_path, **more))
        return pods[-1]

    yield pod
    for pod_made in pods:
        pod_made.close()


def whole_life(pod: Pod, hurry: float) -> None:
    """Probes, a request, one that is running when SIGTERM comes, and a clean end in time."""
    pod.start(hurry)
    status = Path(f"/proc/{pod.pid}/status").read_text()
    ids = {line.split(":")[0]: line.split()[1:] for line in status.splitlines()}
    assert set(ids["Uid"]) == {str(pod.uid)} and set(ids["Gid"]) == {"0"} and ids["Groups"] == []
    assert int(ids["CapEff"][0], 16) == int(ids["CapBnd"][0], 16) == 0 and ids["NoNewPrivs"] == ["1"]
    assert ids["NSpid"][-1] == "1"
    path, listed = f"/v1/models/{pod.name}:predict", f"/v2/models/{pod.name}/requests"
    check(pod.name, pod.call("POST", path, request(pod.name)))
    assert pod.call("GET", "/metrics")[0] == 200
    grpc = pod.container["ports"][1]["containerPort"]
    pod.inside(lambda: socket.create_connection(("127.0.0.1", grpc), 5).close())
    engine = pod.engine()
    engine.suspend()  # so that the request is not over before the signal
    running = pod.later("POST", path, request(pod.name, num_inference_steps=16))
    while not any(r["state"] == "running" for r in json.loads(pod.call("GET", listed)[1])["requests"]):
        assert not running.done()
    code, seconds = pod.terminate(then=engine.resume)
    check(pod.name, running.result())
    assert code == 0, pod.text()
    assert seconds <= int(value_of(pod.container, "grace_period") or 0)
    assert not pod.misses
    # The log is JSON lines and nothing complains about a place it may not write to.
    lines = [json.loads(line) for line in pod.text().splitlines()[1:]]  # after the sandbox's own
    assert not [line for line in lines if line.get("level") in ("WARNING", "ERROR")], pod.text()


@pytest.mark.parametrize("name", chosen("folder"))
def test_a_model_in_a_folder(make: Run, tiny_models: Path, name: str) -> None:
    whole_life(make(name, models=tiny_models / family(name)), HURRY)


@pytest.mark.parametrize("name", chosen("store"))
def test_a_model_in_the_object_store(make: Run, tiny_models: Path, tmp_path: Path, name: str) -> None:
    pod = make(name, secrets={"aws-connection-my-storage": CONNECTION})
    (address,) = [a for a in pod.container["args"] if a.startswith("--model_id=")]
    prefix = address.removeprefix("--model_id=s3://$(AWS_S3_BUCKET)/")
    assert prefix != address and prefix.endswith("/")
    shutil.copytree(tiny_models / family(name), tmp_path / "store" / CONNECTION["AWS_S3_BUCKET"] / prefix)
    with pod.store(tmp_path / "store", CONNECTION):
        whole_life(pod, HURRY)
        told = pod.text()
    assert CONNECTION["AWS_SECRET_ACCESS_KEY"] not in told


@pytest.mark.parametrize("name", chosen("jobs"))
def test_jobs_in_the_object_store(make: Run, tiny_models: Path, tmp_path: Path, name: str) -> None:
    """SeaweedFS in the pod's network: the model is read from it, a job and its video lie in it."""
    keys = {"keys": "first-secret-key\nsecond-secret-key\n"}
    pod = make(name, secrets={"aws-connection-my-storage": CONNECTION, "diffusion-api-keys": keys})
    key = {"X-API-Key": "second-secret-key"}
    with contextlib.ExitStack() as stack:
        store: Store = pod.inside(lambda: stack.enter_context(seaweed(tmp_path / "seaweed")))
        bucket = CONNECTION["AWS_S3_BUCKET"]

        def fill() -> None:
            store.make_bucket(bucket)
            with contextlib.closing(store.client()) as client:
                for file in (tiny_models / family(name)).rglob("*"):
                    if file.is_file():
                        place = f"models/wan-t2v-a14b/{file.relative_to(tiny_models / family(name)).as_posix()}"
                        client.upload_file(str(file), bucket, place)

        def kept() -> list[str]:
            with contextlib.closing(store.client()) as client:
                listed = client.list_objects_v2(Bucket=bucket, Prefix=f"jobs/{name}/")
                return [entry["Key"] for entry in listed.get("Contents", [])]

        pod.inside(fill)
        pod.more |= {**store.env}
        pod.start(HURRY)
        video = {"prompt": "a fox", "size": "64x64", "num_inference_steps": 2, "seed": 7, "num_frames": 5}
        assert pod.call("POST", "/v1/videos", video)[0] == 401
        status, content = pod.call("POST", "/v1/videos", video, headers=key)
        assert status == 200, content
        place = f"/v1/videos/{json.loads(content)['id']}"
        while (job := json.loads(pod.call("GET", place, headers=key)[1]))["status"] in ("queued", "in_progress"):
            time.sleep(0.2)
        assert job["status"] == "completed", job
        status, data = pod.call("GET", f"{place}/content", headers=key)
        assert status == 200
        with av.open(io.BytesIO(data)) as opened:
            assert sum(1 for _ in opened.decode(video=0)) == 5
        assert any(entry.endswith(".mp4") for entry in pod.inside(kept))
        code, _ = pod.terminate()
        assert code == 0 and not pod.misses, pod.text()
    assert store.secret not in pod.text() and "second-secret-key" not in pod.text()
    assert not list((tmp_path / "volumes" / "data").iterdir()), "nothing is kept in the pod"


@pytest.mark.parametrize("name", chosen("hub"))
def test_a_model_of_the_hub(make: Run, tiny_models: Path, tmp_path: Path, name: str) -> None:
    """HF_ENDPOINT points at the stand-in; everything else is the template's."""
    pod = make(name, secrets={"hf-token": {"HF_TOKEN": "hf_secret"}})
    (address,) = [a for a in pod.container["args"] if a.startswith("--model_id=")]
    shutil.copytree(tiny_models / family(name), tmp_path / "hub" / address.removeprefix("--model_id=hf://"))
    with contextlib.ExitStack() as stack:
        hub = pod.inside(lambda: stack.enter_context(hub_server(tmp_path / "hub")))
        hub.token = "hf_secret"
        pod.more["HF_ENDPOINT"] = hub.url
        whole_life(pod, HURRY)
    assert "hf_secret" not in pod.text()
    assert any((tmp_path / "volumes" / "cache").rglob("*.safetensors")), "a restart finds the weights"


@pytest.mark.parametrize("name", chosen("nothing"))
def test_the_tiny_model_writes_itself_and_is_probed_in_time(make: Run, name: str) -> None:
    """At the template's own periods, from the shell in front of the runtime to the end."""
    whole_life(make(name), hurry=1)


def test_the_groups_start_the_same_process_and_leave_nobody_out() -> None:
    def process(name: str) -> str:
        container = merged(name)["container"]
        parts = json.dumps([container.get(key) for key in ("command", "args", "env", "envFrom", "lifecycle")])
        return re.sub(r'model_id=[^"]*|"\d+"', "X", parts.replace(name, "NAME"))

    groups = [group for several in GROUPS.values() for group in several]
    assert sorted(name for group in groups for name in group) == sorted(services())
    for first, *others in groups:
        assert all(process(other) == process(first) for other in others), first


def test_the_root_is_read_only_for_the_pod(make: Run, tiny_models: Path) -> None:
    """The sandbox itself: what the tests above rely on."""
    pod = make("redhat-dog", models=tiny_models / "sd3")
    inside = ["nsenter", f"--target={pod.pid}", "--mount", "--pid", f"--root=/proc/{pod.pid}/root"]
    user = ["setpriv", f"--reuid={pod.uid}", "--regid=0", "--clear-groups", "--inh-caps=-all", "--bounding-set=-all"]
    places = "/ /data /app /opt/venv /mnt/models /usr /etc /tmp /dev/shm"
    script = f"for d in {places}; do touch $d/x 2>/dev/null && echo $d; done; :"
    done = subprocess.run([*inside, *user, "sh", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["/data", "/tmp", "/dev/shm"]
