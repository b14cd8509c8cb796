"""An example: prompts in a CSV of the object store, pictures or videos and an HTML contact sheet back into it.

    python pipelines/draw_prompts.py            compile into draw_prompts.yaml, which the dashboard imports
    python pipelines/draw_prompts.py --check    fail when draw_prompts.yaml is not what this compiles to

Needs pipelines/requirements.txt. The steps take the store's address and keys from the data connection's Secret.
"""

import sys
import tempfile
from pathlib import Path

from kfp import compiler, dsl, kubernetes

sys.path.insert(0, str(Path(__file__).resolve().parent))
from components import contact_sheet, generate, read_prompts, upload

CONNECTION = "aws-connection-my-storage"
KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_S3_ENDPOINT", "AWS_DEFAULT_REGION", "AWS_S3_BUCKET")
COMPILED = Path(__file__).with_suffix(".yaml")


@dsl.pipeline(name="draw-prompts", description="Prompts in a CSV, pictures and a contact sheet in the object store")
def draw_prompts(
    service_url: str = "http://glm-image-s3-predictor:8080",
    model_name: str = "model",
    prompts_key: str = "prompts/prompts.csv",
    results_prefix: str = "results/draw-prompts",
    bucket: str = "",
    defaults: dict = {},  # noqa: B006 (KFP reads it, nobody changes it)
    title: str = "Contact sheet",
) -> str:
    """An empty bucket means the data connection's own."""
    read = read_prompts(bucket=bucket, key=prompts_key)
    # Asked again, finished lines come out of the service's memory for a while and the rest is drawn.
    drawn = generate(
        prompts=read.outputs["prompts"], service_url=service_url, model_name=model_name, defaults=defaults
    ).set_retry(2)
    sheet = contact_sheet(media=drawn.outputs["media"], title=title)
    done = upload(media=drawn.outputs["media"], sheet=sheet.outputs["sheet"], bucket=bucket, prefix=results_prefix)
    for task in (read, done):
        kubernetes.use_secret_as_env(task, CONNECTION, {key: key for key in KEYS})
    for task in (read, drawn, sheet, done):
        task.set_caching_options(False)
    return done.output


def compiled() -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pipeline.yaml"
        compiler.Compiler().compile(draw_prompts, str(path))
        return path.read_text()


if __name__ == "__main__":
    if "--check" not in sys.argv[1:]:
        COMPILED.write_text(compiled())
    elif COMPILED.read_text() != compiled():
        sys.exit(f"{COMPILED.name} is out of date; run python pipelines/draw_prompts.py")
