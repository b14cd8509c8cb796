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
