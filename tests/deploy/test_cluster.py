"""The files of `cluster/` pass Ray's schema and bootstrap, and request the intended resources.

Ray's schema does not cover `node_config`; botocore validates it when moto starts an instance of each type.
"""

import copy
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aws
import pytest
import yaml
from aws import REGION, Account, allowed, asked, recorded

from igpt_ray.flows.actor_map import PART

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "cluster"))
import render  # noqa: E402 - a program, not a part of the package

SITE = {
    **{"Image": f"registry.example/igpt-ray@sha256:{'0' * 64}", "Bucket": "some-data", "Words": "python jobs/bench.py"},
    **{"Project": "a-project", "GcpRegion": "us-central1", "GcpZone": "us-central1-a"},
    **{"StorageClass": "standard", "ApiServer": "10.96.0.1/32", "Job": "bench", "Name": "bench"},
}
"""Names for what no test's account gives."""


def rendered(name: str, **site: str) -> Any:
    return render.render(ROOT / "cluster" / name, render.names([]) | SITE | site)


# ------------------------------------------------------------------------------------------------ render


def test_a_name_without_a_value_is_an_error_and_nothing_is_written(tmp_path: Path) -> None:
    command = [sys.executable, "cluster/render.py", "cluster/aws.yaml", str(tmp_path / "aws.yaml"), "Ami="]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert re.search(
        r"error: .*aws\.yaml wants \w+, which has no value: give it a line in .*build/site\.env", done.stderr
    )
    assert not list(tmp_path.iterdir())


def test_all_files_of_a_folder_are_rendered(tmp_path: Path) -> None:
    words = [f"{name}={value}" for name, value in SITE.items() if name not in ("Words", "Job", "Name")]
    job = ["python", "jobs/score.py", "--release", "s3://bucket/runs/s1/release", "--split", "a b"]
    command = [sys.executable, "cluster/render.py", "cluster/kuberay", str(tmp_path), *words, "--", *job]
    subprocess.run(command, cwd=ROOT, check=True)
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.yaml")}
    assert files == {str(path.relative_to(ROOT / "cluster/kuberay")) for path in ROOT.glob("cluster/kuberay/**/*.yaml")}
    job = yaml.safe_load((tmp_path / "rayjob.yaml").read_text())
    assert job["metadata"]["name"] == "score"
    assert job["spec"]["entrypoint"] == "python jobs/score.py --release s3://some-data/runs/s1/release --split 'a b'"
    assert "${" not in "".join(path.read_text() for path in tmp_path.rglob("*.yaml"))


# ------------------------------------------------------------------------------------------------ ray up


@pytest.fixture(scope="module")
def account(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Account]:
    from ray.autoscaler._private.aws.utils import client_cache, resource_cache

    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("home")
        (home / ".igpt").mkdir()
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "any")
        patch.setenv("AWS_DEFAULT_REGION", REGION)
        patch.setenv("HOME", str(home))  # where `ray up` puts its key
        patch.delenv("AWS_ENDPOINT_URL", raising=False)
        for cache in (client_cache, resource_cache):
            cache.cache_clear()
        with aws.account() as account:
            yield account


@pytest.fixture(scope="module")
def launched(account: Account) -> tuple[dict[str, Any], dict[str, dict[str, Any]], list[Any], list[Any]]:
    """`ray up` of aws.yaml: the bootstrapped file, the requests of node types, the calls of launcher and head."""
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
    from ray.autoscaler._private.commands import _bootstrap_config

    launcher: list[Any] = []
    head: list[Any] = []
    runs: dict[str, dict[str, Any]] = {}
    with recorded(launcher):
        ready = _bootstrap_config(valid(rendered("aws.yaml", **account.site)), no_config_cache=True)
        provider = AWSNodeProvider(ready["provider"], ready["cluster_name"])
        start(provider, ready, "head", "head")
    with recorded(head):
        provider = AWSNodeProvider(ready["provider"], ready["cluster_name"])
        for kind in ready["available_node_types"]:
            if kind != "head":
                start(provider, ready, kind, "worker")
        workers = provider.non_terminated_nodes({"ray-node-kind": "worker"})
        assert len(workers) == 4
        provider.set_node_tags(workers[0], {"ray-node-status": "up-to-date"})
        provider.terminate_nodes(workers)
    for action, parameters in launcher + head:
        if action == "ec2:RunInstances":
            tags = {tag["Key"]: tag["Value"] for tag in parameters["TagSpecifications"][0]["Tags"]}
            runs[tags["ray-user-node-type"]] = parameters
    return ready, runs, launcher, head


