"""setup.sh against a stand-in of a cluster: a kubectl that keeps what is applied. No cluster is here."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from runtime import __version__
from tests.conftest import ROOT, free_ports
from tests.deploy.test_templates import VALIDATOR

IMAGE = f"quay.io/you/diffusion-runtime:{__version__}"
STORE = ("--endpoint", "https://s3.example.com", "--access-key", "AKIA0", "--secret-key-file")
FAKE = f"""\
#!{sys.executable}
import base64, json, os, sys
from pathlib import Path
import yaml

state = Path(__file__).parent / "state.json"
held = json.loads(state.read_text()) if state.exists() else {{}}
words = sys.argv[1:]
with (Path(__file__).parent / "calls").open("a") as calls:
    calls.write(json.dumps(words) + "\\n")
namespace = words[words.index("-n") + 1] if "-n" in words else ""
if words[0] == "-n":
    words = words[2:]


def key(obj):
    return "/".join((obj["metadata"].get("namespace", namespace), obj["kind"], obj["metadata"]["name"]))


if words[0] in ("apply", "delete") and "-f" in words:
    for obj in yaml.safe_load_all(sys.stdin):
        if obj["kind"] == "Namespace" and os.environ.get("NO_NAMESPACES"):
            sys.exit("forbidden")
        if words[0] == "apply":
            assert namespace in ("", "redhat-ods-applications") or f"/Namespace/{{namespace}}" in held
            held[key(obj)] = obj
        else:
            held.pop(key(obj), None)
elif words[0] == "delete":
    held.pop("/".join((namespace, "Secret", words[-1])), None)
elif words[0] == "get" and words[-1].startswith("jsonpath={{.metadata"):
    obj = held.get(f"/Namespace/{{words[2]}}" if words[1] == "namespace" else f"{{namespace}}/Secret/{{words[2]}}")
    if obj is None:
        sys.exit("not found")
    print(obj["metadata"].get("labels", {{}}).get("app.kubernetes.io/managed-by", ""), end="")
elif words[:2] == ["get", "namespace"]:
    sys.exit(0 if f"/Namespace/{{words[2]}}" in held else "not found")
elif words[0] == "label":
    if os.environ.get("NO_NAMESPACES"):
        sys.exit("forbidden")
    name, _, value = words[4].partition("=")
    held[f"/Namespace/{{words[3]}}"]["metadata"].setdefault("labels", {{}})[name] = value
elif words[0] == "new-project":
    held[f"/Namespace/{{words[1]}}"] = {{"kind": "Namespace", "metadata": {{"name": words[1]}}}}
elif words[0] == "get":
    secret = held.get("/".join((namespace, "Secret", words[2])))
    if secret is None:
        sys.exit("not found")
    field = words[words.index("-o") + 1].removeprefix("jsonpath={{.data.").rstrip("}}")
    print(base64.b64encode(secret["stringData"][field].encode()).decode(), end="")
elif words[0] == "patch":
    (change,) = json.loads(words[words.index("-p") + 1] if "-p" in words else "[]")
    secret = held.get("/".join((namespace, "Secret", words[2])))
    if secret is None:
        sys.exit("not found")
    secret["stringData"].pop(change["path"].removeprefix("/data/"))
else:
    sys.exit(f"the stand-in does not know {{words}}")
