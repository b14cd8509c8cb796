"""Dashboard, alerts and scaling name metrics, labels and label values that a real server exposes."""

from __future__ import annotations

import json
import re

import pytest
import yaml

from runtime.metrics import OUTCOMES
from tests.conftest import Serve
from tests.deploy.manifests import RUNTIME, TEMPLATES, all_objects, documents

MONITORING = TEMPLATES / "monitoring"
FROM_PROMETHEUS = {"namespace", "pod", "le"}  # labels that scraping adds, and a histogram's own


def expressions() -> dict[str, str]:
    board = json.loads((MONITORING / "grafana-dashboard.json").read_text())
    found = {f"{p['title']} {t['refId']}": t["expr"] for p in board["panels"] for t in p["targets"]}
    found |= {f"variable {v['name']}": v["query"] for v in board["templating"]["list"] if v["type"] == "query"}
    for group in documents(MONITORING / "prometheus-rule.yaml")[0]["spec"]["groups"]:
        found |= {rule["alert"]: rule["expr"] for rule in group["rules"]}
    for _, obj in all_objects():
        if obj["kind"] == "ScaledObject":
            found[obj["metadata"]["name"]] = obj["spec"]["triggers"][0]["metadata"]["query"]
    return found


@pytest.fixture(scope="module")
def exposed(serve: Serve) -> dict[str, set[str]]:
    """Metric to its labels, of a server that has drawn a picture and refused a request."""
    server = serve("sd15")
    server.predict({"prompt": "a fox", "size": "64x64", "num_inference_steps": 2})
    server.json("POST", "/v1/models/tiny:predict", {"instances": [{"prompt": "a fox", "width": 63}]})
    found: dict[str, set[str]] = {}
    for line in server.request("GET", "/metrics")[2].decode().splitlines():
        if match := re.match(r"(\w+)\{(.*)\} ", line):
            found.setdefault(match[1], set()).update(re.findall(r"(\w+)=", match[2]))
    return found


# Counted only where there is a device, a token stage, a video or a death.
NOT_ON_THIS_SERVER = {
    *("diffusion_device_memory_bytes", "diffusion_device_memory_peak_bytes", "diffusion_frames_total"),
    *("diffusion_tokens_total", "diffusion_engine_restarts_total"),
}


@pytest.mark.parametrize("where", expressions())
def test_metrics_and_labels_exist(exposed: dict[str, set[str]], where: str) -> None:
    from runtime import metrics

    declared = {
        m._name + ("_total" if m._type == "counter" else ""): set(m._labelnames)
        for m in vars(metrics).values()
        if hasattr(m, "_labelnames")
    }
    text = expressions()[where]
    names = set(re.findall(r"\bdiffusion_\w+", text))
    assert names
    labels: set[str] = set()
    for name in names:
        if name in NOT_ON_THIS_SERVER:
            labels |= declared[name]
        else:
            assert name in exposed, f"{name} is not on /metrics"
            labels |= exposed[name]
    used = set(re.findall(r"(\w+)\s*=~?\"", text))
    for listed in re.findall(r"by \(([\w, ]+)\)", text):
        used |= {label.strip() for label in listed.split(",")}
    assert used <= labels | FROM_PROMETHEUS
    outcomes = {"ok", "dry_run", "failed", *OUTCOMES.values()}
    for values in re.findall(r'outcome=~?"([\w|]+)"', text):
        assert set(values.split("|")) <= outcomes


def test_every_metric_is_watched(exposed: dict[str, set[str]]) -> None:
    text = " ".join(expressions().values())
    ours = {re.sub(r"_(bucket|sum|count|created)$", "", name) for name in exposed if name.startswith("diffusion_")}
    unwatched = {name for name in ours if name not in text and f"{name}_bucket" not in text}
    assert not unwatched, "new metric: put it on the dashboard"


def test_alerts_are_complete() -> None:
    (rule,) = documents(MONITORING / "prometheus-rule.yaml")
    for alert in rule["spec"]["groups"][0]["rules"]:
        assert alert["labels"]["severity"] in ("warning", "critical")
        assert {"summary", "description"} <= set(alert["annotations"])


def test_the_monitors_find_the_pods() -> None:
    runtime = yaml.safe_load(RUNTIME.read_text())["spec"]
    port = runtime["containers"][0]["ports"][0]["name"]
    (pods,) = documents(MONITORING / "pod-monitor.yaml")
    service, services = documents(MONITORING / "service-monitor.yaml")
    assert pods["spec"]["selector"]["matchLabels"] == service["spec"]["selector"] == runtime["labels"]
    assert service["metadata"]["labels"] == services["spec"]["selector"]["matchLabels"]
    ends = pods["spec"]["podMetricsEndpoints"] + services["spec"]["endpoints"]
    assert {(end["port"], end["path"]) for end in ends} == {(port, "/metrics")}
    assert service["spec"]["ports"][0]["targetPort"] == port


def test_the_dashboard_is_whole() -> None:
    board = json.loads((MONITORING / "grafana-dashboard.json").read_text())
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    places = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in board["panels"]]
    assert len(set(places)) == len(places)
    titles = " ".join(panel["title"].lower() for panel in board["panels"])
    assert all(word in titles for word in ("queue", "stage", "goodput", "gpu memory", "cold start"))
