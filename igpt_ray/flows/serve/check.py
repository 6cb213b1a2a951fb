"""Strict check of a file for `serve deploy`: Ray ignores most misspelt keys without a message."""

from collections.abc import Iterable
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from ray.runtime_env import RuntimeEnv
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import ServeDeploySchema

from igpt_ray import storage
from igpt_ray.errors import SettingError
from igpt_ray.serve.config import ServeConfig, is_loopback

Model = TypeVar("Model", bound=BaseModel)

HTTP = ("host", "port", "request_timeout_s")
"""Required keys of http_options. Ray's default is no timeout."""
AUTOSCALING = ("min_replicas", "max_replicas", "target_ongoing_requests")
"""Required keys of an autoscaling_config. Ray's defaults are one replica and two requests."""
BUILDER = "igpt_ray.flows.serve:build"
API = "api"


def deployment_of(release: str) -> str:
    """The name of a release's deployment in Ray Serve."""
    return f"release-{release}"


def check_file(uri: str) -> dict[str, Any]:
    """The releases that each application of the file serves. Raises `SettingError` that names the first wrong key."""
    try:
        config = yaml.safe_load(storage.read(uri))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingError(f"{uri} is not YAML: {error}") from error
    return check_config(config, uri)


def check_config(config: Any, file: str) -> dict[str, Any]:
    """`check_file` of the parsed content of `file`."""
    _validate(ServeDeploySchema, config, f"{file}: ")
    _require(config, ("proxy_location", "http_options", "applications"), file)
    _require(config["http_options"], HTTP, f"{file}: http_options")
    if not config["applications"]:
        raise SettingError(f"{file}: applications: expected at least one")
    applications = {}
    for app in config["applications"]:
        _require(app, ("name", "route_prefix", "args"), f"{file}: applications.{app.get('name')}")
        applications[app["name"]] = _releases(app, config["http_options"]["host"], file)
    return {"file": file, "applications": applications}


def _releases(app: dict[str, Any], host: str, file: str) -> dict[str, str]:
    """The releases of an application, by name."""
    where = f"{file}: applications.{app['name']}"
    if app["import_path"] != BUILDER:
        raise SettingError(f"{where}.import_path: expected {BUILDER}, got {app['import_path']}")
    if "check" in app["args"]:
        raise SettingError(f"{where}.args.check: remove it, it is only for the command line")
    settings = _validate(ServeConfig, app["args"], f"{where}.args.")
    if settings.open and not is_loopback(host):
        raise SettingError(f"{where}.args.open: http_options.host {host} is not a loopback address: set keys instead")
    _check_runtime_env(app, where)
    names = [API, *map(deployment_of, settings.releases)]
    for deployment in app.get("deployments", []):
        at = f"{where}.deployments.{deployment['name']}"
        if deployment["name"] not in names:
            raise SettingError(f"{at}: unknown deployment: expected one of {', '.join(names)}")
        _check_runtime_env(deployment.get("ray_actor_options", {}), f"{at}.ray_actor_options")
        autoscaling = deployment.get("autoscaling_config")
        if autoscaling is not None:  # the deployment's schema also allows any dictionary
            _validate(AutoscalingConfig, autoscaling, f"{at}.autoscaling_config.")
            _require(autoscaling, AUTOSCALING, f"{at}.autoscaling_config")
    return settings.releases


def _check_runtime_env(options: dict[str, Any], where: str) -> None:
    for key in options.get("runtime_env", {}):
        if key not in RuntimeEnv.known_fields:
            raise SettingError(f"{where}.runtime_env.{key}: unknown key")


def _validate(model: type[Model], values: Any, prefix: str) -> Model:
    try:
        return model.model_validate(values, extra="forbid")
    except ValidationError as error:
        first = error.errors()[0]
        message = "unknown key" if first["type"] == "extra_forbidden" else first["msg"]
        raise SettingError(f"{prefix}{'.'.join(map(str, first['loc']))}: {message}") from error


def _require(values: dict[str, Any], keys: Iterable[str], where: str) -> None:
    for key in keys:
        if values.get(key) is None:
            raise SettingError(f"{where}: {key} is missing")
