"""What no schema says about the templates: settings, ports, memory, security, grace, names."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from runtime import __version__
from runtime.settings import Settings
from tests.conftest import ROOT
from tests.deploy.manifests import (
    RUNTIME,
    TEMPLATES,
    all_objects,
    bytes_of,
    containers,
    documents,
    image,
    merged,
    services,
    value_of,
)

FILES = sorted(TEMPLATES.rglob("*.yaml"))
VALIDATOR = ROOT.parent / "shared" / "tools" / "validate_templates.py"
# Read by libraries and by the system, not by our settings; all of them paths that must be writable, or switches.
LIBRARIES = {
    *("HOME", "USER", "LOGNAME", "XDG_CACHE_HOME", "HF_HOME", "HF_HUB_OFFLINE", "HF_TOKEN"),
    *("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "MPLCONFIGDIR"),
}
# What only the image sets. NVIDIA_VISIBLE_DEVICES is not among them: `all` would show every GPU to a pod that asked
# for none.
IMAGE_ONLY = {"PATH", "PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE", "NVIDIA_DRIVER_CAPABILITIES"}
PATHS = LIBRARIES - {"USER", "LOGNAME", "HF_HUB_OFFLINE", "HF_TOKEN"} | {"CACHE_DIR", "DATA_DIR"}
MARGIN_S = 10  # to end the engine and the last connections after the grace period
SIZES = {"glm-image": 35e9, "a14b": 126e9, "5b": 34e9, "redhat-dog": 16e9, "tiny": 1e9}  # largest checkpoint, bytes
SLOWEST = 70e6  # bytes a second that a start must bear


def ids(path: Path) -> str:
    return path.relative_to(TEMPLATES).as_posix()


@pytest.mark.skipif(
    not VALIDATOR.exists(), reason="the checker against the clusters' schemas is not beside this folder"
)
def test_the_schemas_hold() -> None:
    done = subprocess.run([sys.executable, VALIDATOR, *FILES], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    unchecked = {line.rsplit(" ", 1)[1] for line in done.stdout.splitlines() if "no schema" in line}
    assert unchecked <= {"ScaledObject", "TriggerAuthentication", "PrometheusRule", "PodMonitor", "ServiceMonitor"}
    assert "not installed" not in done.stdout


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_the_first_lines_say_what_comes_before(path: Path) -> None:
    lines = path.read_text().splitlines()
    head = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    text = " ".join(line.lstrip("# ") for line in head)
    assert "Apply before:" in text or "Nothing must be applied before" in text
    for name in re.findall(r"[\w/-]+\.yaml", text):
        assert (TEMPLATES / name.removeprefix("templates/")).exists(), name
    assert not [line for line in lines if len(line) > 120]
    wanted = {
        volume["persistentVolumeClaim"]["claimName"]
        for document in documents(path)
        for volume in document.get("spec", {}).get("predictor", {}).get("volumes", [])
        if "persistentVolumeClaim" in volume
    }
    claims = {o["metadata"]["name"]: p.name for p, o in all_objects() if o["kind"] == "PersistentVolumeClaim"}
    assert all(claims[claim] in text for claim in wanted)
    for secret in set(
        re.findall(r"(?:secretRef: \{name: |secretKeyRef: \{name: |key: )([a-z-]{6,})\b", "\n".join(lines))
    ):
        if secret.startswith(("aws-", "hf-")):
            assert secret in text


def test_names_are_unique_and_match_their_files() -> None:
    scoped = [(o["kind"], o["metadata"]["name"]) for p, o in all_objects() if p.name != "diffusers-template.yaml"]
    assert not [key for key, count in Counter(scoped).items() if count > 1]
    assert all(path.stem == name for name, (path, _) in services().items())


def test_every_file_is_in_the_readme() -> None:
    text = (TEMPLATES / "README.md").read_text()
    told = set(re.findall(r"`([\w/-]+\.(?:yaml|json))`", text))
    assert told == {path.relative_to(TEMPLATES).as_posix() for path in TEMPLATES.rglob("*.[yj][as]*")}


def test_images_are_pinned_to_this_version() -> None:
    used = {c["image"] for _, o in all_objects() for c in containers(o) if "image" in c}
    assert used == {f"registry.example.com/diffusion-runtime:{__version__}"}
    for path in (*FILES, ROOT / "Containerfile", ROOT / "setup.sh"):
        assert not re.search(r"[\w/]:latest\b", path.read_text()), path
    (runtime,) = documents(RUNTIME)
    assert runtime["metadata"]["annotations"]["opendatahub.io/runtime-version"] == __version__


def test_the_three_runtimes_are_one() -> None:
    found = [o for _, o in all_objects() if o["kind"] in ("ServingRuntime", "ClusterServingRuntime")]
    assert len(found) == 3
    assert all(o["spec"] == found[0]["spec"] and o["metadata"] == found[0]["metadata"] for o in found)


def test_the_runtime_is_found_by_its_own_formats_only() -> None:
    (runtime,) = documents(RUNTIME)
    formats = {f["name"] for f in runtime["spec"]["supportedModelFormats"]}
    assert formats == {"diffusers", "glm-image", "wan"}
    assert {s["spec"]["predictor"]["model"]["modelFormat"]["name"] for _, s in services().values()} == formats
    assert {"v1", "v2", "grpc-v2"} == set(runtime["spec"]["protocolVersions"])


@pytest.mark.parametrize("name", services())
def test_settings_exist(name: str) -> None:
    container = merged(name)["container"]
    fields = set(Settings.model_fields)
    for argument in container["args"]:
        flag, _, value = argument.removeprefix("--").partition("=")
        assert argument.startswith("--") and flag in fields and value
    for variable in container["env"]:
        assert variable["name"] in LIBRARIES or variable["name"].lower() in fields, variable["name"]
    assert set(image()["env"]) - IMAGE_ONLY <= LIBRARIES | {f.upper() for f in fields}


@pytest.mark.parametrize("name", services())
def test_everything_that_is_written_lies_on_a_volume(name: str) -> None:
    pod = merged(name)
    volumes = {volume["name"] for volume in pod["spec"]["volumes"]}
    mounts = {mount["mountPath"]: mount["name"] for mount in pod["container"]["volumeMounts"]}
    assert set(mounts.values()) == volumes and {"/tmp", "/dev/shm"} <= set(mounts)
    for variable in pod["container"]["env"]:
        if variable["name"] in PATHS:
            assert any(f"{variable['value']}/".startswith(f"{mount}/") for mount in mounts), variable
    assert all(v["emptyDir"].get("sizeLimit") for v in pod["spec"]["volumes"] if "emptyDir" in v)
    assert value_of(pod["container"], "data_dir") == "/data", "a folder below /tmp would end with the container"
    (data,) = [v["emptyDir"] for v in pod["spec"]["volumes"] if v["name"] == mounts["/data"]]
    most = int(value_of(pod["container"], "max_result_bytes") or Settings.model_fields["max_result_bytes"].default)
    assert bytes_of(data["sizeLimit"]) >= most + 2**30, "records and what is just being written"


@pytest.mark.parametrize("name", services())
def test_ports_and_probes(name: str) -> None:
    container = merged(name)["container"]
    ports = {port["containerPort"] for port in container["ports"]}
    assert container["ports"][0]["containerPort"] == int(value_of(container, "http_port") or 0), (
        "KServe probes the first"
    )
    assert ports == {int(value_of(container, p) or 0) for p in ("http_port", "grpc_port")}
    paths = {kind: container[f"{kind}Probe"]["httpGet"] for kind in ("startup", "readiness", "liveness")}
    ready = f"/v2/models/{name}/ready"
    assert {k: p["path"] for k, p in paths.items()} == {
        "startup": ready,
        "readiness": ready,
        "liveness": "/v2/health/live",
    }
    assert {p["port"] for p in paths.values()} == {int(value_of(container, "http_port") or 0)}
    startup = container["startupProbe"]
    seconds = startup["failureThreshold"] * startup["periodSeconds"]
    (size,) = (size for key, size in SIZES.items() if key in name)
    assert startup["failureThreshold"] >= 30 and startup["periodSeconds"] >= 10 and seconds >= size / SLOWEST


@pytest.mark.parametrize("name", services())
def test_memory_and_devices(name: str) -> None:
    path, service = services()[name]
    model = service["spec"]["predictor"]["model"]
    requests, limits = model["resources"]["requests"], model["resources"]["limits"]
    assert {"cpu", "memory"} <= set(requests) & set(limits)
    for resource in set(requests) & set(limits):
        assert bytes_of(requests[resource]) <= bytes_of(limits[resource]), resource
    assert requests["memory"] == limits["memory"], "beyond its request a pod is the first that a full node kills"
    shm = next(v for v in merged(name)["spec"]["volumes"] if v["name"] == "shm")["emptyDir"]
    assert shm["medium"] == "Memory" and bytes_of(shm["sizeLimit"]) <= bytes_of(limits["memory"]) / 3
    before = path.read_text().split("      resources:\n")[1].split("requests:")[0]
    assert before.strip().startswith("#") and "GiB" in before, "the reason for the memory"
    gpu = requests.get("nvidia.com/gpu")
    assert gpu == limits.get("nvidia.com/gpu") == (None if name == "tiny-cpu" else "1")
    tolerated = [t["key"] for t in service["spec"]["predictor"].get("tolerations", [])]
    assert tolerated == (["nvidia.com/gpu"] if gpu else [])
    storage = model.get("storage")
    assert bool(requests.get("ephemeral-storage")) == bool(storage), "the initializer's copy"


@pytest.mark.parametrize("name", services())
def test_security(name: str) -> None:
    pod = merged(name)
    context = pod["container"]["securityContext"]
    assert context == {
        "allowPrivilegeEscalation": False,
        "privileged": False,
        "runAsNonRoot": True,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    # An id or a group of its own would be refused by OpenShift's restricted-v2.
    assert pod["spec"]["securityContext"] == {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
    assert pod["spec"]["automountServiceAccountToken"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC", "serviceAccountName"} & set(pod["spec"])
    secret = [v for v in pod["container"]["env"] if "SECRET" in v["name"] or v["name"] in ("HF_TOKEN", "API_KEY")]
    assert all("valueFrom" in variable for variable in secret)


@pytest.mark.parametrize("name", services())
def test_annotations_and_labels(name: str) -> None:
    _, service = services()[name]
    annotations, labels = service["metadata"]["annotations"], service["metadata"]["labels"]
    assert annotations["serving.kserve.io/deploymentMode"] == "RawDeployment"
    assert annotations["security.opendatahub.io/enable-auth"] == "true"
    assert labels["networking.kserve.io/visibility"] == "exposed" and labels["opendatahub.io/dashboard"] == "true"
    (runtime,) = documents(RUNTIME)
    told, port = runtime["spec"]["annotations"], value_of(merged(name)["container"], "http_port")
    for prefix in ("prometheus.io", "prometheus.kserve.io"):
        assert (told[f"{prefix}/port"], told[f"{prefix}/path"]) == (port, "/metrics")


@pytest.mark.parametrize("name", services())
def test_time_to_finish(name: str) -> None:
    """A request's time fits into the proxy's, and a stop's into the pod's."""
    _, service = services()[name]
    predictor, pod = service["spec"]["predictor"], merged(name)
    waits = [int(value_of(pod["container"], s) or 0) for s in ("max_queue_seconds", "max_timeout")]
    assert 0 < waits[0] < waits[1] < predictor["timeout"]
    ((command, seconds),) = [pod["container"]["lifecycle"]["preStop"]["exec"]["command"]]
    assert command == "sleep" and int(seconds) == 10
    grace = int(value_of(pod["container"], "grace_period") or 0)
    assert int(seconds) + grace + MARGIN_S <= predictor["terminationGracePeriodSeconds"]


@pytest.mark.parametrize("name", services())
def test_rollouts_and_replicas(name: str) -> None:
    path, service = services()[name]
    predictor: dict[str, Any] = service["spec"]["predictor"]
    strategy = predictor["deploymentStrategy"]
    assert strategy["type"] == "Recreate" or strategy["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1}
    others = {o["kind"]: o for o in documents(path) if o["kind"] != "InferenceService"}
    assert predictor["minReplicas"] >= 1
    if predictor["maxReplicas"] == 1:
        assert not others
        return
    budget = others["PodDisruptionBudget"]["spec"]
    assert budget["selector"]["matchLabels"]["serving.kserve.io/inferenceservice"] == name
    assert strategy["type"] == "RollingUpdate", "the others go on"
    if predictor["minReplicas"] == predictor["maxReplicas"]:
        assert service["metadata"]["annotations"]["serving.kserve.io/autoscalerClass"] == "none"
        return
    scaler = others["ScaledObject"]["spec"]
    assert service["metadata"]["annotations"]["serving.kserve.io/autoscalerClass"] == "external"
    assert scaler["scaleTargetRef"]["name"] == f"{name}-predictor" and scaler["minReplicaCount"] == 1
    assert (scaler["minReplicaCount"], scaler["maxReplicaCount"]) == (
        predictor["minReplicas"],
        predictor["maxReplicas"],
    )
    assert f'model_name="{name}"' in scaler["triggers"][0]["metadata"]["query"]


@pytest.mark.parametrize("name", services())
def test_jobs_and_results(name: str) -> None:
    """Pods of one service share jobs in a bucket of the connection, under a prefix of their own, behind keys."""
    container, (_, service) = merged(name)["container"], services()[name]
    uri = value_of(container, "output_uri")
    if uri is None:
        return
    assert uri == f"s3://$(AWS_S3_BUCKET)/jobs/{name}/"
    assert [source["secretRef"]["name"] for source in container["envFrom"]] == ["aws-connection-my-storage"]
    ttls = [int(value_of(container, f"{kind}_ttl_s") or 0) for kind in ("result", "job")]
    assert int(value_of(container, "max_queue_seconds") or 0) < ttls[0] <= ttls[1]
    path = Path(value_of(container, "api_key_file") or "")
    (mount,) = [m for m in container["volumeMounts"] if m["mountPath"] == str(path.parent)]
    (volume,) = [v for v in service["spec"]["predictor"]["volumes"] if v["name"] == mount["name"]]
    assert mount["readOnly"] and "subPath" not in mount and volume["secret"]["secretName"] == "diffusion-api-keys"
