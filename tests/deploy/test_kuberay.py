"""The files of `cluster/kuberay/` pass KubeRay's schemas without unknown keys, and have the intended properties.

Kubernetes silently drops unknown keys. Here a key that is not in the schema is an error, after the defaults of
Kubernetes have been applied.
"""

import copy
import json
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from igpt_ray.flows.actor_map import PART
from igpt_ray.flows.serve.check import check_config
from igpt_ray.serve.config import ServeConfig
from igpt_ray.train.config import WorkersConfig
from tests.deploy.test_cluster import ROOT, keys_of, misspelt, render, rendered

KINDS = {"RayCluster": "raycluster", "RayJob": "rayjob", "RayService": "rayservice"}
FOLDER = ROOT / "cluster" / "kuberay"


@cache
def schema_of(kind: str, crds: Path) -> dict[str, Any]:
    text = (crds / f"ray.io_{kind.lower()}s.yaml").read_text()
    crd = yaml.load(text, yaml.CSafeLoader)
    assert crd["spec"]["names"]["kind"] == kind
    (version,) = [v for v in crd["spec"]["versions"] if v["name"] == "v1"]
    return strict(version["schema"]["openAPIV3Schema"])


def strict(schema: Any) -> Any:
    """The same schema without additional keys."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: strict(value) for key, value in schema.items()}
    if schema.pop("x-kubernetes-int-or-string", False):
        return {"type": ["integer", "string"]}
    open_ = schema.pop("x-kubernetes-preserve-unknown-fields", False)
    if isinstance(schema.get("properties"), dict) and not open_ and schema.get("type") == "object":
        schema["additionalProperties"] = False
    return schema


def with_defaults(value: Any, schema: dict[str, Any]) -> Any:
    if isinstance(value, list):
        return [with_defaults(item, schema.get("items", {})) for item in value]
    if not isinstance(value, dict):
        return value
    known = schema.get("properties", {})
    value = {key: copy.deepcopy(s["default"]) for key, s in known.items() if "default" in s} | value
    return {key: with_defaults(relative_to, known.get(key, {})) for key, relative_to in value.items()}


@cache
def validator_of(kind: str, crds: Path) -> jsonschema.Draft7Validator:
    schema = dict(schema_of(kind, crds))
    texts = {"type": "object", "additionalProperties": {"type": "string"}}
    names = {"name": {"type": "string"}, "namespace": {"type": "string"}, "labels": texts, "annotations": texts}
    metadata = {"type": "object", "properties": names, "additionalProperties": False, "required": ["name", "namespace"]}
    schema["properties"] = schema["properties"] | {"metadata": metadata}
    schema["required"] = ["apiVersion", "kind", "metadata", "spec"]
    return jsonschema.Draft7Validator(schema)


def errors_of(manifest: dict[str, Any], crds: Path) -> list[str]:
    kind = manifest.get("kind", "?")
    if kind not in KINDS or manifest.get("apiVersion") != "ray.io/v1":
        return [f"{manifest.get('apiVersion')} {kind} is not one of KubeRay's kinds"]
    filled = with_defaults(manifest, schema_of(kind, crds))
    return [f"{'.'.join(map(str, e.path))}: {e.message[:200]}" for e in validator_of(kind, crds).iter_errors(filled)]


@pytest.fixture(scope="session")
def crds(shared: Path) -> Path:
    return shared / "crds"


# ------------------------------------------------------------------------------------------------ KubeRay's schemas


@pytest.mark.parametrize("name", KINDS.values())
def test_a_manifest_passes_kuberay_s_schema(crds: Path, name: str) -> None:
    assert errors_of(rendered(f"kuberay/{name}.yaml"), crds) == []


NAMES_OF_OURS = {"labels", "matchLabels", "requests", "limits", "rayStartParams", "nodeSelector"}
"""Below these, keys are names of ours, which the schema cannot know."""


@pytest.mark.slow
def test_a_misspelt_or_missing_key_of_a_manifest_is_detected(crds: Path) -> None:
    """Every key of the job with its nodes, and of the other two manifests around them, in turn."""
    whole = [(rendered("kuberay/rayjob.yaml"), ())]
    whole += [(rendered("kuberay/raycluster.yaml"), ("spec",)), (rendered("kuberay/rayservice.yaml"), ("spec", "ray"))]
    unseen = []
    for manifest, seen_already in whole:
        for path in keys_of(manifest):
            relative_to = "/".join(map(str, path)).startswith("/".join(seen_already)) and len(path) > len(seen_already)
            if (seen_already and relative_to) or NAMES_OF_OURS & set(path[:-1]):
                continue
            if not errors_of(misspelt(manifest, path), crds):
                unseen.append(path)
    assert unseen == []


def test_a_missing_required_key_is_detected(crds: Path) -> None:
    manifest = rendered("kuberay/rayjob.yaml")
    required = list(required_of(manifest, schema_of("RayJob", crds)))
    assert len(required) > 30
    for path in required:
        without = copy.deepcopy(manifest)
        place = without
        for key in path[:-1]:
            place = place[key]
        del place[path[-1]]
        assert errors_of(without, crds), path


def required_of(value: Any, schema: dict[str, Any], path: tuple[Any, ...] = ()) -> Any:
    """Paths of all keys in the manifest that the schema requires and has no default for."""
    if isinstance(value, list):
        for i, item in enumerate(value):
            yield from required_of(item, schema.get("items", {}), (*path, i))
    elif isinstance(value, dict):
        known = schema.get("properties", {})
        yield from ((*path, key) for key in schema.get("required", []) if key in value and "default" not in known[key])
        for key, relative_to in value.items():
            yield from required_of(relative_to, known.get(key, {}), (*path, key))


def test_redis_s_pod_passes_the_schema_of_pods(crds: Path) -> None:
    """The schema of pods is taken from KubeRay's."""
    template = next(d for d in rendered("kuberay/base.yaml") if d["kind"] == "StatefulSet")["spec"]["template"]
    nodes = schema_of("RayCluster", crds)["properties"]["spec"]["properties"]["headGroupSpec"]["properties"]
    pod = nodes["template"]["properties"]["spec"]
    assert [e.message for e in jsonschema.Draft7Validator(pod).iter_errors(with_defaults(template["spec"], pod))] == []


