"""Steps of a Data Science Pipeline that draws with a served model: read prompts, generate, contact sheet, upload.

Each function is a step of its own: KFP copies its source into a container, so its imports stand inside.
`generate` needs nothing but the standard library and may be used alone, in any pipeline.
"""

from kfp import dsl

BASE_IMAGE = "registry.access.redhat.com/ubi9/python-312:9.6"
BOTO3 = "boto3==1.44.5"
PILLOW = "pillow==13.0.0"


@dsl.component(base_image=BASE_IMAGE, packages_to_install=[BOTO3])
def read_prompts(bucket: str, key: str, prompts: dsl.Output[dsl.Dataset]) -> None:
    """Fetch a CSV of prompts from the object store that the data connection in the environment names."""
    import os

    import boto3

    store = boto3.client("s3", endpoint_url=os.environ.get("AWS_S3_ENDPOINT") or None)
    store.download_file(bucket or os.environ["AWS_S3_BUCKET"], key, prompts.path)


@dsl.component(base_image=BASE_IMAGE)
def generate(
    prompts: dsl.Input[dsl.Dataset],
    media: dsl.Output[dsl.Artifact],
    service_url: str,
    model_name: str = "model",
    defaults: dict = {},  # noqa: B006 (KFP reads it, nobody changes it)
    patience_s: int = 3600,
    token_file: str = "",
) -> int:
    """Draw each line of a CSV through the service's v1 protocol; the number of results is the output.

    Columns: prompt; key, the result's name (made from the prompt when empty); every other column is a field of the
    request where it is not empty (negative_prompt, width, height, seed, num_inference_steps, ...). `defaults` holds
    fields for all lines. A request carries an idempotency key, so that a retry, of the call or of the whole step,
    joins the drawing that runs or gets its result. 429 and 503 are waited out as Retry-After says, up to `patience_s`
    seconds a line. A line that the service refuses fails the step at its end, when the others are drawn.
    """
    import base64
    import csv
    import hashlib
    import json
    import pathlib
    import re
    import time
    import urllib.error
    import urllib.request

    def ask(body: bytes, headers: dict[str, str]) -> dict:
        """The answer of the service. Raises RuntimeError with the reason once waiting is of no use."""
        address = f"{service_url.rstrip('/')}/v1/models/{model_name}:predict"
        deadline, pause = time.monotonic() + patience_s, 1.0
        while True:
            request = urllib.request.Request(address, body, headers)
            try:
                with urllib.request.urlopen(request, timeout=patience_s) as answer:
                    return json.load(answer)
            except urllib.error.HTTPError as error:
                with error:
                    reason = f"{error.code}: {error.read(2000).decode(errors='replace')}"
                    wait = error.headers.get("Retry-After", "")
                if error.code not in (429, 502, 503):
                    raise RuntimeError(reason) from None
                delay = float(wait) if wait.isdigit() else pause
            except OSError as error:  # no connection, or it broke: the key makes asking again harmless
                reason, delay = f"{type(error).__name__}: {error}", pause
            if time.monotonic() + delay > deadline:
                raise RuntimeError(f"gave up after {patience_s} s; the last answer was {reason}")
            print(f"waiting {delay:g} s after {reason}", flush=True)
            time.sleep(delay)
            pause = min(pause * 2, 30.0)

    def value(text: str) -> object:
        """Numbers and booleans as JSON has them, everything else as it is written."""
        try:
            parsed = json.loads(text)
        except ValueError:
            return text
        return parsed if isinstance(parsed, (int, float)) else text

    folder = pathlib.Path(media.path)
    folder.mkdir(parents=True, exist_ok=True)
    with pathlib.Path(prompts.path).open(newline="", encoding="utf-8-sig") as file:
        lines = [{k: v.strip() for k, v in line.items() if k and v and v.strip()} for line in csv.DictReader(file)]
    if not lines or any("prompt" not in line for line in lines):
        raise ValueError("the CSV needs a column `prompt`, and a prompt in every line")
    token = pathlib.Path(token_file).read_text().strip() if token_file else ""
    results, failures = [], []
    for number, line in enumerate(lines, 1):
        key = line.pop("key", "") or f"{number:04d}-" + re.sub(r"[^a-z0-9]+", "-", line["prompt"].lower())[:60].strip(
            "-"
        )
        key = "/".join(part for part in re.sub(r"[^\w./-]", "_", key).split("/") if part not in ("", ".", ".."))
        fields = {**defaults, **{k: v if "prompt" in k else value(v) for k, v in line.items()}}
        body = json.dumps({"instances": [fields]}, sort_keys=True).encode()
        headers = {
            "Content-Type": "application/json",
            "Idempotency-Key": hashlib.sha256(f"{number} {model_name} ".encode() + body).hexdigest(),
        }
        if token:
            headers["Authorization"] = f"Bearer {token}"
        try:
            (prediction,) = ask(body, headers)["predictions"]
        except RuntimeError as error:
            failures.append(f"line {number} ({line['prompt'][:60]!r}): {error}")
            print(failures[-1], flush=True)
            continue
        content = prediction.pop("video", None) or prediction["image"]
        for unneeded in ("image", "images", "videos"):
            prediction.pop(unneeded, None)
        kind = content["format"].lower()
        path = folder / (key if key.endswith(f".{kind}") else f"{key}.{kind}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(content["b64"]))
        results.append({"file": path.relative_to(folder).as_posix(), **prediction})
        print(f"{number} of {len(lines)}: {results[-1]['file']}", flush=True)
    (folder / "index.json").write_text(json.dumps(results, indent=1))
    if failures:
        raise RuntimeError(f"{len(failures)} of {len(lines)} lines were not drawn: " + "; ".join(failures))
    return len(results)


@dsl.component(base_image=BASE_IMAGE, packages_to_install=[PILLOW])
def contact_sheet(media: dsl.Input[dsl.Artifact], sheet: dsl.Output[dsl.HTML], title: str = "Contact sheet") -> None:
    """One HTML page of all results: thumbnails inside, links to the files beside it."""
    import base64
    import html
    import io
    import json
    import pathlib

    from PIL import Image

    folder = pathlib.Path(media.path)
    cells = []
    for result in json.loads((folder / "index.json").read_text()):
        name = html.escape(result["file"], quote=True)
        if name.endswith(".mp4"):
            shown = f'<video src="{name}" controls preload="metadata"></video>'
        else:
            thumbnail = io.BytesIO()
            with Image.open(folder / result["file"]) as picture:
                picture = picture.convert("RGB")
                picture.thumbnail((320, 320))
                picture.save(thumbnail, "JPEG", quality=85)
            data = base64.b64encode(thumbnail.getvalue()).decode()
            shown = f'<a href="{name}"><img src="data:image/jpeg;base64,{data}" alt=""></a>'
        told = f"{result['width']}x{result['height']}, seed {result['seed']}"
        cells.append(
            f"<figure>{shown}<figcaption>{html.escape(result['prompt'])}<br><small>{told}</small></figcaption></figure>"
        )
    style = (
        "body{font:14px sans-serif}main{display:flex;flex-wrap:wrap;gap:16px}"
        "figure{width:320px;margin:0}img,video{max-width:320px}"
    )
    page = f"<h1>{html.escape(title)}</h1><main>{''.join(cells)}</main>"
    pathlib.Path(sheet.path).write_text(
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{style}</style>{page}</html>\n"
    )


@dsl.component(base_image=BASE_IMAGE, packages_to_install=[BOTO3])
def upload(media: dsl.Input[dsl.Artifact], sheet: dsl.Input[dsl.HTML], bucket: str, prefix: str) -> str:
    """Put the results and the contact sheet under a prefix of the object store; the sheet's address is the output."""
    import mimetypes
    import os
    import pathlib

    import boto3

    store = boto3.client("s3", endpoint_url=os.environ.get("AWS_S3_ENDPOINT") or None)
    bucket = bucket or os.environ["AWS_S3_BUCKET"]
    prefix = prefix.strip("/")
    folder = pathlib.Path(media.path)
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    files["index.html"] = pathlib.Path(sheet.path)
    for name, path in sorted(files.items()):  # the page comes with the files it links to
        kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
        store.upload_file(str(path), bucket, f"{prefix}/{name}", ExtraArgs={"ContentType": kind})
    return f"s3://{bucket}/{prefix}/index.html"


@dsl.component(base_image=BASE_IMAGE)
def generate_video_job(
    prompt: str,
    media: dsl.Output[dsl.Artifact],
    service_url: str,
    fields: dict = {},  # noqa: B006 (KFP reads it, nobody changes it)
    name: str = "video",
    patience_s: int = 14400,
    unreachable_s: int = 1800,
    token_file: str = "",
    api_key_file: str = "",
) -> str:
    """Make one long video as a job of the service; the job's id is the output.

    `fields` are those of POST /v1/videos beside the prompt (size, seconds, num_frames, seed, ...). The video comes as
    NAME.mp4 into `media`, with an index.json as `generate` writes it, for `contact_sheet` and `upload`. Nothing hangs
    on one connection: progress is printed while the job runs, and a service that cannot be reached is asked again for
    `unreachable_s` seconds. A retry of the step finds its job again by an idempotency key, unless that job has failed:
    then it makes a new one. When `patience_s` seconds have passed, when the step is stopped (SIGTERM) and on every
    other failure the job is cancelled, so that no GPU works for nobody; killed without a signal, it runs on for the
    retry.
    """
    import contextlib
    import hashlib
    import http.client
    import json
    import pathlib
    import re
    import shutil
    import signal
    import sys
    import time
    import urllib.error
    import urllib.request

    base = f"{service_url.rstrip('/')}/v1/videos"
    folder = pathlib.Path(media.path)
    deadline = time.monotonic() + patience_s
    headers = {"Content-Type": "application/json"}
    if token_file:
        headers["Authorization"] = f"Bearer {pathlib.Path(token_file).read_text().strip()}"
    if api_key_file:
        headers["X-API-Key"] = pathlib.Path(api_key_file).read_text().split()[0]

    class Refused(Exception):
        """The service's final word: `status` and its reason."""

        def __init__(self, status: int, reason: str) -> None:
            super().__init__(f"{status}: {reason}")
            self.status = status

    def ask(method: str, address: str, take, body: bytes | None = None, **more: str):
        """What `take` makes of the answer; what may pass is waited for. Raises Refused, TimeoutError."""
        pause, lost = 1.0, None
        while True:
            request = urllib.request.Request(address, body, {**headers, **more}, method=method)
            try:
                with urllib.request.urlopen(request, timeout=60) as answer:
                    return take(answer)
            except urllib.error.HTTPError as error:
                with error:
                    reason, wait = error.read(2000).decode(errors="replace"), error.headers.get("Retry-After", "")
                if error.code not in (429, 502, 503, 504):
                    raise Refused(error.code, reason) from None
                reason, delay = f"{error.code}: {reason}", float(wait) if wait.isdigit() else pause
                lost = None if error.code == 429 else lost or time.monotonic()
            except (
                OSError,
                ValueError,
                http.client.HTTPException,
            ) as error:  # no connection, or it broke in the middle
                reason, delay, lost = f"{type(error).__name__}: {error}", pause, lost or time.monotonic()
            now = time.monotonic()
            if now + delay > deadline or (lost is not None and now + delay > lost + unreachable_s):
                raise TimeoutError(f"gave up; the last answer was {reason}")
            print(f"waiting {delay:g} s after {reason}", flush=True)
            time.sleep(delay)
            pause = min(pause * 2, 30.0)

    def told(answer) -> tuple[dict, float]:
        """A video object, and the seconds after which to ask again."""
        wait = answer.headers.get("openai-poll-after-ms", "")
        return json.load(answer), min(float(wait) / 1000 if wait.isdigit() else 5.0, 30.0)

    def save(answer) -> None:
        part = folder / f"{file}.part"
        with part.open("wb") as target:
            shutil.copyfileobj(answer, target)
        if part.stat().st_size != int(answer.headers["Content-Length"]):
            raise OSError("the video broke off")
        part.rename(folder / file)

    file = re.sub(r"[^\w.-]", "_", name).lstrip(".").removesuffix(".mp4") + ".mp4"
    body = json.dumps({**fields, "prompt": prompt}, sort_keys=True).encode()
    digest = hashlib.sha256(f"{name} ".encode() + body).hexdigest()
    folder.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    job: dict = {}
    try:
        for attempt in range(100):  # the same body is the same job, until that has failed or its video is gone
            job, wait = ask("POST", base, told, body, **{"Idempotency-Key": f"{digest}-{attempt}"})
            if job["status"] != "failed" and (not job.get("expires_at") or job["expires_at"] > time.time() + 60):
                break
        print(f"job {job['id']}: {job['status']}", flush=True)
        line = ""
        while job["status"] in ("queued", "in_progress"):
            if time.monotonic() > deadline:
                raise TimeoutError(f"job {job['id']} is not done after {patience_s} s")
            time.sleep(wait)
            job, wait = ask("GET", f"{base}/{job['id']}", told)
            eta = f", {job['eta_seconds']:.0f} s to go" if job.get("eta_seconds") else ""
            told_now = f"{job['status']} {job['progress']} %"
            if told_now != line:
                line = told_now
                print(f"job {job['id']}: {line}{eta}", flush=True)
        if job["status"] != "completed":
            raise RuntimeError(f"job {job['id']} failed: {job['error']['code']}: {job['error']['message']}")
        ask("GET", f"{base}/{job['id']}/content", save)
    except BaseException:
        if job.get("status") in ("queued", "in_progress"):
            print(f"cancelling job {job['id']}", flush=True)
            with contextlib.suppress(Exception):
                request = urllib.request.Request(f"{base}/{job['id']}", None, headers, method="DELETE")
                urllib.request.urlopen(request, timeout=20).close()
        raise
    width, height = map(int, job["size"].split("x"))
    kept = {k: v for k, v in job.items() if k in ("seed", "num_frames", "fps", "seconds", "model", "model_revision")}
    entry = {"file": file, "prompt": prompt, "width": width, "height": height, "job": job["id"], **kept}
    (folder / "index.json").write_text(json.dumps([entry], indent=1))
    print(f"{file}: {(folder / file).stat().st_size} bytes", flush=True)
    return job["id"]
