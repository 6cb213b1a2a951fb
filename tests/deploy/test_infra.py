"""The stacks of `infra/` deploy, delete no release, and give each role only the permissions it needs."""

import json
import os
import re
import subprocess
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aws
import pytest
import yaml
from aws import ACCOUNT, HERE, REGION, Account, Call, allowed

from igpt_ray import object_clients, storage, weights

ROOT = Path(__file__).resolve().parents[2]
BUCKET = "arn:aws:s3:::some-data"
TEMPLATES = sorted(path.stem for path in ROOT.glob("infra/*.yaml"))


@pytest.fixture(scope="module")
def account() -> Iterator[Account]:
    keys = dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), "any")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**keys, "AWS_DEFAULT_REGION": REGION}.items():
            patch.setenv(name, value)
        patch.delenv("AWS_ENDPOINT_URL", raising=False)
        with aws.account() as account:
            yield account


def template(name: str) -> dict[str, Any]:
    """Parsed template, with `!Sub x` as {"Sub": x}."""

    class Loader(yaml.SafeLoader):
        pass

    def short(loader: Any, tag: str, node: Any) -> dict[str, Any]:
        scalar = isinstance(node, yaml.ScalarNode)
        return {tag: loader.construct_scalar(node) if scalar else loader.construct_sequence(node)}

    Loader.add_multi_constructor("!", short)
    return yaml.load((ROOT / "infra" / f"{name}.yaml").read_text(), Loader)


# ------------------------------------------------------------------------------------------------ templates