# ------------------------------------------------------------------------------------------------ what they promise


def test_the_service_runs_what_serve_deploy_runs() -> None:
    """With the name of a bucket, it passes `igpt serve --check`."""
    assert yaml.safe_load(rendered("kuberay/rayservice.yaml")["spec"]["serveConfigV2"]) == rendered("serve.yaml")
    check_config(rendered("serve.yaml"), "serve.yaml")


def specs() -> list[dict[str, Any]]:
    keys = {"raycluster": "spec", "rayjob": "rayClusterSpec", "rayservice": "rayClusterConfig"}
    manifests = {name: rendered(f"kuberay/{name}.yaml")["spec"] for name in keys}
    return [manifests[name] if key == "spec" else manifests[name][key] for name, key in keys.items()]


def groups(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


def test_an_idle_cluster_has_only_its_head() -> None:
    for spec in specs():
        assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
        assert [(g["replicas"], g["minReplicas"]) for g in spec["workerGroupSpecs"]] == [(0, 0)] * 3
        assert (spec["enableInTreeAutoscaling"], spec["autoscalerOptions"]["version"]) == (True, "v2")


def test_work_without_gpus_starts_no_node_with_gpus() -> None:
    for spec in specs():
        assert [g.get("labels") for g in groups(spec)] == [{PART: "cpu"}, {PART: "cpu"}, None, None]


def test_a_cluster_requires_a_token_and_stores_its_state_in_redis() -> None:
    for spec in specs():
        assert spec["authOptions"] == {"mode": "token"}
        assert spec["gcsFaultToleranceOptions"]["redisPassword"]["valueFrom"]["secretKeyRef"]["name"] == "igpt-redis"


def test_pods_do_not_run_as_root_and_have_requests_limits_and_probes() -> None:
    """Namespace `igpt` enforces Kubernetes' restricted standard; requests equal limits."""
    pods = [group["template"]["spec"] for spec in specs() for group in groups(spec)]
    pods.append(rendered("kuberay/rayjob.yaml")["spec"]["submitterPodTemplate"]["spec"])
    for pod in pods:
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }
            asked, most = container["resources"]["requests"], container["resources"]["limits"]
            assert asked["memory"] == most["memory"]
            if container["name"] != "submit":
                assert asked == most
                assert {"readinessProbe", "livenessProbe"} <= container.keys()


def test_workers_have_the_resources_that_jobs_request() -> None:
    """A training worker or a replica needs one GPU with its CPUs; palette and prepare need CPUs."""
    for spec in specs():
        sizes = {g["groupName"]: g["template"]["spec"]["containers"][0]["resources"] for g in spec["workerGroupSpecs"]}
        gpus = {name: int(size["limits"].get("nvidia.com/gpu", 0)) for name, size in sizes.items()}
        assert gpus == {"cpu": 0, "gpu1": 1, "gpu8": 8}
        served = ServeConfig.model_validate(rendered("serve.yaml")["applications"][0]["args"])
        assert served.gpus <= gpus["gpu1"]
        assert served.cpus <= int(sizes["gpu1"]["limits"]["cpu"])
        assert WorkersConfig().cpus * 8 <= int(sizes["gpu8"]["limits"]["cpu"])


def test_the_network_policy_allows_only_known_clients() -> None:
    (policy,) = [d for d in rendered("kuberay/base.yaml") if d["kind"] == "NetworkPolicy"]
    assert policy["spec"]["podSelector"] == {}
    assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
    for rule in policy["spec"]["ingress"]:
        assert all("ipBlock" not in peer for peer in rule["from"])
        if any("namespaceSelector" in peer for peer in rule["from"]):
            assert rule["ports"]


# ------------------------------------------------------------------------------------------------ the overlay