def valid(config: dict[str, Any]) -> dict[str, Any]:
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(config)
    validate_config(prepared)
    return prepared


def start(provider: Any, config: dict[str, Any], kind: str, role: str) -> dict[str, Any]:
    tags = {"ray-node-kind": role, "ray-user-node-type": kind, "ray-node-name": f"ray-{kind}", "ray-node-status": "x"}
    node = copy.deepcopy(config["available_node_types"][kind]["node_config"])
    return provider.create_node(node, {**tags, "ray-launch-config": "hash"}, 1)


def test_every_aws_node_has_its_network_its_role_and_metadata_with_tokens(
    account: Account, launched: tuple[Any, dict[str, dict[str, Any]], Any, Any]
) -> None:
    _, runs, _, _ = launched
    assert runs.keys() == {"head", "cpu", "gpu1", "gpu8-spot", "gpu8"}
    for kind, run in runs.items():
        profile = "HeadProfile" if kind == "head" else "WorkerProfile"
        assert run["IamInstanceProfile"]["Arn"] == account.site[profile]
        assert run["MetadataOptions"] == {"HttpTokens": "required", "HttpPutResponseHopLimit": 1}
        (interface,) = run.get("NetworkInterfaces", [run])
        assert interface["SubnetId"] == account.site["Subnet"]
        assert interface.get("Groups", interface.get("SecurityGroupIds")) == [account.site["SecurityGroup"]]
        assert run["ImageId"] == account.site["Ami"]
        assert run["BlockDeviceMappings"][0]["Ebs"]["Encrypted"]
        spot = run.get("InstanceMarketOptions", {}).get("MarketType") == "spot"
        assert spot == (kind in ("cpu", "gpu8-spot"))


def test_training_nodes_are_in_a_placement_group_and_have_efa(
    launched: tuple[Any, dict[str, dict[str, Any]], Any, Any],
) -> None:
    ready, runs, _, _ = launched
    for kind in ("gpu8", "gpu8-spot"):
        assert runs[kind]["NetworkInterfaces"][0]["InterfaceType"] == "efa"
        assert runs[kind]["Placement"]["GroupName"]
        assert "--device=/dev/infiniband" in ready["available_node_types"][kind]["docker"]["worker_run_options"]


def test_node_types_declare_the_resources_of_their_instances(
    account: Account, launched: tuple[Any, Any, Any, Any]
) -> None:
    """Undeclared CPUs or GPUs would idle; additional ones would not exist."""
    ready = launched[0]
    for kind, node in ready["available_node_types"].items():
        instance = node["node_config"]["InstanceType"]
        (found,) = account.ec2.describe_instance_types(InstanceTypes=[instance])["InstanceTypes"]
        gpus = sum(gpu["Count"] for gpu in found.get("GpuInfo", {}).get("Gpus", []))
        assert node["resources"].get("GPU", 0) == gpus
        assert node["resources"]["CPU"] == (0 if kind == "head" else found["VCpuInfo"]["DefaultVCpus"])
        assert found["NetworkInfo"]["EfaSupported"] or "NetworkInterfaces" not in node["node_config"]


