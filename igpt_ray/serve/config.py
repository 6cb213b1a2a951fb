"""Settings of the server."""

import ipaddress
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from igpt_ray.settings import Count, Named, OptionalUri, Section


class ServeConfig(Section):
    """Serve releases over HTTP."""

    release: Named = ()
    """Releases, each a URI or name=URI; the name is what requests call it by. The first answers who names none."""
    heads: Named = ()
    """Probes that POST /v1/classify offers, each the `out` folder of jobs/probe.py or name=URI. They go to the release
    they were fitted on; a fine-tuned release brings its own."""
    keys: str = ""
    """Who may ask: env:NAME or the URI of a file, with a line for each key, its sha256 and a name."""
    open: bool = False
    """Ask for no key. Only on a loopback address."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: Annotated[int, Field(gt=0, lt=65536)] = 8000
    """Port to listen on."""
    replicas: Count = 1
    """Copies of each model."""
    slots: Count = 32
    """Pictures that a copy paints at once; a request for n of them takes n."""
    precision: Literal["float32", "bfloat16", "int8"] = "float32"
    """Of the weights that paint; scores, features and classes stay float32, as evaluation is."""
    queue: Count = 256
    """Requests that may wait or be worked on; the next is answered 429."""
    cpus: Annotated[float, Field(gt=0)] = 1
    """CPUs per replica."""
    gpus: Annotated[float, Field(ge=0)] = 0
    """GPUs per replica."""
    check: OptionalUri = ""
    """A file for `serve deploy` to check instead: every key, and what it serves. Nothing is started."""

    @model_validator(mode="after")
    def _someone_may_ask(self) -> Self:
        if self.check:
            return self
        if not self.release:
            raise ValueError("no release to serve: name one with --release")
        if self.open == bool(self.keys):
            raise ValueError(
                "say who may ask: --keys env:NAME or a file of hashed keys, or --open for a loopback address"
            )
        if self.open and not is_loopback(self.host):
            raise ValueError(
                f"--open asks nobody for a key, so --host {self.host} must be a loopback address: give --keys"
            )
        return self

    @property
    def releases(self) -> dict[str, str]:
        return dict(named.split("=", 1) for named in self.release)

    @property
    def probes(self) -> dict[str, str]:
        return dict(named.split("=", 1) for named in self.heads)


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