def patched(manifest: Any, patch: list[dict[str, Any]]) -> Any:
    """Apply a JSON patch with the three operations that the overlay uses."""
    manifest = copy.deepcopy(manifest)
    for change in patch:
        *path, last = [step.replace("~1", "/").replace("~0", "~") for step in change["path"].split("/")[1:]]
        place = manifest
        for step in path:
            place = place[int(step) if isinstance(place, list) else step]
        assert change["op"] == "add" or last in place, f"{change['path']} is not there to {change['op']}"
        if change["op"] == "remove":
            del place[last]
        else:
            place[last] = change["value"]
    return manifest


def queued() -> dict[str, Any]:
    """The job as rendered by `kubectl kustomize`."""
    overlay = rendered("kuberay/kustomization.yaml")
    assert overlay.keys() == {"apiVersion", "kind", "resources", "patches"}
    (patch,) = overlay["patches"]
    assert patch["target"]["kind"] == "RayJob"
    return patched(rendered("kuberay/rayjob.yaml"), yaml.safe_load(patch["patch"]))


def test_a_queued_job_is_admitted_as_a_whole(crds: Path) -> None:
    job = queued()
    assert errors_of(job, crds) == []
    assert job["spec"]["suspend"] is True
    assert job["spec"]["shutdownAfterJobFinishes"] is True  # required by KubeRay for a job that may be suspended
    assert job["spec"]["rayClusterSpec"]["enableInTreeAutoscaling"] is False
    queue = {d["kind"]: d for d in rendered("kuberay/kueue.yaml")}
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == queue["LocalQueue"]["metadata"]["name"]
    assert queue["LocalQueue"]["spec"]["clusterQueue"] == queue["ClusterQueue"]["metadata"]["name"]
    (group,) = queue["ClusterQueue"]["spec"]["resourceGroups"]
    quota = {r["name"]: r["nominalQuota"] for r in group["flavors"][0]["resources"]}
    spec = job["spec"]["rayClusterSpec"]
    wanted = sum(
        g["replicas"] * int(g["template"]["spec"]["containers"][0]["resources"]["requests"].get("nvidia.com/gpu", 0))
        for g in spec["workerGroupSpecs"]
    )
    assert 0 < wanted <= quota["nvidia.com/gpu"]
    assert all(g["replicas"] == g["minReplicas"] for g in spec["workerGroupSpecs"])


def test_kustomize_gives_the_same_result(tmp_path: Path) -> None:
    if not shutil.which("kubectl"):
        pytest.skip("kubectl is not installed: the overlay is built by the rules of this file alone")
    for name in ("rayjob", "kueue", "kustomization"):
        (tmp_path / f"{name}.yaml").write_text(render.text(rendered(f"kuberay/{name}.yaml")))
    built = subprocess.run(["kubectl", "kustomize", str(tmp_path)], check=True, capture_output=True, text=True).stdout
    (job,) = [d for d in yaml.safe_load_all(built) if d["kind"] == "RayJob"]
    assert job == queued()


# ------------------------------------------------------------------------------------------------ secrets


def test_no_file_contains_a_secret() -> None:
    """Environment variables for keys and passwords refer to secrets and have no value."""
    files = [p for folder in ("cluster", "infra") for p in (ROOT / folder).rglob("*") if p.is_file()]
    for path in [p for p in files if "__pycache__" not in p.parts]:
        text = path.read_text()
        assert not re.search(r"AKIA[0-9A-Z]{16}|-----BEGIN|hf_[A-Za-z0-9]{20}|kind: Secret\b|stringData", text), path
        for name, value in re.findall(r"-e (\w+)=(\S+)", text):
            assert not secret(name) or value.startswith("/"), (path, name)
    documents = [d for name in ("base", "nodes", "rayjob") for d in listed(rendered(f"kuberay/{name}.yaml"))]
    found = [v for d in documents for v in variables(d)]
    assert found
    for variable in found:
        assert not secret(variable["name"]) or "value" not in variable, variable


def test_a_secret_would_be_detected() -> None:
    """Checks the test above."""
    assert secret("AWS_SECRET_ACCESS_KEY")
    assert secret("PASSWORD")
    assert secret("RAY_AUTH_TOKEN")
    assert not secret("NCCL_SOCKET_IFNAME")
    assert list(variables({"env": [{"name": "A"}], "x": [{"env": [{"name": "B"}]}]})) == [{"name": "A"}, {"name": "B"}]


def secret(name: str) -> bool:
    return re.search(r"TOKEN|SECRET|PASSWORD|_KEY", name) is not None


def variables(value: Any) -> Any:
    if isinstance(value, dict):
        yield from value.get("env", [])
        value = list(value.values())
    if isinstance(value, list):
        for relative_to in value:
            yield from variables(relative_to)


def listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def test_rendered_manifests_have_only_json_types(tmp_path: Path) -> None:
    """No dates or octal numbers, which YAML would interpret."""
    for name in KINDS.values():
        assert json.loads(json.dumps(rendered(f"kuberay/{name}.yaml"))) == rendered(f"kuberay/{name}.yaml")