def test_launcher_and_head_are_allowed_the_calls_of_ray_up_and_its_autoscaler(
    account: Account, launched: tuple[Any, Any, list[Any], list[Any]]
) -> None:
    _, _, launcher, head = launched
    for role, calls in (("Launcher", launcher), ("HeadRole", head)):
        made = {action for action, _ in calls}
        assert made >= {"ec2:RunInstances", "ec2:DescribeInstances" if role == "HeadRole" else "ec2:CreateKeyPair"}
        statements = account.statements(role)
        needed = [need for action, parameters in calls for need in asked(account, action, parameters)]
        assert [need for need in needed if not allowed(statements, need)] == []
    assert {action for action, _ in head} >= {"ec2:CreateTags", "ec2:TerminateInstances"}


def test_the_head_s_role_rejects_workers_that_violate_its_conditions(
    account: Account, launched: tuple[Any, dict[str, dict[str, Any]], Any, Any]
) -> None:
    """Checks the test above: optional tokens, another cluster's name, the head's own profile."""
    run = launched[1]["cpu"]
    wrong = [
        run | {"MetadataOptions": {"HttpTokens": "optional"}},
        run
        | {"TagSpecifications": [{"ResourceType": "instance", "Tags": [{"Key": "ray-cluster-name", "Value": "x"}]}]},
        run | {"IamInstanceProfile": {"Arn": account.site["HeadProfile"]}},
    ]
    statements = account.statements("HeadRole")
    for parameters in wrong:
        assert not all(allowed(statements, call) for call in asked(account, "ec2:RunInstances", parameters))


