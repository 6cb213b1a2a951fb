"""AWS's decision about a call, from the policies of `infra/roles.yaml` as CloudFormation has deployed them.

The part of IAM's rules that they use: an explicit Deny wins, anything else wants an Allow; actions and resources with
`*`; the conditions of `CONDITIONS`. A condition of another kind is refused, so that none is taken for granted.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any


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
