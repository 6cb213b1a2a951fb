"""A mock AWS account (moto) with the stacks of `infra/`, and IAM's decisions about calls.

moto does not enforce policies by their conditions, so `allowed` decides, by the part of IAM's rules that
`infra/roles.yaml` uses. An explicit Deny wins, and anything else needs an Allow; actions and resources may contain
`*`; the conditions are those of `CONDITIONS`. Any other condition is an error, so that none is ignored.
"""

import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
import botocore.client
from moto import mock_aws

ROOT = Path(__file__).resolve().parents[2]
REGION, ACCOUNT = "us-west-2", "123456789012"
HERE = f"arn:aws:ec2:{REGION}:{ACCOUNT}:"


class Account:
    """The resources that the stacks of `infra/` created in moto."""

    def __init__(self) -> None:
        self.site = {"Image": f"{ACCOUNT}.dkr.ecr.{REGION}.amazonaws.com/igpt-ray@sha256:{'0' * 64}"}
        self.ec2, self.iam = boto3.client("ec2", REGION), boto3.client("iam", REGION)
        self.cloudformation = boto3.client("cloudformation", REGION)
        self.site["Ami"] = self.ec2.describe_images()["Images"][0]["ImageId"]
        self.site["PlacementGroup"] = "close"  # moto's CloudFormation makes none
        self.deploy("storage", Bucket="some-data")
        self.deploy("network", Zone=f"{REGION}a")
        self.deploy("roles", Bucket="some-data", Vpc=self.site["Vpc"])

    def deploy(self, name: str, **parameters: str) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the three kinds of resources that moto passes over
            self.cloudformation.create_stack(
                StackName=name,
                TemplateBody=(ROOT / "infra" / f"{name}.yaml").read_text(),
                Parameters=[{"ParameterKey": key, "ParameterValue": value} for key, value in parameters.items()],
                Capabilities=["CAPABILITY_IAM"],
            )
        (stack,) = self.cloudformation.describe_stacks(StackName=name)["Stacks"]
        assert stack["StackStatus"] == "CREATE_COMPLETE"
        self.site |= {output["OutputKey"]: output["OutputValue"] for output in stack["Outputs"]}

    def statements(self, role: str) -> list[dict[str, Any]]:
        """Statements of all policies of `HeadRole`, `WorkerRole` or `ServeRole`, or of `Launcher` with `StartNodes`."""
        if role == "Launcher":
            listed = self.iam.list_policies(Scope="Local")["Policies"]
            arns = [p["Arn"] for p in listed if "Launcher" in p["PolicyName"] or "StartNodes" in p["PolicyName"]]
        else:
            name = next(r["RoleName"] for r in self.iam.list_roles()["Roles"] if role in r["RoleName"])
            assert not self.iam.list_role_policies(RoleName=name)["PolicyNames"]
            attached = self.iam.list_attached_role_policies(RoleName=name)["AttachedPolicies"]
            arns = [policy["PolicyArn"] for policy in attached]
        found = []
        for arn in arns:
            version = self.iam.get_policy(PolicyArn=arn)["Policy"]["DefaultVersionId"]
            document = self.iam.get_policy_version(PolicyArn=arn, VersionId=version)["PolicyVersion"]["Document"]
            found += (json.loads(document) if isinstance(document, str) else document)["Statement"]
        assert found, f"{role} has no policy, and would be refused everything"
        return found

    def role_of(self, profile: str) -> str:
        name = profile.rsplit("/", 1)[1]
        return self.iam.get_instance_profile(InstanceProfileName=name)["InstanceProfile"]["Roles"][0]["Arn"]

    def cluster_of(self, instance: str) -> dict[str, str]:
        (found,) = self.ec2.describe_instances(InstanceIds=[instance])["Reservations"]
        tags = {tag["Key"]: tag["Value"] for tag in found["Instances"][0]["Tags"]}
        return {"aws:ResourceTag/ray-cluster-name": tags["ray-cluster-name"]}


@contextmanager
def account() -> Iterator[Account]:
    with mock_aws():
        yield Account()


# ------------------------------------------------------------------------------------------------ calls