def keys_of(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(value, dict):
        for key, relative_to in value.items():
            yield (*path, key)
            yield from keys_of(relative_to, (*path, key))
    if isinstance(value, list):
        for i, relative_to in enumerate(value):
            yield from keys_of(relative_to, (*path, i))


def misspelt(config: Any, path: tuple[Any, ...]) -> Any:
    config = copy.deepcopy(config)
    place = config
    for key in path[:-1]:
        place = place[key]
    place[path[-1] + "z"] = place.pop(path[-1])
    return config


def test_a_misspelt_key_of_aws_yaml_is_detected(account: Account, launched: tuple[Any, Any, Any, Any]) -> None:
    """Every key in turn: by Ray's schema, its bootstrap, botocore, or one of the tests above."""
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    config = rendered("aws.yaml", **account.site)
    ready = launched[0]
    provider = AWSNodeProvider(ready["provider"], ready["cluster_name"])
    unseen = []
    for path in keys_of(config):
        ours = path[0] == "file_mounts" and len(path) > 1  # names of ours, not keys
        ours = ours or (path[0] == "available_node_types" and (len(path) == 2 or "resources" in path[2:-1]))
        if ours or (path[0] == "provider" and len(path) == 2):  # for the provider's see below
            continue
        wrong = misspelt(config, path)
        try:
            valid(wrong)
            part_without_gpus(wrong["available_node_types"])
            if path[2:3] == ("node_config",) and len(path) > 3:
                node = copy.deepcopy(wrong["available_node_types"][path[1]]["node_config"])
                node.setdefault("SubnetIds", [account.site["Subnet"]])
                provider.create_node(node | {"KeyName": "k"}, {"ray-node-kind": "worker", "ray-launch-config": "x"}, 1)
        except (Exception, SystemExit):
            continue
        unseen.append(path)
    assert unseen == []


def part_without_gpus(types: dict[str, Any]) -> None:
    """Only the head and the nodes without GPUs have the label of the CPU part (`flows/actor_map.py`)."""
    for node in types.values():
        assert node.get("labels", {}) == ({} if node["resources"].get("GPU") else {PART: "cpu"})


def test_settings_of_the_provider_are_read_by_ray(account: Account) -> None:
    """Ray's schema allows any key, so that the test compares the names with the provider's source."""
    import ray.autoscaler._private.commands as commands

    folder = Path(commands.__file__).parent
    for name, cloud in (("aws.yaml", "aws"), ("gcp.yaml", "gcp")):
        files = [*(folder / cloud).glob("*.py"), *folder.glob("*.py")]
        text = "".join(file.read_text() for file in files)
        for key in rendered(name, **account.site)["provider"].keys() - {"type"}:
            assert f'"{key}"' in text, (name, key)


@pytest.mark.parametrize("name", ["aws.yaml", "gcp.yaml"])
def test_an_idle_cluster_has_only_its_head(account: Account, name: str) -> None:
    config = valid(rendered(name, **account.site))
    types = config["available_node_types"]
    assert types[config["head_node_type"]]["resources"] == {"CPU": 0}
    assert all(node["min_workers"] == 0 for node in types.values())
    assert config["idle_timeout_minutes"] <= 10
    part_without_gpus(types)
    assert {"CPU": 4, "GPU": 1} in [node["resources"] for node in types.values()]


@pytest.mark.parametrize("name", ["aws.yaml", "gcp.yaml"])
def test_a_cluster_requires_a_token_and_its_dashboard_is_on_loopback(account: Account, name: str) -> None:
    config = valid(rendered(name, **account.site))
    assert "-e RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert "-e RAY_AUTH_TOKEN_PATH=/home/ray/.igpt/auth_token" in config["docker"]["run_options"]
    assert any("chmod 600" in command for command in config["setup_commands"])
    (start_head,) = [c for c in config["head_start_ray_commands"] if "--head" in c]
    assert "--dashboard-host=127.0.0.1" in start_head
    assert any("jobs/watch.py" in command for command in config["worker_start_ray_commands"])
    assert config["provider"]["use_internal_ips"] is True


def test_google_s_nodes_are_spot_as_intended_and_have_no_public_address(account: Account) -> None:
    types = valid(rendered("gcp.yaml"))["available_node_types"]
    for kind, node in types.items():
        config = node["node_config"]
        assert (config.get("scheduling", {}).get("provisioningModel") == "SPOT") == (kind in ("cpu", "gpu8-spot"))
        assert all("accessConfigs" not in interface for interface in config["networkInterfaces"])
        if kind != "head":
            assert config["serviceAccounts"][0]["email"].startswith("igpt-worker@")


def test_google_s_nodes_are_valid_for_its_api() -> None:
    """Compares every key with the API's description, which is part of the client that `ray up` needs for Google."""
    discovery = pytest.importorskip(
        "googleapiclient.discovery_cache", reason="google-api-python-client is not installed"
    )
    folder = Path(discovery.__file__).parent / "documents"
    schemas = json.loads((folder / "compute.v1.json").read_text())["schemas"]
    for node in rendered("gcp.yaml")["available_node_types"].values():
        assert unknown(node["node_config"], schemas["Instance"], schemas) == []
    wrong = copy.deepcopy(rendered("gcp.yaml")["available_node_types"]["cpu"]["node_config"])
    wrong["scheduling"]["provisioningModell"] = "SPOT"
    assert unknown(wrong, schemas["Instance"], schemas) == ["provisioningModell"]


def unknown(value: Any, schema: dict[str, Any], schemas: dict[str, Any]) -> list[str]:
    """Keys of `value` that are not in a Google schema, or have values of another type."""
    schema = schemas[schema["$ref"]] if "$ref" in schema else schema
    kinds = {"object": dict, "array": list, "string": str, "boolean": bool, "integer": int, "number": float}
    if not isinstance(value, kinds[schema["type"]]):
        return [f"{value!r} is not a {schema['type']}"]
    if isinstance(value, list):
        return [found for item in value for found in unknown(item, schema["items"], schemas)]
    if not isinstance(value, dict) or "properties" not in schema:
        return []
    known = schema["properties"]
    found = [key for key in value if key not in known]
    return found + [f for key in value.keys() & known.keys() for f in unknown(value[key], known[key], schemas)]
