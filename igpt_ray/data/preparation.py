"""The claim of a preparation on its token store: `<tokens>/preparation.json`, created before any other file.

Of two preparations with different settings that start at one root, the second is refused before it writes. Equal
settings share the claim, and so a killed preparation is completed by a repeat.
"""

import hashlib
from typing import Any, Literal

from pydantic import ValidationError

from igpt_ray import storage
from igpt_ray.data.config import PixelsConfig, PrepareConfig
from igpt_ray.data.sources import Plan
from igpt_ray.data.token_format import Strict, TokenFormat
from igpt_ray.errors import NotFound, TokenStoreError


class Preparation(Strict):
    """Everything that the bytes of the shards depend on."""

    format: Literal["igpt_ray preparation 1"] = "igpt_ray preparation 1"
    kind: TokenFormat
    pixels: PixelsConfig
    holdout: float
    views: int
    shard_images: int
    source: str
    """sha256 of the plan: names, sizes and labels of all images, whatever the source's URI."""


def preparation_of(settings: PrepareConfig, kind: TokenFormat, plan: Plan) -> Preparation:
    digest = hashlib.sha256(repr(plan.classes).encode("utf-8", "backslashreplace"))
    for unit in plan.units:
        digest.update(f"\0{unit.split}/{unit.name} {unit.digest}".encode())
    fields = settings.model_dump(include={"holdout", "views", "shard_images"})
    return Preparation(kind=kind, pixels=settings.pixels, source=digest.hexdigest(), **fields)


def create_or_check(root: str, preparation: Preparation) -> None:
    """Claim the token store at `root` for `preparation`. An equal claim is shared.

    Raises `TokenStoreError` that names the first differing field if another preparation has claimed it. A server that
    ignores conditional writes lets the last of concurrent writers win, so that the claim is also checked at the end.
    """
    uri = _uri(root)
    existing = _load(uri)
    if existing is None:
        storage.write_new(uri, (preparation.model_dump_json(indent=1) + "\n").encode())
        existing = _load(uri)
    if existing is None:
        raise TokenStoreError(f"{uri} was deleted while this preparation started: repeat it")
    if difference := _difference(existing, preparation):
        raise TokenStoreError(f"another preparation has claimed {root}, and {difference}: {_advice(uri)}")


def release(root: str, preparation: Preparation) -> None:
    """Remove the claim, if it is that of `preparation`: its source cannot be prepared and may now be changed."""
    if _load(_uri(root)) == preparation:
        storage.delete(_uri(root))


def _uri(root: str) -> str:
    return storage.join(root, "preparation.json")


def _advice(uri: str) -> str:
    return (
        f"choose another --tokens; or, if no preparation is running there, delete {uri} and repeat, which reuses the"
        " shards that fit"
    )


def _load(uri: str) -> Preparation | None:
    try:
        return Preparation.model_validate_json(storage.read(uri))
    except NotFound:
        return None
    except ValidationError as error:
        raise TokenStoreError(f"{uri} is damaged or of another version: {_advice(uri)}") from error


def _difference(existing: Preparation, requested: Preparation) -> str | None:
    theirs, ours = _settings(existing), _settings(requested)
    for field, value in ours.items():
        if theirs[field] != value:
            return f"its {field} is {theirs[field]}, not {value}"
    return None if existing.source == requested.source else "its source has another listing (files, sizes or labels)"


def _settings(preparation: Preparation) -> dict[str, Any]:
    return {
        **preparation.pixels.model_dump(),
        **preparation.kind.model_dump(),  # last, because its pipeline includes the version
        **preparation.model_dump(include={"holdout", "views", "shard_images"}),
    }