@contextmanager
def recorded(calls: list[tuple[str, dict[str, Any]]]) -> Iterator[None]:
    """Every call of this process to AWS, as (`ec2:RunInstances`, parameters)."""
    original = botocore.client.BaseClient._make_api_call

    def call(client: Any, operation: str, parameters: dict[str, Any]) -> Any:
        calls.append((f"{client.meta.service_model.service_name}:{operation}", parameters))
        return original(client, operation, parameters)

    botocore.client.BaseClient._make_api_call = call
    try:
        yield
    finally:
        botocore.client.BaseClient._make_api_call = original


def asked(account: Account, action: str, parameters: dict[str, Any]) -> list["Call"]:
    """IAM decisions that a recorded call needs: starting an instance needs one for each of its parts."""
    if action == "ec2:RunInstances":
        return _asked_to_run(account, parameters)
    if action == "ec2:CreateKeyPair":
        return [Call(action, f"{HERE}key-pair/{parameters['KeyName']}")]
    ids = parameters.get("InstanceIds") or parameters.get("Resources") or []
    if ids and not action.startswith("ec2:Describe"):
        return [Call(action, f"{HERE}instance/{i}", account.cluster_of(i)) for i in ids]
    return [Call(action, "*")]


def _asked_to_run(account: Account, p: dict[str, Any]) -> list["Call"]:
    tags = {f"aws:RequestTag/{tag['Key']}": tag["Value"] for tag in p["TagSpecifications"][0]["Tags"]}
    metadata = {"ec2:MetadataHttpTokens": p.get("MetadataOptions", {}).get("HttpTokens", "optional")}
    vpc = {"ec2:Vpc": f"{HERE}vpc/{account.site['Vpc']}"}
    interfaces = p.get("NetworkInterfaces", [p])
    inside = [f"subnet/{interface['SubnetId']}" for interface in interfaces] + ["network-interface/*"]
    inside += [f"security-group/{g}" for i in interfaces for g in i.get("Groups", i.get("SecurityGroupIds", []))]
    beside = ["volume/*", f"key-pair/{p['KeyName']}"]
    beside += [f"placement-group/{p['Placement']['GroupName']}"] if "Placement" in p else []
    run = "ec2:RunInstances"
    return [
        Call(run, f"{HERE}instance/*", tags | metadata),
        Call("ec2:CreateTags", f"{HERE}instance/*", tags | {"ec2:CreateAction": "RunInstances"}),
        Call(run, f"arn:aws:ec2:{REGION}::image/{p['ImageId']}"),
        *(Call(run, HERE + what, vpc) for what in inside),
        *(Call(run, HERE + what) for what in beside),
        Call(
            "iam:PassRole",
            account.role_of(p["IamInstanceProfile"]["Arn"]),
            {"iam:PassedToService": "ec2.amazonaws.com"},
        ),
    ]


# ------------------------------------------------------------------------------------------------ decisions


@dataclass(frozen=True)
class Call:
    action: str
    resource: str
    context: dict[str, str] = field(default_factory=dict, hash=False)
    """What the service tells IAM of the call: `s3:prefix`, `aws:RequestTag/...`."""


def matches(pattern: str, value: str) -> bool:
    return re.fullmatch(re.escape(pattern).replace(r"\*", ".*"), value, re.DOTALL) is not None


CONDITIONS: dict[str, Callable[[str, str], bool]] = {
    "StringEquals": str.__eq__,
    "ArnEquals": matches,
    "StringLike": matches,
}


def allowed(statements: Iterable[dict[str, Any]], call: Call) -> bool:
    effects = [statement["Effect"] for statement in statements if _speaks_of(statement, call)]
    return "Allow" in effects and "Deny" not in effects


def _speaks_of(statement: dict[str, Any], call: Call) -> bool:
    assert statement.keys() <= {"Effect", "Action", "Resource", "Condition", "Sid"}, statement
    return (
        any(matches(action.lower(), call.action.lower()) for action in listed(statement["Action"]))
        and any(matches(resource, call.resource) for resource in listed(statement["Resource"]))
        and all(_holds(operator, keys, call) for operator, keys in statement.get("Condition", {}).items())
    )


def _holds(operator: str, keys: dict[str, Any], call: Call) -> bool:
    """Every key must have one of its values; a key that the call does not have fails."""
    compare = CONDITIONS[operator]
    return all(
        key in call.context and any(compare(value, call.context[key]) for value in listed(values))
        for key, values in keys.items()
    )


def listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
