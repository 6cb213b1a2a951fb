"""What Prometheus is given: the dashboard asks for no name that a cluster at work does not have."""

import base64
import json
import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import free_port
from ray import serve as ray_serve
from ray.serve.config import HTTPOptions

from igpt_ray import storage
from igpt_ray.data import pixels
from igpt_ray.flows import serve
from igpt_ray.serve.config import ServeConfig

pytestmark = pytest.mark.ray
ROOT = Path(__file__).resolve().parents[2]
DASHBOARD = json.loads((ROOT / "cluster" / "grafana.json").read_text())
OF_GPUS = {"ray_node_gpus_utilization"}
"""Only nodes with GPUs have these; their names are in Ray's own dashboard."""


def names_asked_for() -> set[str]:
    expressions = [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", [])]
    return set(re.findall(r"\bray_\w+", " ".join([*expressions, DASHBOARD["templating"]["list"][1]["query"]])))


def names_there() -> set[str]:
    """Of all samples on the metrics ports of all nodes."""
    import ray

    found = set()
    for node in ray.nodes():
        if node["Alive"]:
            url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
            with urllib.request.urlopen(url, timeout=10) as answer:
                found |= set(re.findall(r"^(\w+)[{ ]", answer.read().decode(), re.MULTILINE))
    return found


@pytest.mark.slow
def test_a_running_cluster_exports_every_metric_of_the_dashboard(
    cluster: str, prepared: str, released: str, tmp_path: Path
) -> None:
    """A run under way and a few requests, then the text that Prometheus would read."""
    port = free_port()
    ray_serve.start(http_options=HTTPOptions(host="127.0.0.1", port=port))
    ray_serve.run(serve.build(ServeConfig(release=(f"digits={released}",), open=True)), route_prefix="/")
    command = [sys.executable, "jobs/pretrain.py", "tiny", "--data.tokens", storage.join(prepared, "tokens")]
    command += ["--model.n-layer", "1", "--model.n-embd", "16", "--model.n-head", "2", "--model.n-px", "8"]
    command += ["--model.n-vocab", "16", "--run.root", str(tmp_path), "--run.name", "shown", "--optim.steps", "100000"]
    run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    picture = base64.b64encode(pixels.png(np.zeros((8, 8, 3), np.uint8))).decode()
    url, body = f"http://127.0.0.1:{port}/v1/completions", json.dumps({"image": picture}).encode()
    wanted, missing = names_asked_for() - OF_GPUS, {"all"}
    deadline = time.monotonic() + 300
    try:
        while missing and time.monotonic() < deadline:  # metrics are brought together every few seconds
            generated = urllib.request.Request(url, body, {"Content-Type": "application/json"})
            urllib.request.urlopen(generated, timeout=60).close()
            time.sleep(2)
            missing = wanted - names_there()
    finally:
        run.kill()
        run.wait()
        ray_serve.shutdown()
    assert missing == set()


def test_gpu_metrics_have_the_names_that_ray_exports() -> None:
    import ray.dashboard.modules.metrics.dashboards as dashboards

    text = "".join(path.read_text() for path in Path(dashboards.__file__).parent.glob("*.py"))
    assert all(name in text for name in OF_GPUS)


def test_prometheus_scrapes_the_ports_of_the_nodes() -> None:
    nodes = (ROOT / "cluster" / "aws.yaml").read_text()
    (scrape,) = yaml.safe_load((ROOT / "cluster" / "prometheus.yaml").read_text())["scrape_configs"]
    (found,) = scrape["ec2_sd_configs"]
    assert re.findall(r"--metrics-export-port=(\d+)", nodes) == [str(found["port"])] * 2
    assert found["filters"][0]["name"] == "tag:ray-cluster-name"