def lint(text: str) -> list[str]:
    """Errors and warnings of cfn-lint."""
    from cfnlint.api import lint_all

    return [str(match) for match in lint_all(text) if match.rule.id[0] in "EW"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_passes_cfn_lint(name: str) -> None:
    assert lint((ROOT / "infra" / f"{name}.yaml").read_text()) == []


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_misspelt_property_would_be_detected(name: str) -> None:
    """Checks the test above, with the second letter of each property's name removed."""
    text = (ROOT / "infra" / f"{name}.yaml").read_text()
    wrong = re.sub(r"(Properties:(?: #.*)?\n\s+|Properties: \{ )(\w)\w(\w+):", r"\1\2\3:", text, count=1)
    assert wrong != text
    assert lint(wrong)


def test_the_bucket_is_encrypted_private_and_requires_tls() -> None:
    resources = template("storage")["Resources"]
    bucket = resources["Data"]["Properties"]
    assert bucket["BucketEncryption"]["ServerSideEncryptionConfiguration"]
    assert set(bucket["PublicAccessBlockConfiguration"].values()) == {True}
    assert len(bucket["PublicAccessBlockConfiguration"]) == 4
    assert resources["Data"]["DeletionPolicy"] == resources["Data"]["UpdateReplacePolicy"] == "Retain"
    (statement,) = resources["OnlyOverTls"]["Properties"]["PolicyDocument"]["Statement"]
    assert (statement["Effect"], statement["Principal"], statement["Action"]) == ("Deny", "*", "s3:*")
    assert statement["Resource"] == [{"GetAtt": "Data.Arn"}, {"Sub": "${Data.Arn}/*"}]
    assert statement["Condition"] == {"Bool": {"aws:SecureTransport": "false"}}


def test_s3_accepts_the_bucket_s_policy_and_rules(account: Account) -> None:
    """moto's CloudFormation ignores both, so that the test sets them."""
    import boto3

    s3, resources = boto3.client("s3", REGION), template("storage")["Resources"]
    policy = resources["OnlyOverTls"]["Properties"]["PolicyDocument"]
    policy["Statement"][0]["Resource"] = [BUCKET, f"{BUCKET}/*"]
    s3.put_bucket_policy(Bucket="some-data", Policy=json.dumps(policy))
    rules = [rule_of_s3(rule) for rule in lifecycle()]
    s3.put_bucket_lifecycle_configuration(Bucket="some-data", LifecycleConfiguration={"Rules": rules})
    assert len(s3.get_bucket_lifecycle_configuration(Bucket="some-data")["Rules"]) == 2
    s3.delete_bucket_policy(Bucket="some-data")


def lifecycle() -> list[dict[str, Any]]:
    return template("storage")["Resources"]["Data"]["Properties"]["LifecycleConfiguration"]["Rules"]


def rule_of_s3(rule: dict[str, Any]) -> dict[str, Any]:
    """A lifecycle rule in the format of S3's API."""
    rule = {("ID" if key == "Id" else key): value for key, value in rule.items()}
    if "Transitions" in rule:
        rule["Transitions"] = [
            {"StorageClass": t["StorageClass"], "Days": t["TransitionInDays"]} for t in rule["Transitions"]
        ]
    prefix = rule.pop("Prefix", "")
    return {**rule, "Filter": {"Prefix": prefix}}


def test_no_lifecycle_rule_touches_a_release() -> None:
    """No rule expires objects, and only source images change their storage class."""
    for rule in lifecycle():
        assert not [key for key in rule if "Expir" in key]
        assert "Transitions" not in rule or rule["Prefix"] == "imagenet/"


def test_no_inbound_connection_from_outside_is_allowed() -> None:
    resources = template("network")["Resources"].values()
    ingress = [r["Properties"] for r in resources if r["Type"] == "AWS::EC2::SecurityGroupIngress"]
    assert ingress
    assert all("SourceSecurityGroupId" in rule and "CidrIp" not in rule for rule in ingress)
    assert not [r for r in resources if "SecurityGroupIngress" in r.get("Properties", {})]


# ------------------------------------------------------------------------------------------------ roles

ROLES = ("HeadRole", "WorkerRole", "ServeRole", "Launcher")

NEVER = {
    "*": [
        Call("iam:CreateUser", f"arn:aws:iam::{ACCOUNT}:user/x"),
        Call("iam:AttachRolePolicy", f"arn:aws:iam::{ACCOUNT}:role/x"),
        Call("iam:PutRolePolicy", f"arn:aws:iam::{ACCOUNT}:role/x"),
        Call("iam:CreateAccessKey", f"arn:aws:iam::{ACCOUNT}:user/x"),
        Call("iam:PassRole", f"arn:aws:iam::{ACCOUNT}:role/admin", {"iam:PassedToService": "ec2.amazonaws.com"}),
        Call("sts:AssumeRole", f"arn:aws:iam::{ACCOUNT}:role/admin"),
        Call("s3:PutBucketPolicy", BUCKET),
        Call("s3:DeleteBucket", BUCKET),
        Call("s3:PutLifecycleConfiguration", BUCKET),
        Call("s3:PutObjectAcl", f"{BUCKET}/runs/s1/release/model.safetensors"),
        Call("s3:DeleteObject", f"{BUCKET}/runs/s1/release/model.safetensors"),
        Call("s3:DeleteObject", f"{BUCKET}/releases/igpt-s/model.safetensors"),
        Call("s3:DeleteObject", f"{BUCKET}/runs/s1/release/checkpoints/x"),
        Call("s3:DeleteObject", f"{BUCKET}/imagenet/train.tar"),
        Call("s3:PutObject", f"{BUCKET}/imagenet/train.tar"),
        Call("s3:GetObject", "arn:aws:s3:::other-data/x"),
        Call("s3:ListBucket", "arn:aws:s3:::other-data", {"s3:prefix": ""}),
        Call("s3:ListAllMyBuckets", "*"),
        Call("ec2:AuthorizeSecurityGroupIngress", f"{HERE}security-group/sg-1"),
        Call("ec2:ModifyInstanceMetadataOptions", f"{HERE}instance/i-1"),
        Call("ec2:TerminateInstances", f"{HERE}instance/i-1", {"aws:ResourceTag/ray-cluster-name": "theirs"}),
        Call("ec2:TerminateInstances", f"{HERE}instance/i-1"),
        Call("ec2:CreateTags", f"{HERE}instance/i-1", {"aws:RequestTag/ray-cluster-name": "igpt"}),
        Call("ec2:RunInstances", f"{HERE}instance/*", {"aws:RequestTag/ray-cluster-name": "igpt"}),
        Call(
            "ec2:RunInstances",
            f"{HERE}instance/*",
            {"aws:RequestTag/ray-cluster-name": "theirs", "ec2:MetadataHttpTokens": "required"},
        ),
        Call("ec2:RunInstances", f"{HERE}subnet/subnet-1", {"ec2:Vpc": f"{HERE}vpc/vpc-theirs"}),
        Call("ecr:PutImage", f"arn:aws:ecr:{REGION}:{ACCOUNT}:repository/igpt-ray"),
        Call("ecr:BatchGetImage", f"arn:aws:ecr:{REGION}:{ACCOUNT}:repository/other"),
        Call("secretsmanager:GetSecretValue", "*"),
    ],
    "HeadRole": [Call("ssm:StartSession", f"{HERE}instance/i-1"), Call("ec2:CreateKeyPair", f"{HERE}key-pair/x")],
    "WorkerRole": [
        Call("ec2:DescribeInstances", "*"),
        Call("ec2:TerminateInstances", f"{HERE}instance/i-1", {"aws:ResourceTag/ray-cluster-name": "igpt"}),
        Call("ssmmessages:OpenDataChannel", "*"),
    ],
    "ServeRole": [
        Call("ec2:DescribeInstances", "*"),
        Call("s3:PutObject", f"{BUCKET}/runs/s1/release/model.safetensors"),
        Call("s3:GetObject", f"{BUCKET}/tokens/manifest.json"),
        Call("s3:GetObject", f"{BUCKET}/imagenet/train.tar"),
        Call("s3:GetObject", f"{BUCKET}/runs/s1/checkpoints/step_00000010/.metadata"),
        Call("s3:ListBucket", BUCKET, {"s3:prefix": "tokens/"}),
        Call("s3:ListBucket", BUCKET),
    ],
    "Launcher": [
        Call("s3:GetObject", f"{BUCKET}/tokens/manifest.json"),
        Call("ssm:StartSession", f"{HERE}instance/i-1"),
        Call("ssm:SendCommand", f"{HERE}instance/i-1"),
    ],
}


@pytest.mark.parametrize("role", ROLES)
def test_a_role_is_denied_forbidden_actions(account: Account, role: str) -> None:
    statements = account.statements(role)
    assert [call for call in NEVER["*"] + NEVER[role] if allowed(statements, call)] == []


def test_only_actions_without_resources_are_allowed_on_all_resources(account: Account) -> None:
    """No action has a wildcard; `Resource: *` is used only for actions without resources, and for the agent's."""
    for role in ROLES:
        for statement in account.statements(role):
            actions = aws.listed(statement["Action"])
            assert not [action for action in actions if "*" in action]
            if "*" in aws.listed(statement["Resource"]):
                assert all(a.startswith(("ssm", "ecr:GetAuthorizationToken", "ec2:Describe")) for a in actions)


def test_every_role_may_pull_the_image(account: Account) -> None:
    repository = f"arn:aws:ecr:{REGION}:{ACCOUNT}:repository/igpt-ray"
    pull = [Call(f"ecr:{a}", repository) for a in ("BatchGetImage", "GetDownloadUrlForLayer")]
    for role in ("HeadRole", "WorkerRole", "ServeRole"):
        assert all(allowed(account.statements(role), c) for c in [Call("ecr:GetAuthorizationToken", "*"), *pull])


def test_the_evaluation_supports_denial_and_conditions() -> None:
    """Compares the evaluation with known decisions of IAM."""
    allow = {"Effect": "Allow", "Action": ["s3:Get*"], "Resource": "arn:b/*", "Condition": {"StringLike": {"k": "a*"}}}
    deny = {"Effect": "Deny", "Action": "s3:GetObject", "Resource": "arn:b/secret/*"}
    yes = Call("s3:GetObject", "arn:b/x", {"k": "abc"})
    assert allowed([allow, deny], yes)
    for no in (
        Call("s3:GetObject", "arn:b/secret/x", {"k": "abc"}),
        Call("s3:GetObject", "arn:b/x", {"k": "b"}),
        Call("s3:GetObject", "arn:b/x"),
        Call("s3:PutObject", "arn:b/x", {"k": "abc"}),
        Call("s3:GetObject", "arn:c/x", {"k": "abc"}),
    ):
        assert not allowed([allow, deny], no)
    with pytest.raises(KeyError, match="IpAddress"):
        allowed([allow | {"Condition": {"IpAddress": {"aws:SourceIp": "10.0.0.0/8"}}}], yes)


# ------------------------------------------------------------------------------------------------ what jobs ask for


def action_of(method: str, url: str) -> Call:
    """IAM action that S3 checks for a request."""
    parts = urllib.parse.urlsplit(url)
    bucket, _, key = urllib.parse.unquote(parts.path).lstrip("/").partition("/")
    query = dict(urllib.parse.parse_qsl(parts.query, keep_blank_values=True))
    if not key:
        assert method in ("GET", "HEAD"), (method, url)
        return Call("s3:ListBucket", f"arn:aws:s3:::{bucket}", {"s3:prefix": query.get("prefix", "")})
    actions = {"GET": "GetObject", "HEAD": "GetObject", "PUT": "PutObject", "POST": "PutObject"}
    deletion = "AbortMultipartUpload" if "uploadId" in query else "DeleteObject"
    return Call(f"s3:{deletion if method == 'DELETE' else actions[method]}", f"arn:aws:s3:::{bucket}/{key}")


def requests_since(endpoint: str, what: str) -> list[Call]:
    """Recorded requests of moto; `what` is start, or download."""
    request = urllib.request.Request(f"{endpoint}/moto-api/recorder/{what}-recording", method="POST")
    if what == "download":
        request.method = "GET"
    with urllib.request.urlopen(request) as answer:
        lines = answer.read().decode().splitlines()
    kept = [json.loads(line) for line in lines if line.startswith("{") and "url" in line]
    return [action_of(line["method"], line["url"]) for line in kept]


@pytest.mark.ray
@pytest.mark.slow
def test_roles_allow_all_requests_of_preparation_training_and_serving(
    account: Account, moto_s3: str, aws_at_moto: str, digit_images: str
) -> None:
    """Runs the flows against a server that records every request."""
    bucket = aws_at_moto
    for path in sorted(Path(digit_images).rglob("*.png"))[:60]:
        storage.write(storage.join(bucket, "imagenet", str(path.relative_to(digit_images))), path.read_bytes())
    requests_since(moto_s3, "start")
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "tests/support/stages.py", bucket], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    jobs = requests_since(moto_s3, "download")
    weights.load_release(f"{bucket}/runs/s1/release")
    serving = requests_since(moto_s3, "download")[len(jobs) :]

    ours = {call.action for call in jobs}
    assert ours >= {"s3:ListBucket", "s3:GetObject", "s3:PutObject", "s3:DeleteObject"}
    assert any("/checkpoints/" in call.resource for call in jobs if call.action == "s3:DeleteObject")
    assert any("left-over" in call.resource for call in jobs if call.action == "s3:DeleteObject")
    assert serving
    for role, calls in (("HeadRole", jobs), ("WorkerRole", jobs), ("ServeRole", serving)):
        statements = account.statements(role)
        refused = {c for c in calls if not allowed(statements, here(c, bucket))}
        assert not refused, role


def here(call: Call, bucket: str) -> Call:
    """The same URI in the bucket of the stacks."""
    return Call(call.action, call.resource.replace(bucket.removeprefix("s3://"), "some-data", 1), call.context)


@pytest.fixture
def aws_at_moto(moto_s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket on the moto server: `on_moto` for a test that also has a moto account in its own process."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", moto_s3)
    object_clients.clear_cache()
    bucket = "bucket-of-roles"
    object_clients.s3_client().create_bucket(Bucket=bucket, CreateBucketConfiguration={"LocationConstraint": REGION})
    yield f"s3://{bucket}"
    object_clients.clear_cache()
