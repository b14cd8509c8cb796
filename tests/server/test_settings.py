"""Settings: each by its variable and by its flag, and one line for each that is wrong."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr, ValidationError

from runtime.errors import StartupError
from runtime.families.base import Limits
from runtime.settings import Settings, child_environment, compile_caches, default_text, load
from runtime.storage.options import StorageOptions

# field -> (how a person writes it, what it becomes); never the default
GOOD: dict[str, tuple[str, Any]] = {
    "model_id": ("file:///models/x", "file:///models/x"),
    "model_path": ("/models/y", "/models/y"),
    "model_name": ("glm-image", "glm-image"),
    "model_aliases": (" a, b,,c ", ("a", "b", "c")),
    "cache_dir": ("/cache", "/cache"),
    "load_mode": ("Stream", "stream"),
    "download_threads": ("4", 4),
    "aws_s3_endpoint": ("https://s3.example.com", "https://s3.example.com"),
    "aws_endpoint_url": ("https://s3.example.com", "https://s3.example.com"),
    "s3_endpoint": ("s3.example.com", "s3.example.com"),
    "aws_s3_bucket": ("models", "models"),
    "aws_default_region": ("eu-central-1", "eu-central-1"),
    "s3_use_https": ("0", False),
    "s3_verify_ssl": ("0", False),
    "aws_ca_bundle": ("/tls/ca.crt", "/tls/ca.crt"),
    "aws_anonymous": ("True", True),
    "storage_config": ('{"type": "s3"}', SecretStr('{"type": "s3"}')),
    "storage_override_config": ('{"bucket": "b"}', SecretStr('{"bucket": "b"}')),
    "hf_hub_offline": ("1", True),
    "hf_endpoint": ("https://hub.example.com", "https://hub.example.com"),
    "hf_token": ("a-secret-token", SecretStr("a-secret-token")),
    "device": ("CPU", "cpu"),
    "dtype": ("BFloat16", "bfloat16"),
    "enable_low_cpu_mem": ("false", "false"),
    "enable_attention_slicing": ("true", "true"),
    "enable_vae_slicing": ("1", "true"),
    "enable_vae_tiling": ("No", "false"),
    "enable_cpu_offload": ("on", "true"),
    "enable_sequential_cpu_offload": ("OFF", "false"),
    "cpu_threads": ("3", 3),
    "attention_backend": ("CuDNN", "cudnn"),
    "token_weights": ("INT8", "int8"),
    "denoiser_weights": ("float8", "float8"),
    "warmup": ("false", False),
    "warmup_sizes": ("1024x768, 64X32", ((1024, 768), (64, 32))),
    "max_batch_size": ("4", 4),
    "max_batch_wait_ms": ("0", 0),
    "max_pixels": ("1048576", 1048576),
    "max_frames": ("81", 81),
    "max_steps": ("60", 60),
    "max_n": ("2", 2),
    "max_prompt_length": ("500", 500),
    "max_instances": ("4", 4),
    "max_source_images": ("2", 2),
    "max_source_image_bytes": ("1000", 1000),
    "max_source_image_pixels": ("2000", 2000),
    "max_body_bytes": ("3000", 3000),
    "max_queue_size": ("7", 7),
    "max_queue_seconds": ("70", 70),
    "max_timeout": ("90", 90),
    "engine_timeout": ("9", 9),
    "idempotency_hold_s": ("11", 11),
    "join_by_request_id": ("True", True),
    "data_dir": ("/data", "/data"),
    "output_uri": ("s3://bucket/results", "s3://bucket/results"),
    "result_ttl_s": ("3601", 3601),
    "job_ttl_s": ("90000", 90_000),
    "result_url_ttl_s": ("61", 61),
    "max_result_bytes": ("1000000", 1_000_000),
    "job_lease_s": ("5", 5),
    "embed_metadata": ("on", True),
    "allowed_image_hosts": (
        "a.example.com, *.B.example.com,c.example:8443",
        ("a.example.com", "*.B.example.com", "c.example:8443"),
    ),
    "enable_ui": ("0", False),
    "api_key": ("one-secret-key", SecretStr("one-secret-key")),
    "api_key_file": ("/run/keys", "/run/keys"),
    "http_port": ("9000", 9000),
    "grpc_port": ("9001", 9001),
    "enable_grpc": ("False", False),
    "grpc_max_send_message_length": ("4000", 4000),
    "grpc_max_receive_message_length": ("5000", 5000),
    "timeout_keep_alive": ("5", 5),
    "ssl_certfile": ("/tls/tls.crt", "/tls/tls.crt"),
    "ssl_keyfile": ("/tls/tls.key", "/tls/tls.key"),
    "enable_docs_url": ("true", True),
    "enable_repository_api": ("1", True),
    "workers": ("1", 1),
    "grace_period": ("60", 60),
    "log_level": ("DEBUG", "debug"),
    "log_format": ("Text", "text"),
    "log_prompts": ("yes", True),
}
ONLY_VALUE = {"workers"}  # whose one legal value is the default

# field -> values that end the start
BAD: dict[str, tuple[str, ...]] = {
    "model_name": ("a/b", "a b", "a:b", "a?b", "a#b"),
    "load_mode": ("streaming", "none"),
    "download_threads": ("0", "257", "many"),
    "s3_use_https": ("maybe",),
    "s3_verify_ssl": ("2",),
    "aws_anonymous": ("anyone",),
    "hf_hub_offline": ("perhaps",),
    "device": ("tpu", "cuda:0"),
    "dtype": ("fp8", "torch.bfloat16"),
    "enable_low_cpu_mem": ("maybe",),
    "enable_attention_slicing": ("2",),
    "enable_vae_slicing": ("tru",),
    "enable_vae_tiling": ("none",),
    "enable_cpu_offload": ("yes please",),
    "enable_sequential_cpu_offload": ("-1",),
    "cpu_threads": ("-1", "two", "1.5"),
    "attention_backend": ("sage",),
    "token_weights": ("int4",),
    "denoiser_weights": ("int8",),
    "warmup": ("maybe", "2"),
    "warmup_sizes": ("1024", "64x", "64x64x9", "-64x64", "0x64"),
    "max_batch_size": ("0", "auto"),
    "max_batch_wait_ms": ("-1", "50ms", "10001"),
    "max_pixels": ("0", "-1", "1e6", "1024x1024"),
    "max_frames": ("0",),
    "max_steps": ("many",),
    "max_n": ("0.5",),
    "max_prompt_length": ("0",),
    "max_instances": ("0",),
    "max_source_images": ("0",),
    "max_source_image_bytes": ("32MB",),
    "max_source_image_pixels": ("0",),
    "max_body_bytes": ("0",),
    "max_queue_size": ("0",),
    "max_queue_seconds": ("0", "soon"),
    "max_timeout": ("0", "1h"),
    "engine_timeout": ("-1",),
    "idempotency_hold_s": ("0",),
    "join_by_request_id": ("perhaps",),
    "result_ttl_s": ("0", "1d"),
    "job_ttl_s": ("-1",),
    "result_url_ttl_s": ("0",),
    "max_result_bytes": ("10Gi",),
    "job_lease_s": ("2", "601"),
    "embed_metadata": ("auto",),
    "allowed_image_hosts": (
        *(
            "*",
            "*.com",
            "https://a.example.com",
            "a.example.com/x",
            "a..b",
            "*.*.a.b",
            "a*.example.com",
            "me@a.example",
        ),
        *("a.example:0", "a.example:65536", "a.example:x", "[::1]", "é.example", "good.example,a b"),
    ),
    "enable_ui": ("maybe",),
    "http_port": ("0", "65536", "http", "80.5"),
    "grpc_port": ("-1",),
    "enable_grpc": ("auto",),
    "grpc_max_send_message_length": ("-1",),
    "grpc_max_receive_message_length": ("x",),
    "timeout_keep_alive": ("0",),
    "enable_docs_url": ("/docs",),
    "enable_repository_api": ("x",),
    "workers": ("0", "2", "auto"),
    "grace_period": ("30s",),
    "log_level": ("loud",),
    "log_format": ("xml",),
    "log_prompts": ("x",),
}
FREE_TEXT = {"model_id", "model_path", "model_aliases", "ssl_certfile", "ssl_keyfile", "api_key", "api_key_file"}
FREE_TEXT |= {"cache_dir", "aws_s3_endpoint", "aws_endpoint_url", "s3_endpoint", "aws_s3_bucket", "aws_default_region"}
FREE_TEXT |= {"data_dir", "output_uri"}
FREE_TEXT |= {"aws_ca_bundle", "storage_config", "storage_override_config", "hf_endpoint", "hf_token"}
ALL_BAD = [(name, value) for name, values in BAD.items() for value in values]


def wrong(argv: list[str] | None = None, **environ: str) -> list[str]:
    with pytest.raises(StartupError) as caught:
        load(argv or [], environ)
    return str(caught.value).split("\n")


def test_the_tables_are_complete() -> None:
    assert set(GOOD) == set(Settings.model_fields)
    assert set(BAD) | FREE_TEXT == set(Settings.model_fields)
    same = {name for name, (_, value) in GOOD.items() if Settings.model_fields[name].default == value}
    assert same == ONLY_VALUE


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("way", ["variable", "flag", "flag=value", "dashed flag", "dashed flag=value"])
def test_each_setting(name: str, way: str) -> None:
    text, value = GOOD[name]
    dashed = name.replace("_", "-")
    argv = {
        "variable": [],
        "flag": [f"--{name}", text],
        "flag=value": [f"--{name}={text}"],
        "dashed flag": [f"--{dashed}", text],
        "dashed flag=value": [f"--{dashed}={text}"],
    }[way]
    settings = load(argv, {name.upper(): text} if way == "variable" else {})
    assert getattr(settings, name) == value
    assert settings == Settings().model_copy(update={name: value})


def test_nothing_given_means_the_defaults() -> None:
    assert load([], {}) == Settings()
    assert Settings().source == "/mnt/models"
    others = {"PATH": "/bin", "model_id": "/lower/case", "HTTP_PORT_": "1"}
    assert load([], others) == Settings()


@pytest.mark.parametrize("blank", ["", " ", "\n"])
def test_a_blank_variable_counts_as_absent(blank: str) -> None:
    assert load([], {name.upper(): blank for name in Settings.model_fields}) == Settings()


def test_a_flag_wins_over_a_variable() -> None:
    names = [name for name in GOOD if name not in BAD and name not in ("model_id", "model_path")]
    names += [name for name in BAD if name not in ONLY_VALUE]
    for name in names:
        text, value = GOOD[name]
        other = BAD.get(name, ("other",))[0]  # even a malformed variable does no harm then
        assert getattr(load([f"--{name}", text], {name.upper(): other}), name) == value
    assert load(["--model_id", "/a"], {"MODEL_ID": "/b"}).source == "/a"
    assert load(["--http_port", "1", "--http-port", "2"], {}).http_port == 2  # the last of two flags


@pytest.mark.parametrize(("name", "value"), ALL_BAD, ids=lambda x: str(x))
def test_a_malformed_value_ends_the_start_with_one_line(name: str, value: str) -> None:
    by_variable, by_flag = wrong(**{name.upper(): value}), wrong([f"--{name}={value}"])
    assert len(by_variable) == len(by_flag) == 1
    assert by_variable[0].startswith(f"{name.upper()}={value}: ")
    assert by_flag[0].startswith(f"--{name}={value}: ")
    assert len(by_variable[0]) > len(f"{name.upper()}={value}: ")


def test_every_malformed_value_is_told_at_once() -> None:
    environ = {name.upper(): values[0] for name, values in BAD.items()}
    lines = wrong(**environ, MODEL_ID="/a", MODEL_PATH="/b")
    told = sorted(line.partition("=")[0] for line in lines)
    assert told == sorted([*environ, "MODEL_ID"])


def test_sizes_to_warm_up_without_a_warm_up_end_the_start() -> None:
    said = "contradict each other; without a warm-up no size is drawn"
    assert wrong(WARMUP="false", WARMUP_SIZES="64x64") == [f"WARMUP=false and WARMUP_SIZES=64x64 {said}"]
    assert wrong(["--warmup", "no"], WARMUP_SIZES="64x64") == [f"--warmup=no and WARMUP_SIZES=64x64 {said}"]
    assert load([], {"WARMUP": "true", "WARMUP_SIZES": "64x64"}).warmup_sizes == ((64, 64),)
    assert load([], {"WARMUP": "false", "WARMUP_SIZES": " "}).warmup_sizes == ()


@pytest.mark.parametrize("name", ["model_name", "http_port", "dtype", "enable_vae_tiling", "log_prompts"])
def test_a_value_of_several_lines_is_told_in_one(name: str) -> None:
    (line,) = wrong(**{name.upper(): "first\nsecond\r\nthird"})
    assert line.startswith(f"{name.upper()}=")
    assert "\r" not in line


def test_a_very_long_value_is_cut() -> None:
    (line,) = wrong(MAX_N="9" * 100_000)
    assert line.startswith("MAX_N=")
    assert len(line) < 500


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--no_such"], "--no_such"),
        (["--no_such", "x"], "--no_such"),
        (["--model_i", "x"], "--model_i"),
        (["--http=80"], "--http"),
        (["--enable-vae-t", "true"], "--enable-vae-t"),
        (["--MODEL_ID", "x"], "--MODEL_ID"),
        (["-m", "x"], "-m"),
        (["x"], "x"),
        (["--http_port"], "--http_port"),
        (["--no-warmup"], "--no-warmup"),
    ],
)
def test_unknown_and_abbreviated_flags_are_refused(argv: list[str], named: str) -> None:
    (line,) = wrong(argv)
    assert named in line
    assert "--help" in line


@pytest.mark.parametrize(
    ("argv", "environ", "source"),
    [
        ([], {"MODEL_PATH": "/b"}, "/b"),
        (["--model_path", "/b"], {}, "/b"),
        ([], {"MODEL_ID": "/a"}, "/a"),
        ([], {"MODEL_ID": "/a", "MODEL_PATH": "/a"}, "/a"),
        (["--model_id", "/a"], {"MODEL_PATH": "/a"}, "/a"),
        ([], {"MODEL_ID": "/a", "MODEL_PATH": ""}, "/a"),
        ([], {"MODEL_ID": "", "MODEL_PATH": "/b"}, "/b"),
        (["--model_path", "/b"], {"MODEL_PATH": "/c"}, "/b"),
    ],
)
def test_model_path_is_another_name_of_model_id(argv: list[str], environ: dict[str, str], source: str) -> None:
    assert load(argv, environ).source == source


@pytest.mark.parametrize(
    ("argv", "environ", "named"),
    [
        ([], {"MODEL_ID": "/a", "MODEL_PATH": "/b"}, ("MODEL_ID=/a", "MODEL_PATH=/b")),
        (["--model_id", "/a"], {"MODEL_PATH": "/b"}, ("--model_id=/a", "MODEL_PATH=/b")),
        (["--model-path=/b"], {"MODEL_ID": "/a"}, ("MODEL_ID=/a", "--model_path=/b")),
        # The default's own spelling is a choice as well.
        ([], {"MODEL_ID": "/mnt/models", "MODEL_PATH": "/b"}, ("MODEL_ID=/mnt/models", "MODEL_PATH=/b")),
    ],
)
def test_model_id_and_model_path_may_not_differ(argv: list[str], environ: dict[str, str], named: tuple[str]) -> None:
    (line,) = wrong(argv, **environ)
    assert all(name in line for name in named)


@pytest.mark.parametrize(
    ("variable", "name"), [("awsAnonymousCredential", "aws_anonymous"), ("TRANSFORMERS_OFFLINE", "hf_hub_offline")]
)
def test_names_that_others_have_for_a_setting(variable: str, name: str) -> None:
    assert getattr(load([], {variable: "1"}), name) is True
    assert getattr(load([], {variable: "1", name.upper(): "false"}), name) is False
    assert wrong(**{variable: "x"})


def test_the_storage_options_are_those_of_the_settings() -> None:
    assert load([], {}).storage == StorageOptions()
    environ = {"STORAGE_CONFIG": '{"secret_access_key": "s3cret"}', "HF_TOKEN": "t0ken", "AWS_S3_BUCKET": "b"}
    storage = load(["--download_threads", "3"], environ).storage
    assert (storage.threads, storage.bucket, storage.hf_token) == (3, "b", "t0ken")
    assert storage.config == environ["STORAGE_CONFIG"]
    assert "s3cret" not in repr(storage) and "t0ken" not in repr(storage)
    assert pickle.loads(pickle.dumps(storage)) == storage


@pytest.mark.parametrize("name", Settings().optimizations)
def test_tristates_read_the_prior_arts_spellings(name: str) -> None:
    spellings = {
        "true": ("true", "True", "TRUE", " true ", "1", "yes", "YES", "on", "On"),
        "false": ("false", "False", "0", "no", "No", "off", "OFF"),
        "auto": ("auto", "AUTO", "Auto "),
    }
    for value, texts in spellings.items():
        for text in texts:
            assert load([], {f"ENABLE_{name.upper()}": text}).optimizations[name] == value
            assert load([f"--enable_{name}", text], {}).optimizations[name] == value


def test_optimizations_are_the_tristates() -> None:
    settings = load([], {"ENABLE_CPU_OFFLOAD": "1"})
    assert settings.optimizations == {
        "low_cpu_mem": "auto",
        "attention_slicing": "auto",
        "vae_slicing": "auto",
        "vae_tiling": "auto",
        "cpu_offload": "true",
        "sequential_cpu_offload": "auto",
    }


def test_kubernetes_own_variables_are_not_ours() -> None:
    injected = {"HTTP_PORT": "tcp://10.0.0.1:80", "GRPC_PORT": "tcp://10.0.0.2:8081"}
    settings = load([], injected)
    assert (settings.http_port, settings.grpc_port) == (8080, 8081)
    assert load(["--http_port", "9"], injected).http_port == 9
    assert wrong(["--http_port", "tcp://10.0.0.1:80"])  # a flag is always meant
    assert wrong(HTTP_PORT="udp://10.0.0.1:80")
    assert load([], {"MODEL_ID": "tcp://x"}).model_id == "tcp://x"  # ports alone


BOOLEANS = [name for name, info in Settings.model_fields.items() if info.annotation is bool]


@pytest.mark.parametrize("name", BOOLEANS)
def test_a_bare_boolean_flag_means_true(name: str) -> None:
    for spelling in (f"--{name}", f"--{name.replace('_', '-')}"):
        assert getattr(load([spelling], {name.upper(): "false"}), name) is True
        settings = load([spelling, "--max_n", "3"], {})
        assert (getattr(settings, name), settings.max_n) == (True, 3)
        assert getattr(load([spelling, "false"], {}), name) is False


@pytest.mark.parametrize("text", ["true", "True", "1", "yes", "on", "false", "FALSE", "0", "no", "off"])
def test_spellings_of_booleans(text: str) -> None:
    assert load([], {"WARMUP": text}).warmup is (text.lower() in ("true", "1", "yes", "on"))


@pytest.mark.parametrize("name", ["http_port", "warmup", "enable_cpu_offload", "dtype", "log_level", "workers"])
def test_blanks_around_a_value_do_no_harm(name: str) -> None:
    """A value from a mounted Secret ends in a line feed."""
    text, value = GOOD[name]
    assert getattr(load([], {name.upper(): f" {text}\n"}), name) == value


def test_settings_are_frozen_and_closed() -> None:
    settings = load([], {})
    with pytest.raises(ValidationError):
        settings.http_port = 1
    with pytest.raises(ValidationError):
        Settings.model_validate({"no_such": 1})


def test_limits_are_those_of_the_settings() -> None:
    assert load([], {}).limits == Limits()
    names = Limits.__dataclass_fields__
    limits = load([], {name.upper(): GOOD[name][0] for name in names}).limits
    assert limits == Limits(**{name: GOOD[name][1] for name in names})


def test_help_tells_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load(["--help"], {})
    assert caught.value.code == 0
    told = "".join(capsys.readouterr().out.split())  # lines are broken at hyphens too
    for name, info in Settings.model_fields.items():
        text = f"{info.description} Default: {default_text(name)}. Variable: {name.upper()}."
        assert "".join(text.split()) in told


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("model_id", "/mnt/models"),
        ("model_path", "not set"),
        ("model_aliases", "model"),
        ("warmup", "true"),
        ("enable_docs_url", "false"),
        ("enable_cpu_offload", "auto"),
        ("http_port", "8080"),
        ("max_pixels", "not set"),
    ],
)
def test_defaults_as_a_person_types_them(name: str, text: str) -> None:
    assert default_text(name) == text
    if text != "not set":
        assert load([f"--{name}", text], {}) == Settings()


def test_every_setting_has_one_line_of_documentation() -> None:
    for name, info in Settings.model_fields.items():
        assert info.description and "\n" not in info.description, name
        assert info.description.endswith("."), name


@pytest.mark.parametrize("made", ["missing", "own", "everybody's", "a link", "a file", "not to be made"])
def test_compiled_kernels_are_kept_where_nobody_else_writes(
    made: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    cache = tmp_path / "cache"
    folder = cache / "compiled"
    if made not in ("missing", "not to be made"):
        cache.mkdir()
    if made in ("own", "everybody's"):
        folder.mkdir()
        folder.chmod(0o2770 if made == "own" else 0o777)
    elif made == "a link":
        folder.symlink_to(tmp_path / "tmp")
    elif made == "a file":
        folder.touch()
    elif made == "not to be made":
        cache.touch()
    found = compile_caches(str(cache))
    home = folder if made in ("missing", "own") else tmp_path / f"tmp/diffusion-runtime-{os.getuid()}-compiled"
    assert found == {"TRITON_CACHE_DIR": f"{home}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{home}/torchinductor"}
    assert home.stat().st_mode & 0o007 == 0
    monkeypatch.setenv("TRITON_CACHE_DIR", "/own")
    assert list(compile_caches(str(cache))) == ["TORCHINDUCTOR_CACHE_DIR"]


def test_the_engine_gets_this_environment_and_the_changes() -> None:
    assert child_environment(OMP_NUM_THREADS="2") == {**os.environ, "OMP_NUM_THREADS": "2"}
