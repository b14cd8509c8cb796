"""Every setting once: its environment variable, its flag, its default and one line of documentation.

`MODEL_ID=/models/x python -m runtime` and `python -m runtime --model_id /models/x` mean the same;
a flag wins over a variable. This module is the only reader of `os.environ`.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import re
import stat
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, ValidationError

from runtime.errors import StartupError, shown
from runtime.families.base import Limits
from runtime.jobs.store import Lifetimes
from runtime.logs import log
from runtime.storage.options import StorageOptions
from runtime.types import Acceleration


def _tristate(value: Any) -> Any:
    """The prior art's spellings of true and false, folded; anything else is left for the check."""
    words = {"1": "true", "yes": "true", "on": "true", "0": "false", "no": "false", "off": "false"}
    return words.get(value.strip().lower(), value.strip().lower()) if isinstance(value, str) else value


def _names(value: Any) -> Any:
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


def _lower(value: Any) -> Any:
    return value.strip().lower() if isinstance(value, str) else value


def _sizes(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    found = []
    for part in _names(value):
        match = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", part.lower())
        if match is None:
            raise ValueError(f"{shown(part)} is no size such as 1024x768")
        found.append((int(match[1]), int(match[2])))
    return tuple(found)


def _path_segment(value: str) -> str:
    if not value or any(c in value for c in "/:?# \t\n"):
        raise ValueError("must be a name without spaces, slashes, colons, ? and #, as it becomes a part of URLs")
    return value


def _hosts(values: tuple[str, ...]) -> tuple[str, ...]:
    for value in values:
        match = re.fullmatch(
            r"(\*\.(?=[^.]+\.))?[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*(:(\d{1,5}))?", value, re.IGNORECASE
        )
        if match is None or not 0 < int(match[4] or 443) < 65536:
            raise ValueError(f"{shown(value)} is none of name, *.example.com and name:port (without https://)")
    return values


# field -> variables of other programs that mean the same
ALSO_READ = {"aws_anonymous": ("awsAnonymousCredential",), "hf_hub_offline": ("TRANSFORMERS_OFFLINE",)}

MOUNT_SECONDS = 5.0  # then a CACHE_DIR that does not answer is done without; until then no port is open

Tristate = Annotated[Literal["auto", "true", "false"], BeforeValidator(_tristate)]
Port = Annotated[int, Field(ge=1, le=65535)]
Positive = Annotated[int, Field(gt=0)]
Names = Annotated[tuple[str, ...], BeforeValidator(_names)]


class Settings(BaseModel):
    """All settings. A field's name in capitals is its environment variable, `--name` its flag."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    # The model
    model_id: str = Field(
        "/mnt/models", description="What to serve: a folder, file://, pvc://, s3://, hf:// or a Hub id (owner/model)."
    )
    model_path: str | None = Field(None, description="Another name of MODEL_ID; both set and different is an error.")
    model_name: Annotated[str, AfterValidator(_path_segment)] = Field(
        "model", description="The model's name in URLs and in requests."
    )
    model_aliases: Names = Field(("model",), description="Further names that requests may use, separated by commas.")

    # Where the model comes from
    cache_dir: str | None = Field(
        None, description="Folder for copies of remote models, a volume at best; unset, one of the container's own."
    )
    load_mode: Annotated[Literal["auto", "cached", "stream"], BeforeValidator(_lower)] = Field(
        "auto", description="Remote weights by way of CACHE_DIR, or streamed to the device."
    )
    download_threads: Annotated[int, Field(ge=1, le=256)] = Field(
        8, description="Ranges that are read at once; each has a buffer of 16 MiB."
    )
    aws_s3_endpoint: str | None = Field(None, description="URL of the S3 store, as OpenShift AI's connections set it.")
    aws_endpoint_url: str | None = Field(None, description="URL of the S3 store, as AWS's own tools read it.")
    s3_endpoint: str | None = Field(None, description="Host of the S3 store, as KServe's Secrets set it.")
    aws_s3_bucket: str | None = Field(None, description="Bucket of s3:///prefix.")
    aws_default_region: str | None = Field(None, description="Region of the S3 store.")
    s3_use_https: bool = Field(True, description="Whether an S3 endpoint without a scheme speaks HTTPS.")
    s3_verify_ssl: bool = Field(True, description="Check the S3 store's certificate.")
    aws_ca_bundle: str | None = Field(None, description="File with the authorities of the S3 store's certificate.")
    aws_anonymous: bool = Field(False, description="Read the bucket without credentials.")
    storage_config: SecretStr | None = Field(
        None, description="JSON of KServe's storage-config Secret; wins over the S3 settings above."
    )
    storage_override_config: SecretStr | None = Field(
        None, description="JSON of storage.parameters; wins over STORAGE_CONFIG."
    )
    hf_hub_offline: bool = Field(False, description="Never ask the Hub; take what is cached.")
    hf_endpoint: str | None = Field(None, description="URL of the Hub or a mirror of it.")
    hf_token: SecretStr | None = Field(None, description="Token for private and gated models of the Hub.")

    # How it is loaded and run
    device: Annotated[Literal["auto", "cuda", "mps", "cpu"], BeforeValidator(_lower)] = Field(
        "auto", description="Where to run; auto takes the first of CUDA, MPS and CPU that is there."
    )
    dtype: Annotated[Literal["auto", "bfloat16", "float16", "float32", "native"], BeforeValidator(_lower)] = Field(
        "auto", description="Number format of the weights; native is the checkpoint's own."
    )
    enable_low_cpu_mem: Tristate = Field("auto", description="Load without a second copy of the weights in memory.")
    enable_attention_slicing: Tristate = Field("auto", description="Compute attention in slices: less memory, slower.")
    enable_vae_slicing: Tristate = Field("auto", description="Decode a batch's pictures one by one.")
    enable_vae_tiling: Tristate = Field("auto", description="Decode in tiles: less memory, visible in the pixels.")
    enable_cpu_offload: Tristate = Field("auto", description="Keep only the running component on the GPU.")
    enable_sequential_cpu_offload: Tristate = Field("auto", description="Keep only the running layer on the GPU.")
    attention_backend: Annotated[Literal["auto", "cudnn", "flash", "flash-attn", "native"], BeforeValidator(_lower)] = (
        Field(
            "auto",
            description="Kernel of the denoiser's attention; auto is GLM-Image's fastest, else diffusers' own.",
        )
    )
    token_weights: Annotated[Literal["auto", "plain", "int8", "float8"], BeforeValidator(_lower)] = Field(
        "auto",
        description="Numbers of GLM-Image's token model; 8 bits change the picture, auto does where it must.",
    )
    denoiser_weights: Annotated[Literal["auto", "plain", "float8"], BeforeValidator(_lower)] = Field(
        "auto", description="Numbers of GLM-Image's DiT; 8 bits change the picture, auto does where it must."
    )
    cpu_threads: int = Field(
        0, ge=0, description="Threads of the engine's CPU arithmetic; 0 takes all CPUs of the container but one."
    )
    warmup: bool = Field(True, description="Make one small picture before READY.")
    warmup_sizes: Annotated[tuple[tuple[int, int], ...], BeforeValidator(_sizes)] = Field(
        (),
        description="Further results that WARMUP makes, of these widths and heights in pixels: 1024x1024,768x1344.",
    )
    max_batch_size: Positive = Field(
        1, description="Most compatible prompts that run together; above 1 a seed's bytes may depend on its company."
    )
    max_batch_wait_ms: Annotated[int, Field(ge=0, le=10_000)] = Field(
        50, description="Milliseconds that an idle device waits for company for a prompt that could run in a batch."
    )

    # What a request may ask for; empty leaves the model family's own limit
    max_pixels: Positive | None = Field(None, description="Largest width x height of a result, in pixels.")
    max_frames: Positive | None = Field(None, description="Longest video, in frames.")
    max_steps: Positive | None = Field(None, description="Most denoising steps.")
    max_n: Positive | None = Field(None, description="Most pictures or videos of one prompt.")
    max_prompt_length: Positive | None = Field(None, description="Longest prompt, in characters.")
    max_instances: Positive = Field(32, description="Most prompts in one call.")
    max_source_images: Positive | None = Field(None, description="Most source pictures of one prompt.")
    max_source_image_bytes: Positive = Field(32 * 2**20, description="Largest source picture, in bytes of its file.")
    max_source_image_pixels: Positive = Field(40_000_000, description="Largest source picture, in pixels.")
    max_body_bytes: Positive = Field(256 * 2**20, description="Largest request body, in bytes.")
    max_queue_size: Positive = Field(256, description="Most prompts that may wait; one more is refused with 429.")
    max_queue_seconds: Positive = Field(
        600, description="Most predicted device seconds that may wait; more is refused with 429."
    )
    max_timeout: Positive = Field(3600, description="Longest and default timeout of a request, in seconds.")
    engine_timeout: Positive = Field(
        60, description="Seconds without a sign of life from the engine, or ten predicted steps, before it is killed."
    )
    idempotency_hold_s: Positive = Field(
        120, description="Seconds that a request with an Idempotency-Key outlives its connection, and its result stays."
    )
    join_by_request_id: bool = Field(
        False, description="Take the id of a request for its idempotency key where it has none."
    )

    # Jobs and results
    data_dir: str | None = Field(
        None,
        description="Folder of jobs and results, a volume at best; unset, a temporary one that ends with the server.",
    )
    output_uri: str | None = Field(
        None,
        description="s3://bucket/prefix for jobs and results instead of DATA_DIR; replicas with the same one share.",
    )
    result_ttl_s: Positive = Field(
        86_400, description="Seconds that the result of a job is kept, at most its record's."
    )
    job_ttl_s: Positive = Field(604_800, description="Seconds that the record of a job is kept.")
    result_url_ttl_s: Positive = Field(
        3600, description="Seconds that the URL of a result works, at most its result's."
    )
    max_result_bytes: Positive = Field(
        10 * 2**30, description="Most bytes of results that are kept; the oldest make room."
    )
    job_lease_s: Annotated[int, Field(ge=3, le=600)] = Field(
        30, description="Seconds without a sign of life after which another server takes over a server's jobs."
    )
    embed_metadata: bool = Field(
        False,
        description="Write model, revision, seed and parameters into PNG and MP4 files; prompts with LOG_PROMPTS.",
    )
    allowed_image_hosts: Annotated[Names, AfterValidator(_hosts)] = Field(
        (),
        description="Hosts, or host:port, that pictures may be fetched from by https; *.example.com is all below it.",
    )
    enable_ui: bool = Field(True, description="Serve a page to try the model at /ui.")

    # The server
    http_port: Port = Field(8080, description="Port of v1, v2 REST, health and metrics.")
    grpc_port: Port = Field(8081, description="Port of v2 gRPC.")
    enable_grpc: bool = Field(True, description="Serve v2 gRPC.")
    grpc_max_send_message_length: Positive = Field(512 * 2**20, description="Largest gRPC response, in bytes.")
    grpc_max_receive_message_length: Positive = Field(256 * 2**20, description="Largest gRPC request, in bytes.")
    timeout_keep_alive: Positive = Field(65, description="Seconds an idle HTTP connection stays open.")
    ssl_certfile: str | None = Field(None, description="Certificate for HTTPS.")
    ssl_keyfile: str | None = Field(None, description="Private key for HTTPS.")
    enable_docs_url: bool = Field(False, description="Serve the OpenAPI page at /docs.")
    enable_repository_api: bool = Field(False, description="Allow /v2/repository load and unload.")
    workers: Annotated[int, Field(ge=1, le=1)] = Field(
        1, description="Server processes; always 1: one engine holds the GPU."
    )
    grace_period: Positive = Field(30, description="Seconds that accepted work may take to finish after SIGTERM.")

    # Access
    api_key: SecretStr | None = Field(
        None, description="Key that a request must carry; several are separated by commas. Unset, none is needed."
    )
    api_key_file: str | None = Field(None, description="File with one such key a line; read again when it changes.")

    # Logs
    log_level: Annotated[Literal["debug", "info", "warning", "error"], BeforeValidator(_lower)] = Field(
        "info", description="Least severity that is logged."
    )
    log_format: Annotated[Literal["auto", "json", "text"], BeforeValidator(_lower)] = Field(
        "auto", description="auto is text on a terminal and JSON elsewhere."
    )
    log_prompts: bool = Field(False, description="Write prompts to the log.")

    @property
    def source(self) -> str:
        """What to serve: MODEL_ID, or MODEL_PATH where only that one is set."""
        return self.model_path if self.model_path is not None else self.model_id

    @property
    def limits(self) -> Limits:
        return Limits(**{name: getattr(self, name) for name in Limits.__dataclass_fields__})

    @property
    def lifetimes(self) -> Lifetimes:
        """Those of URLs, results and records, none longer than what it stands on."""
        result = min(self.result_ttl_s, self.job_ttl_s)
        return Lifetimes(min(self.result_url_ttl_s, result), result, self.job_ttl_s, self.max_result_bytes)

    @property
    def storage(self) -> StorageOptions:
        return StorageOptions(
            cache_dir=self.cache_dir,
            load_mode=self.load_mode,
            threads=self.download_threads,
            aws_endpoint_url=self.aws_endpoint_url,
            aws_s3_endpoint=self.aws_s3_endpoint,
            s3_endpoint=self.s3_endpoint,
            bucket=self.aws_s3_bucket,
            region=self.aws_default_region,
            use_https=self.s3_use_https,
            verify_ssl=self.s3_verify_ssl,
            ca_bundle=self.aws_ca_bundle,
            anonymous=self.aws_anonymous,
            config=_revealed(self.storage_config),
            override_config=_revealed(self.storage_override_config),
            offline=self.hf_hub_offline,
            hf_endpoint=self.hf_endpoint,
            hf_token=_revealed(self.hf_token),
        )

    @property
    def acceleration(self) -> Acceleration:
        return Acceleration(self.attention_backend, self.token_weights, self.denoiser_weights, self.max_batch_size)

    @property
    def optimizations(self) -> dict[str, str]:
        """Name of each optimization, without its ENABLE_, to auto, true or false."""
        return {
            name.removeprefix("enable_"): getattr(self, name)
            for name, info in type(self).model_fields.items()
            if get_args(info.annotation) == ("auto", "true", "false")
        }


def load(argv: Sequence[str] | None = None, environ: Mapping[str, str] | None = None) -> Settings:
    """Settings from flags and variables. Raises StartupError with one line for each one that is wrong."""
    environ = os.environ if environ is None else environ
    flags = vars(_parser().parse_args(sys.argv[1:] if argv is None else argv))
    given: dict[str, tuple[str, str]] = {}  # field -> (how it was named, value)
    for name in Settings.model_fields:
        spellings = (name.upper(), *ALSO_READ.get(name, ()))
        variable = next((v for v in spellings if environ.get(v, "").strip()), spellings[0])
        value = environ.get(variable, "").strip()
        # A Service called "http" makes Kubernetes inject HTTP_PORT=tcp://10.0.0.1:80: not meant for us.
        if value and not (name.endswith("_port") and value.startswith("tcp://")):
            given[name] = (variable, value)
        if flags[name] is not None:
            given[name] = (f"--{name}", flags[name].strip())

    def both(first: str, second: str) -> str:
        return " and ".join(f"{how}={_one_line(value)}" for how, value in (given[first], given[second]))

    lines = []
    if "model_id" in given and "model_path" in given and given["model_id"][1] != given["model_path"][1]:
        lines.append(f"{both('model_id', 'model_path')} name different models; set one of them")
    try:
        settings = Settings.model_validate({name: value for name, (_, value) in given.items()})
    except ValidationError as error:
        for problem in error.errors():
            name = str(problem["loc"][0])
            how, value = given[name]
            lines.append(f"{how}={_one_line(value)}: {problem['msg'].removeprefix('Value error, ')}")
    else:
        if settings.warmup_sizes and not settings.warmup:
            lines.append(f"{both('warmup', 'warmup_sizes')} contradict each other; without a warm-up no size is drawn")
    if lines:
        raise StartupError("\n".join(lines))
    return settings


def child_environment(**changes: str) -> dict[str, str]:
    """This process's environment with `changes` and without the keys, for the engine process."""
    return {**{name: value for name, value in os.environ.items() if name != "API_KEY"}, **changes}


def compile_caches(cache_dir: str | None) -> dict[str, str]:
    """Variables that say where compiled kernels are kept, but for those that the environment has: in CACHE_DIR, where
    they outlive the container, else among the temporary files."""
    home = _own_folder_in_time(Path(cache_dir).absolute() / "compiled") if cache_dir else None
    with contextlib.suppress(OSError):  # there is no temporary directory
        home = home or _own_folder(Path(tempfile.gettempdir(), f"diffusion-runtime-{os.getuid()}-compiled"))
    folders = {"TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "torchinductor"} if home else {}
    return {name: f"{home}/{folder}" for name, folder in folders.items() if not os.environ.get(name)}


def _own_folder_in_time(path: Path) -> Path | None:
    """`_own_folder`, and None for one whose mount hangs: that must not keep the port from opening."""
    found: list[Path | None] = []
    thread = threading.Thread(target=lambda: found.append(_own_folder(path)), name="own-folder", daemon=True)
    thread.start()
    thread.join(MOUNT_SECONDS)
    if not found:
        log(logging.WARNING, f"{path} does not answer; compiled kernels are kept among the temporary files")
        return None
    return found[0]


def _own_folder(path: Path) -> Path | None:
    """The folder, made where it is missing; None where others may have put code there, or nothing may be written."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
        found = path.lstat()
        # A group may write: Kubernetes gives volumes to the pod's own.
        own = found.st_uid == os.getuid() and not found.st_mode & stat.S_IWOTH
        if stat.S_ISDIR(found.st_mode) and own and os.access(path, os.W_OK):
            return path
    return None


def _revealed(secret: SecretStr | None) -> str | None:
    return secret.get_secret_value() if secret is not None else None


def _one_line(value: str) -> str:
    return value if value.isprintable() and len(value) <= 80 else shown(value)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise StartupError(f"{message}; python -m runtime --help lists the flags")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m runtime",
        description="Serve a diffusers pipeline over KServe's v1 and v2 protocols.",
        allow_abbrev=False,  # an abbreviation would change its meaning with the next release's flags
    )
    for name, info in Settings.model_fields.items():
        spellings = list(dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")))
        bare = {"nargs": "?", "const": "true"} if info.annotation is bool else {}
        parser.add_argument(
            *spellings,
            dest=name,
            default=None,
            metavar="VALUE",
            help=f"{info.description} Default: {default_text(name)}. Variable: {name.upper()}.".replace("%", "%%"),
            **bare,  # type: ignore[arg-type]
        )
    return parser


def default_text(name: str) -> str:
    """The default of a setting as a person would type it."""
    default = Settings.model_fields[name].default
    if default is None:
        return "not set"
    if isinstance(default, bool):
        return str(default).lower()
    return ",".join(default) if isinstance(default, tuple) else str(default)
