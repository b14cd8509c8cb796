"""Getting a model from S3: where credentials come from, what is fetched, and a line for everything that is wrong."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest

from runtime.errors import StartupError
from runtime.storage.options import StorageOptions
from runtime.storage.registry import resolve
from runtime.storage.s3 import connection_of, parse, uploader
from tests.storage.conftest import NEEDED, content
from tests.storage.servers import KEY, SECRET, Fault, rclone


@pytest.fixture
def uri(model, bucket) -> str:
    shutil.copytree(model, bucket / "Wan2.2")
    return f"s3://{bucket.name}/Wan2.2"


def refused(uri: str, options: StorageOptions) -> str:
    with pytest.raises(StartupError) as raised:
        resolve(uri, options)
    text = str(raised.value)
    assert "\n" not in text and SECRET not in text and "X-Amz" not in text and "wrong-secret" not in text
    return text


def test_siblings_of_the_prefix_are_not_fetched(uri, bucket, options):
    evil = bucket / "Wan2.2-x/transformer"
    evil.mkdir(parents=True)
    (evil / "config.json").write_text("sibling")
    assert sorted(content(resolve(uri, options()))) == NEEDED
    assert "nothing there" in refused(uri[:-1], options())


def test_empty_objects_are_kept(uri, options):
    assert (resolve(uri, options()) / "tokenizer/empty.txt").read_bytes() == b""


def storage_config(store, **changes) -> str:
    config = {
        "type": "s3",
        "access_key_id": KEY,
        "secret_access_key": SECRET,
        "endpoint_url": store.endpoint,
        "region": "us-east-1",
    }
    return json.dumps({**config, **changes})


@pytest.mark.parametrize("way", ["data connection", "kserve secret", "aws", "storage config", "overridden", "profile"])
def test_credentials_in_each_way_they_are_injected(way, uri, s3, bucket, options, monkeypatch, tmp_path):
    keys = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET}
    none = dict.fromkeys(s3.environment)
    host = s3.endpoint.removeprefix("http://")
    if way == "data connection":
        chosen = options(AWS_S3_BUCKET=bucket.name)
        uri = "s3:///Wan2.2"
    elif way == "kserve secret":
        chosen = options(**{**none, **keys, "S3_ENDPOINT": host, "S3_USE_HTTPS": "0", "AWS_ENDPOINT_URL": s3.endpoint})
    elif way == "aws":
        chosen = options(**{**none, **keys, "AWS_ENDPOINT_URL": s3.endpoint})
    elif way == "storage config":
        chosen = options(**none, STORAGE_CONFIG=storage_config(s3, bucket=bucket.name))
        uri = "s3:///Wan2.2"
    elif way == "overridden":
        config = storage_config(s3, bucket="none", endpoint_url="http://127.0.0.1:9")
        override = json.dumps({"bucket": bucket.name, "endpoint_url": s3.endpoint})
        chosen = options(**none, STORAGE_CONFIG=config, STORAGE_OVERRIDE_CONFIG=override)
        uri = "s3:///Wan2.2"
    else:
        profile = f"[default]\naws_access_key_id = {KEY}\naws_secret_access_key = {SECRET}\n"
        (tmp_path / "credentials").write_text(profile)
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
        chosen = options(**{**none, "AWS_S3_ENDPOINT": s3.endpoint})
    assert sorted(content(resolve(uri, chosen))) == NEEDED


@pytest.mark.parametrize("how", ["AWS_ANONYMOUS", "awsAnonymousCredential", "STORAGE_CONFIG"])
def test_anonymous(how, model, bucket, options, tmp_path, s3):
    with rclone(tmp_path / "open", auth=False) as store:
        shutil.copytree(model, store.folder / "b/m")
        none = dict.fromkeys(s3.environment)
        value = json.dumps({"type": "s3", "anonymous": True}) if how == "STORAGE_CONFIG" else "true"
        folder = resolve("s3://b/m", options(**{**none, "AWS_S3_ENDPOINT": store.endpoint, how: value}))
        assert sorted(content(folder)) == NEEDED
    closed = options(**{**none, "AWS_S3_ENDPOINT": s3.endpoint, how: value})
    assert "access denied" in refused(f"s3://{bucket.name}/m", closed)


def test_no_credentials(uri, options, s3):
    none = dict.fromkeys(s3.environment)
    assert "no credentials; set AWS_ACCESS_KEY_ID" in refused(uri, options(**{**none, "AWS_S3_ENDPOINT": s3.endpoint}))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "wrong-secret"}, "AWS_SECRET_ACCESS_KEY does not belong"),
        ({"AWS_ACCESS_KEY_ID": "OTHERKEY"}, "does not know this AWS_ACCESS_KEY_ID"),
        ({"AWS_S3_ENDPOINT": "http://user:wrong-secret@host"}, "no URL such as"),
        ({"AWS_S3_ENDPOINT": "ftp://host"}, "no URL such as"),
        ({"AWS_ENDPOINT_URL": "http://other"}, "name different endpoints"),
        ({"STORAGE_CONFIG": "{"}, "STORAGE_CONFIG: not valid JSON"),
        ({"STORAGE_CONFIG": "[1]"}, "STORAGE_CONFIG: is no JSON object"),
        ({"STORAGE_CONFIG": '{"type": "gs"}'}, "of type 'gs'"),
        ({"STORAGE_OVERRIDE_CONFIG": "x"}, "STORAGE_OVERRIDE_CONFIG: not valid JSON"),
        ({"AWS_DEFAULT_REGION": "not a region"}, "s3://"),
    ],
)
def test_wrong_configuration(changes, said, uri, options):
    assert said in refused(uri, options(**changes))


@pytest.mark.parametrize(
    ("model_id", "said"),
    [
        ("s3://no-such-bucket-here/x", "no such bucket"),
        ("s3:///x", "AWS_S3_BUCKET is not set"),
        ("s3://", "AWS_S3_BUCKET is not set"),
        ("s3://KEY:wrong-secret@bucket/x", "credentials do not belong in it"),
        ("s3://b\n/x", "is no s3://bucket/prefix"),
        ("s3://b/x\ny", "is no s3://bucket/prefix"),
        ("s3://b b/x", "is no s3://bucket/prefix"),
    ],
)
def test_wrong_uris(model_id, said, options):
    assert said in refused(model_id, options())


def test_no_such_prefix(bucket, options):
    assert "nothing there" in refused(f"s3://{bucket.name}/none", options())


@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        ("AccessDenied", 403, "access denied"),
        ("RequestTimeTooSkewed", 403, "clock"),
        ("ExpiredToken", 400, "expired"),
        ("PermanentRedirect", 301, "AWS_DEFAULT_REGION"),
        ("Odd", 418, "the store answered 418 Odd"),
    ],
)
@pytest.mark.parametrize("path", ["listing", "vae/diffusion"])
def test_what_the_store_refuses(code, status, said, path, uri, options, proxy):
    body = f"<Error><Code>{code}</Code><Message>m</Message></Error>".encode()
    proxy.faults = [Fault("answer", path, times=99, status=status, body=body)]
    text = refused(uri, options(AWS_S3_ENDPOINT=proxy.url))
    assert said in text
    assert path == "listing" or "vae/diffusion_pytorch_model.safetensors" in text


def test_an_endpoint_that_is_not_there(uri, options, monkeypatch):
    monkeypatch.setattr("runtime.storage.fetch.LONGEST_WAIT", 0.01)
    assert "cannot be reached" in refused(uri, options(AWS_S3_ENDPOINT="http://127.0.0.1:9"))


@pytest.mark.filterwarnings("ignore::urllib3.exceptions.InsecureRequestWarning")
def test_tls(model, options, tmp_path):
    key, cert = tmp_path / "tls.key", tmp_path / "tls.crt"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
            *("-keyout", key, "-out", cert, "-subj", "/CN=x", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2"),
        ],
        check=True,
        capture_output=True,
    )
    with rclone(tmp_path / "tls", "--cert", str(cert), "--key", str(key), scheme="https") as store:
        shutil.copytree(model, store.folder / "b/m")
        at = {"AWS_S3_ENDPOINT": store.endpoint.removeprefix("https://")}  # HTTPS where nothing is said
        text = refused("s3://b/m", options(**at))
        assert "is not trusted" in text and "AWS_CA_BUNDLE" in text
        assert sorted(content(resolve("s3://b/m", options(**at, AWS_CA_BUNDLE=str(cert))))) == NEEDED
        unchecked = options(**at, S3_VERIFY_SSL="0", CACHE_DIR=str(tmp_path / "second"))
        assert sorted(content(resolve("s3://b/m", unchecked))) == NEEDED
        missing = options(**at, AWS_CA_BUNDLE=str(tmp_path / "none"), CACHE_DIR=str(tmp_path / "third"))
        assert "s3://b/m" in refused("s3://b/m", missing)


@pytest.mark.parametrize("key", ["vae/../../../etc/cron.d/x.json", "vae//x.json", "vae/&#10;x.json", "vae/\\x.json"])
def test_a_key_that_could_escape_the_cache(key, uri, options, proxy, tmp_path):
    proxy.replace = (b"Wan2.2/vae/config.json", b"Wan2.2/" + key.encode())
    assert "no name that a model's file may have" in refused(uri, options(AWS_S3_ENDPOINT=proxy.url))
    assert not (tmp_path / "cache").exists()


def test_a_bucket_of_other_things_is_told_early(bucket, options, monkeypatch):
    monkeypatch.setattr("runtime.storage.s3.MAX_FILES", 3)
    for i in range(5):
        (bucket / f"{i}.json").write_text("{}")
    assert "more than 3 objects" in refused(f"s3://{bucket.name}", options())


def test_a_whole_bucket_may_be_the_model(model, bucket, options):
    shutil.copytree(model, bucket, dirs_exist_ok=True)
    assert sorted(content(resolve(f"s3://{bucket.name}", options()))) == NEEDED


def test_uploading_removes_what_an_interrupted_run_has_left(bucket, options, tmp_path):
    """Other weights of a component, their index first of all; nothing else, and nothing where a model lies."""
    (tmp_path / "new").write_text("new")
    for name in (
        "vae/a-00001-of-00002.safetensors",
        "vae/a.safetensors.index.json",
        "vae/x.json",
        "vae/sub/b.safetensors",
    ):
        (bucket / "m" / name).parent.mkdir(parents=True, exist_ok=True)
        (bucket / "m" / name).write_text("old")
    (bucket / "m/vae-x").mkdir()
    (bucket / "m/vae-x/c.safetensors").write_text("old")
    put, clear = uploader(f"s3://{bucket.name}/m", options())
    put(tmp_path / "new", "vae/a.safetensors")
    clear("vae", frozenset({"a.safetensors"}))
    clear("none", frozenset())
    assert content(bucket / "m") == {
        "vae/a.safetensors": b"new",
        "vae/x.json": b"old",
        "vae/sub/b.safetensors": b"old",
        "vae-x/c.safetensors": b"old",
    }
    put(tmp_path / "new", "model_index.json")
    with pytest.raises(StartupError, match="holds a model already"):
        uploader(f"s3://{bucket.name}/m", options())


def test_parse():
    assert parse("s3://b/a/b/", None) == ("b", "a/b/")
    assert parse("s3://b", "other") == ("b", "")
    assert parse("s3:///a b/c", "other") == ("other", "a b/c/")


def test_connections():
    given = connection_of(StorageOptions(s3_endpoint="minio:9000", use_https=False, ca_bundle="/ca"))
    assert (given.endpoint, given.virtual_hosts, given.verify) == ("http://minio:9000", False, "/ca")
    assert connection_of(StorageOptions(s3_endpoint="minio:9000")).endpoint == "https://minio:9000"
    assert connection_of(StorageOptions()).virtual_hosts
    config = '{"type": "s3", "secret_access_key": "s3cret", "verify_ssl": "0", "ca_bundle": "/x", "anonymous": "false"}'
    told = connection_of(StorageOptions(config=config, anonymous=True))
    assert (told.verify, told.anonymous, told.secret_key) == (False, False, "s3cret")
    assert "s3cret" not in repr(told)
