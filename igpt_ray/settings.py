"""The base classes and field types of all settings and results. Each sub-package has its settings in `config.py`."""

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from igpt_ray import storage

Uri = Annotated[str, AfterValidator(storage.absolute)]
OptionalUri = Annotated[str, AfterValidator(lambda uri: storage.absolute(uri) if uri else uri)]
Count = Annotated[int, Field(gt=0)]

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def _named(entries: tuple[str, ...]) -> tuple[str, ...]:
    """Entries as `name=URI`. The default name is the URI's last folder that is not called release."""
    uris: dict[str, str] = {}
    for entry in entries:
        name, equals, uri = entry.partition("=")
        if not equals or "/" in name:
            name, uri = "", entry
            parts = [part for part in storage.absolute(uri).split("/") if part and part != "release"]
            name = parts[-1] if parts else ""
        if not NAME.fullmatch(name):
            raise ValueError(f"{entry!r} yields no valid name: write name={uri} with letters, digits, '.', '_' or '-'")
        if name in uris:
            raise ValueError(f"two entries have the name {name!r}: write name=URI with different names")
        uris[name] = storage.absolute(uri)
    return tuple(f"{name}={uri}" for name, uri in uris.items())


Named = Annotated[
    tuple[str, ...], AfterValidator(_named), BeforeValidator(lambda uri: (uri,) if isinstance(uri, str) else uri)
]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class Result(BaseModel):
    """Base class of the results of commands. A field that does not apply to the settings is not set."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    def line(self) -> dict[str, Any]:
        """The fields of the command's JSON line."""
        return self.model_dump(mode="json", exclude_unset=True)


class PoolConfig(Section):
    """Pool of Ray Data actors."""

    size: Annotated[int, Field(ge=0)] = 0
    """Maximum number of actors; 0 is one per free CPU (or GPU, if they use one)."""
    cpus: Annotated[float, Field(gt=0)] = 1
    """CPUs per actor."""
    gpus: Annotated[float, Field(ge=0)] = 0
    """GPUs per actor."""