state.write_text(json.dumps(held))
"""


class Cluster:
    def __init__(self, folder: Path, cli: str = "kubectl") -> None:
        self.folder, self.cli = folder, folder / cli
        self.cli.write_text(FAKE)
        self.cli.chmod(self.cli.stat().st_mode | stat.S_IXUSR)

    def setup(self, *flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith("AWS_")}
        command = [str(ROOT / "setup.sh"), "--cli", str(self.cli), *flags]
        return subprocess.run(
            command, capture_output=True, text=True, stdin=subprocess.DEVNULL, env={**kept, **environment}
        )

    def held(self) -> dict[str, Any]:
        state: dict[str, Any] = json.loads((self.folder / "state.json").read_text())
        return state

    def hold(self, key: str, obj: dict[str, Any]) -> None:
        state = self.folder / "state.json"
        state.write_text(json.dumps((self.held() if state.exists() else {}) | {key: obj}))

    def names(self) -> set[str]:
        return {key.split("/", 1)[1] for key in self.held()}


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


@pytest.fixture
def secret_file(tmp_path: Path) -> str:
    (tmp_path / "secret").write_text("s3cr3t/key+1\n")
    return str(tmp_path / "secret")


@pytest.mark.parametrize("cli", ["kubectl", "oc"])
def test_the_dry_run_prints_valid_objects_and_asks_nobody(tmp_path: Path, cli: str) -> None:
    cluster = Cluster(tmp_path, cli)
    every = ("--trial-store", "20Gi", "--monitoring", "--template", "--cluster-runtime", "--cache-class", "fast")
    done = cluster.setup("--dry-run", "--image", IMAGE, "--model", "tiny-cpu", "--model", "glm-image-keda", *every)
    assert done.returncode == 0 and not done.stderr
    assert not (tmp_path / "calls").exists(), "a dry run needs no cluster"
    objects = list(yaml.safe_load_all(done.stdout))
    kinds = {o["kind"] for o in objects}
    assert kinds >= {
        "Namespace",
        "Secret",
        "ServiceAccount",
        "Role",
        "RoleBinding",
        "PersistentVolumeClaim",
        "Template",
    }
    assert kinds >= {"ClusterServingRuntime", "InferenceService", "PrometheusRule", "ConfigMap", "Deployment"}
    assert ("PodMonitor" in kinds) == (cli == "kubectl"), "OpenShift AI has a monitor of its own"
    assert "registry.example.com" not in json.dumps(objects) and IMAGE in json.dumps(objects)
    if VALIDATOR.exists():
        (tmp_path / "dry.yaml").write_text(done.stdout)
        checked = subprocess.run([sys.executable, VALIDATOR, tmp_path / "dry.yaml"], capture_output=True, text=True)
        assert checked.returncode == 0, checked.stdout


def test_the_dry_run_is_what_is_applied(cluster: Cluster, secret_file: str) -> None:
    flags = (
        "--image",
        IMAGE,
        *STORE,
        secret_file,
        "--model",
        "glm-image-s3",
        "--monitoring",
        "--namespace",
        "pictures",
    )
    printed = list(yaml.safe_load_all(cluster.setup(*flags, "--dry-run").stdout))
    assert cluster.setup(*flags).returncode == 0
    applied = cluster.held().values()
    assert {(o["kind"], o["metadata"]["name"]) for o in printed} == {
        (o["kind"], o["metadata"]["name"]) for o in applied
    }
    hidden = json.dumps(printed)
    assert "s3cr3t" not in hidden and "s3cr3t/key+1" in json.dumps(list(applied))
    for before, after in zip(printed, applied, strict=True):
        if before["kind"] != "Secret":
            assert before == after


def test_the_data_connection(cluster: Cluster, secret_file: str) -> None:
    assert cluster.setup("--image", IMAGE, *STORE, secret_file, "--bucket", "weights").returncode == 0
    held = {name.split("/", 1)[1]: value for name, value in cluster.held().items()}
    secret = held["Secret/aws-connection-my-storage"]
    assert secret["stringData"] == {
        "AWS_ACCESS_KEY_ID": "AKIA0",
        "AWS_SECRET_ACCESS_KEY": "s3cr3t/key+1",
        "AWS_S3_ENDPOINT": "https://s3.example.com",
        "AWS_S3_BUCKET": "weights",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    assert secret["metadata"]["labels"] == {
        "opendatahub.io/dashboard": "true",
        "opendatahub.io/managed": "true",
        "app.kubernetes.io/managed-by": "diffusion-runtime-setup",
    }
    assert secret["metadata"]["annotations"]["opendatahub.io/connection-type"] == "s3"
    assert secret["metadata"]["annotations"]["opendatahub.io/connection-type-protocol"] == "s3"
    config = json.loads(held["Secret/storage-config"]["stringData"]["aws-connection-my-storage"])
    assert config == {
        "type": "s3",
        "access_key_id": "AKIA0",
        "secret_access_key": "s3cr3t/key+1",
        "endpoint_url": "https://s3.example.com",
        "bucket": "weights",
        "region": "us-east-1",
    }


def test_again_changes_nothing(cluster: Cluster) -> None:
    flags = ("--image", IMAGE, "--trial-store", "20Gi", "--model", "tiny-cpu")
    assert cluster.setup(*flags).returncode == 0
    first = cluster.held()
    key = first["diffusion/Secret/aws-connection-my-storage"]["stringData"]["AWS_SECRET_ACCESS_KEY"]
    assert len(key) == 40
    assert cluster.setup(*flags).returncode == 0
    assert cluster.held() == first, "the trial store's keys are kept"


def test_delete_takes_back_what_was_made(cluster: Cluster, secret_file: str) -> None:
    flags = ("--trial-store", "20Gi", "--monitoring", "--model", "tiny-cpu", "--cluster-runtime", "--template")
    assert cluster.setup("--image", IMAGE, *flags).returncode == 0
    volumes = {"PersistentVolumeClaim/diffusion-cache", "PersistentVolumeClaim/trial-store"}
    assert cluster.setup("--delete", *flags).returncode == 0
    rest = {"Namespace/diffusion", *volumes}
    assert cluster.names() == rest | {"Secret/storage-config"}
    assert not cluster.held()["diffusion/Secret/storage-config"]["stringData"], "only our key was taken out of it"
    assert cluster.setup("--delete", "--with-data", *flags).returncode == 0
    assert cluster.names() == {"Secret/storage-config"}
    assert cluster.setup("--delete", *flags).returncode == 0, "twice is once"


def test_who_may_not_make_namespaces_asks_openshift_for_a_project(tmp_path: Path) -> None:
    (tmp_path / "oc").mkdir()
    (tmp_path / "kubectl").mkdir()
    openshift, kubernetes = Cluster(tmp_path / "oc", "oc"), Cluster(tmp_path / "kubectl")
    for _ in range(2):
        assert openshift.setup("--image", IMAGE, NO_NAMESPACES="1").returncode == 0
    calls = (openshift.folder / "calls").read_text()
    assert calls.count("new-project") == 1 and "ServingRuntime/diffusion-runtime" in openshift.names()
    done = kubernetes.setup("--image", IMAGE, NO_NAMESPACES="1")
    assert done.returncode == 1 and "the namespace could not be made" in done.stderr
    kubernetes.hold("/Namespace/diffusion", {"kind": "Namespace", "metadata": {"name": "diffusion"}})
    assert kubernetes.setup("--image", IMAGE, NO_NAMESPACES="1").returncode == 0, "it was there"


def test_delete_leaves_what_others_made(cluster: Cluster) -> None:
    secret = {"kind": "Secret", "metadata": {"name": "aws-connection-my-storage"}, "stringData": {"theirs": "kept"}}
    config = {"kind": "Secret", "metadata": {"name": "storage-config"}, "stringData": {"aws-connection-my-storage": ""}}
    cluster.hold("/Namespace/diffusion", {"kind": "Namespace", "metadata": {"name": "diffusion"}})
    cluster.hold("diffusion/Secret/aws-connection-my-storage", secret)
    cluster.hold("diffusion/Secret/storage-config", config)
    assert cluster.setup("--image", IMAGE).returncode == 0
    done = cluster.setup("--delete", "--with-data")
    assert done.returncode == 0 and "was not made here and stays" in done.stderr
    assert cluster.names() == {"Namespace/diffusion", "Secret/aws-connection-my-storage", "Secret/storage-config"}
    assert cluster.held()["diffusion/Secret/aws-connection-my-storage"] == secret
    assert cluster.held()["diffusion/Secret/storage-config"] == config


def test_the_trial_store_takes_no_other_stores_connection(cluster: Cluster) -> None:
    keys = {"AWS_ACCESS_KEY_ID": "AKIA0", "AWS_SECRET_ACCESS_KEY": "s3cr3t"}
    secret = {"kind": "Secret", "metadata": {"name": "aws-connection-my-storage"}, "stringData": keys}
    cluster.hold("diffusion/Secret/aws-connection-my-storage", secret)
    done = cluster.setup("--image", IMAGE, "--trial-store", "20Gi")
    assert done.returncode == 1 and "of another store" in done.stderr
    assert cluster.names() == {"Secret/aws-connection-my-storage"}
    assert cluster.setup("--image", IMAGE, "--trial-store", "20Gi", "--connection", "trial").returncode == 0
    assert cluster.held()["diffusion/Secret/aws-connection-my-storage"] == secret


@pytest.mark.parametrize("flags", [(), ("--trial-store", "20Gi"), ("--delete",)])
def test_keys_in_the_environment_are_for_a_store_that_is_named(cluster: Cluster, flags: tuple[str, ...]) -> None:
    keys = {"AWS_ACCESS_KEY_ID": "AKIA0", "AWS_SECRET_ACCESS_KEY": "s3cr3t"}
    done = cluster.setup("--image", IMAGE, *flags, **keys)
    assert done.returncode == 0, done.stderr
    if flags != ("--delete",):
        assert "AKIA0" not in json.dumps(cluster.held())
    named = cluster.setup("--dry-run", "--image", IMAGE, "--endpoint", "https://s3.example.com", **keys)
    assert named.returncode == 0 and "AWS_ACCESS_KEY_ID: 'AKIA0'" in named.stdout


def test_keda_is_asked_for_by_its_template_alone(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, "oc")
    without = cluster.setup("--dry-run", "--image", IMAGE, "--monitoring")
    assert "keda.sh" not in without.stdout, "a cluster without the operator would refuse it"
    asked = cluster.setup("--dry-run", "--image", IMAGE, "--model", "glm-image-keda")
    assert "kind: TriggerAuthentication" in asked.stdout


def test_callers_keys_are_made_once_and_never_shown(cluster: Cluster, secret_file: str) -> None:
    flags = ("--image", IMAGE, *STORE, secret_file, "--model", "wan-t2v-a14b-jobs")
    dry = cluster.setup("--dry-run", *flags)
    assert dry.returncode == 0 and "keys: 'not-shown'" in dry.stdout
    done = cluster.setup(*flags)
    assert done.returncode == 0, done.stderr
    secret = cluster.held()["diffusion/Secret/diffusion-api-keys"]
    key = secret["stringData"]["keys"]
    assert re.fullmatch("[A-Za-z0-9]{40}", key) and key not in done.stderr + done.stdout
    assert "PodDisruptionBudget/wan-t2v-a14b-jobs" in cluster.names()
    assert cluster.setup(*flags).returncode == 0
    assert cluster.held()["diffusion/Secret/diffusion-api-keys"] == secret, "kept"
    assert cluster.setup("--image", IMAGE, "--model", "tiny-cpu").returncode == 0
    assert cluster.setup("--delete").returncode == 0
    assert "Secret/diffusion-api-keys" not in cluster.names()


def test_callers_keys_of_others_stay(cluster: Cluster) -> None:
    theirs = {"kind": "Secret", "metadata": {"name": "diffusion-api-keys"}, "stringData": {"keys": "their-own-key"}}
    cluster.hold("diffusion/Secret/diffusion-api-keys", theirs)
    assert cluster.setup("--image", IMAGE, "--model", "wan-t2v-a14b-jobs").returncode == 0
    assert cluster.setup("--delete", "--model", "wan-t2v-a14b-jobs").returncode == 0
    assert cluster.held()["diffusion/Secret/diffusion-api-keys"] == theirs


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--trial-store", "20Gi", "--model", "wan-t2v-a14b-jobs"), "no conditional writes"),
        (("--nmaespace", "x"), "--nmaespace is not a flag"),
        (("--namespace",), "needs a value"),
        (("--namespace", "Not_A_Name"), "--namespace Not_A_Name"),
        (("--image", "quay.io/you/diffusion-runtime"), "needs a tag"),
        (("--image", "quay.io/you/diffusion-runtime:latest"), "moving tag"),
        (("--image", "localhost:5000/diffusion-runtime"), "needs a tag"),
        (("--image", "quay.io/you/runtime:1&2"), "does not look right"),
        (("--image", "quay.io/y\\1ou/runtime:1"), "does not look right"),
        (("--store-image", "x: y:1"), "does not look right"),
        (("--model", "glm"), "there is no templates/glm.yaml"),
        (("--endpoint", "https://s3.example.com"), "needs all of"),
        (("--trial-store", "20Gi", "--endpoint", "https://s3.example.com"), "its own keys"),
        (("--trial-store", "much"), "--trial-store much"),
        (("--platform", "nomad"), "openshift or kubernetes"),
    ],
)
def test_a_flag_that_does_not_fit_ends_it_before_anything_is_made(
    cluster: Cluster, flags: tuple[str, ...], said: str
) -> None:
    done = cluster.setup(*flags)
    assert done.returncode == 1 and said in done.stderr
    assert not (cluster.folder / "calls").exists()


def test_help_names_every_flag(cluster: Cluster) -> None:
    text = (ROOT / "setup.sh").read_text()
    parsed = set(re.findall(r"--[a-z-]+\b", text[text.index("while [") : text.index("# --- what was")]))
    told = cluster.setup("--help").stdout
    assert len(parsed) > 15 and not [flag for flag in parsed - {"--help"} if flag not in told]


def test_the_trial_store_serves_a_bucket(cluster: Cluster, tmp_path: Path) -> None:
    """The Deployment's command line, run with the package's rclone on a folder."""
    boto3 = pytest.importorskip("boto3")
    printed = yaml.safe_load_all(cluster.setup("--dry-run", "--image", IMAGE, "--trial-store", "20Gi").stdout)
    (deployment,) = [o for o in printed if o["kind"] == "Deployment"]
    container = deployment["spec"]["template"]["spec"]["containers"][0]
    (script,) = container["args"]
    (port,) = free_ports(1)
    assert ":9000" in script and container["ports"][0]["containerPort"] == 9000
    script = script.replace("/data", str(tmp_path / "data")).replace(":9000", f"127.0.0.1:{port}")
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    keys = {"BUCKET": "my-storage", "KEY": "access", "SECRET": "secret"}
    env = {"PATH": path, "HOME": str(tmp_path), "RCLONE_CONFIG": str(tmp_path / "rclone.conf"), **keys}
    with (tmp_path / "log").open("wb") as log:
        store = subprocess.Popen([*container["command"], script], env=env, stdout=log, stderr=log)
    try:
        client = boto3.client(
            "s3",
            endpoint_url=f"http://127.0.0.1:{port}",
            aws_access_key_id="access",
            aws_secret_access_key="secret",
            region_name="us-east-1",
        )
        deadline = time.monotonic() + 60
        while True:
            try:
                client.put_object(Bucket="my-storage", Key="models/x/model_index.json", Body=b"{}")
                break
            except Exception:
                assert time.monotonic() < deadline, (tmp_path / "log").read_text()
                time.sleep(0.1)
        assert client.get_object(Bucket="my-storage", Key="models/x/model_index.json")["Body"].read() == b"{}"
        client.close()
    finally:
        store.terminate()
        store.wait(60)


def test_shell_scripts_and_the_container_file_are_clean() -> None:
    tools = Path(sys.executable).parent
    for command in (
        [tools / "shellcheck", ROOT / "setup.sh", ROOT / "image" / "install.sh"],
        [tools / "hadolint", ROOT / "Containerfile"],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
