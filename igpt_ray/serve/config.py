"""Settings of the server."""

import ipaddress
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from igpt_ray.settings import Count, Named, OptionalUri, Section


class ServeConfig(Section):
    """Serve releases over HTTP."""

    release: Named = ()
    """Releases to serve, each a URI or name=URI. Requests select a model by name; the default is the first."""
    heads: Named = ()
    """Probes for POST /v1/classify, each the `out` folder of jobs/probe.py or name=URI. A probe is served with the
    release that it was fitted on. A fine-tuned release includes its own head."""
    keys: str = ""
    """API keys: env:NAME or the URI of a file, with one line per key: its sha256 and a name."""
    open: bool = False
    """Serve without keys. Requires a loopback address."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: Annotated[int, Field(gt=0, lt=65536)] = 8000
    """Port to listen on."""
    replicas: Count = 1
    """Replicas of each release."""
    slots: Count = 32
    """Samples that a replica generates at once. A request for n completions takes n slots."""
    precision: Literal["float32", "bfloat16", "int8"] = "float32"
    """Precision of the weights for completions. Scores, features and classes are float32, as in evaluation."""
    queue: Count = 256
    """Maximum number of requests that are queued or in progress; further requests get status 429."""
    decoders: Count = 2
    """Processes that decode the images of requests, each with at most 1 GiB of memory per image."""
    cpus: Annotated[float, Field(gt=0)] = 1
    """CPUs per replica."""
    gpus: Annotated[float, Field(ge=0)] = 0
    """GPUs per replica."""
    check: OptionalUri = ""
    """URI of a file for `serve deploy`: check its keys and print its releases, without starting anything."""

    @model_validator(mode="after")
    def _has_release_and_keys(self) -> Self:
        if self.check:
            return self
        if not self.release:
            raise ValueError("no release to serve: set --release")
        if self.open == bool(self.keys):
            raise ValueError("set either --keys (env:NAME or a file of hashed keys) or --open (loopback address only)")
        if self.open and not is_loopback(self.host):
            raise ValueError(
                f"--open serves without keys, so --host {self.host} must be a loopback address: set --keys"
            )
        return self

    @property
    def releases(self) -> dict[str, str]:
        return dict(entry.split("=", 1) for entry in self.release)

    @property
    def probes(self) -> dict[str, str]:
        return dict(entry.split("=", 1) for entry in self.heads)


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
