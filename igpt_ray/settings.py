"""What all settings share: the strict base class, and types of fields. Each wing has its own in `config.py`."""

import re
from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from igpt_ray import storage

Uri = Annotated[str, AfterValidator(storage.absolute)]
OptionalUri = Annotated[str, AfterValidator(lambda uri: storage.absolute(uri) if uri else uri)]
Count = Annotated[int, Field(gt=0)]

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def _named(entries: tuple[str, ...]) -> tuple[str, ...]:
    """Each `name=URI`. A bare URI is called after its last folder that tells something: release/ of a run does not."""
    found: dict[str, str] = {}
    for entry in entries:
        name, equals, uri = entry.partition("=")
        if not equals or "/" in name:
            name, uri = "", entry
            parts = [part for part in storage.absolute(uri).split("/") if part and part != "release"]
            name = parts[-1] if parts else ""
        if not NAME.fullmatch(name):
            raise ValueError(f"{entry!r} has no name for requests to use: write name={uri}, of letters, digits, . _ -")
        if name in found:
            raise ValueError(f"two are called {name!r}: write name=URI with different names")
        found[name] = storage.absolute(uri)
    return tuple(f"{name}={uri}" for name, uri in found.items())


Named = Annotated[
    tuple[str, ...], AfterValidator(_named), BeforeValidator(lambda one: (one,) if isinstance(one, str) else one)
]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class PoolConfig(Section):
    """Ray Data actors that share the work."""

    size: Annotated[int, Field(ge=0)] = 0
    """Largest number of actors; 0 is one for each free CPU (or GPU, if they use one)."""
    cpus: Annotated[float, Field(gt=0)] = 1
    """CPUs per actor."""
    gpus: Annotated[float, Field(ge=0)] = 0
    """GPUs per actor."""
