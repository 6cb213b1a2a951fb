"""A strict look at a file for `serve deploy`: Ray takes misspelt keys and says nothing, at most levels of it."""

import difflib
import typing
from collections.abc import Iterable
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from ray.runtime_env import RuntimeEnv
from ray.serve.schema import ServeDeploySchema

from igpt_ray import storage
from igpt_ray.errors import SettingError
from igpt_ray.serve.config import ServeConfig, is_loopback

HTTP = ("host", "port", "request_timeout_s")
"""What http_options must say; Ray's default is no timeout."""
AUTOSCALING = ("min_replicas", "max_replicas", "target_ongoing_requests")
"""What a deployment that grows must say; Ray's defaults are one replica and two requests."""
BUILDER = "igpt_ray.flows.serve:build"
API = "api"


def deployment_of(release: str) -> str:
    """What the replicas of a release are called in Serve, and in a YAML's `deployments`."""
    return f"release-{release}"


def check_file(uri: str) -> dict[str, Any]:
    """What the file serves. Raises `SettingError` that names the first thing wrong, and where."""
    try:
        said = yaml.safe_load(storage.read(uri))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingError(f"{uri} is no YAML: {error}") from error
    return check_config(said, uri)


def check_config(said: Any, where: str) -> dict[str, Any]:
    _check_keys(said, ServeDeploySchema, where)
    try:
        ServeDeploySchema(**said)
    except ValidationError as error:
        raise SettingError(f"{where}: {_first(error)}") from error
    _need(said, ("proxy_location", "http_options", "applications"), where)
    _need(said["http_options"], HTTP, f"{where}: http_options")
    ours = [app for app in said["applications"] if app.get("import_path") == BUILDER]
    if len(ours) != len(said["applications"]) or not ours:
        raise SettingError(f"{where}: applications: expected import_path {BUILDER} in each, and at least one")
    served = {}
    for app in ours:
        at = f"{where}: applications.{app.get('name')}"
        _need(app, ("name", "route_prefix", "args"), at)
        settings = _settings(app["args"], at)
        if settings.open and not is_loopback(said["http_options"]["host"]):
            raise SettingError(
                f"{at}.args.open: asks nobody for a key, and http_options.host is not a loopback address"
            )
        _check_deployments(app.get("deployments", []), settings, at)
        served[app["name"]] = settings.releases
    return {"file": where, "applications": served}


def _settings(args: Any, where: str) -> ServeConfig:
    if isinstance(args, dict) and "check" in args:
        raise SettingError(f"{where}.args.check: a file to serve from checks nothing")
    try:
        return ServeConfig.model_validate(args)
    except ValidationError as error:
        raise SettingError(f"{where}.args: {_first(error)}") from error


def _check_deployments(deployments: list[dict[str, Any]], settings: ServeConfig, where: str) -> None:
    names = [API, *map(deployment_of, settings.releases)]
    for deployment in deployments:
        at = f"{where}.deployments.{deployment.get('name')}"
        _need(deployment, ("name",), at)
        if deployment["name"] not in names:
            raise SettingError(f"{at}: no such deployment: there are {', '.join(names)}")
        if "autoscaling_config" in deployment:
            _need(deployment["autoscaling_config"], AUTOSCALING, f"{at}.autoscaling_config")


def _check_keys(said: Any, kind: Any, where: str) -> None:
    """Every key of every mapping is one that Ray's schema has at that place."""
    models = list(_models(kind))
    if isinstance(said, list):
        for i, one in enumerate(said):
            _check_keys(one, kind, f"{where}[{i}]")
    if not models:
        return
    if not isinstance(said, (dict, list)):
        raise SettingError(f"{where}: expected keys and values, got {said!r}")
    if isinstance(said, dict):
        fields = {name: field.annotation for model in models for name, field in model.model_fields.items()}
        for key, value in said.items():
            at = f"{where}: {key}" if kind is ServeDeploySchema else f"{where}.{key}"
            _known(key, fields, at)
            if key == "runtime_env" and isinstance(value, dict):
                for name in value:
                    _known(name, RuntimeEnv.known_fields, f"{at}.{name}")
            _check_keys(value, fields[key], at)


def _models(kind: Any) -> Iterable[type[BaseModel]]:
    """The schemas in a type: itself, or those in its list or union."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        yield kind
    for part in typing.get_args(kind):
        yield from _models(part)


def _known(key: Any, names: Iterable[str], at: str) -> None:
    if key not in names:
        near = difflib.get_close_matches(str(key), list(names), 1)
        raise SettingError(f"{at}: unknown key{f', did you mean {near[0]}?' if near else ''}")


def _need(said: dict[str, Any], keys: Iterable[str], where: str) -> None:
    for key in keys:
        if said.get(key) is None:
            raise SettingError(f"{where}: {key} is missing")


def _first(error: ValidationError) -> str:
    first = error.errors()[0]
    return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"
