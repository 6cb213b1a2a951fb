"""Trackers: worker 0 sends the lines of `metrics.py` to Weights & Biases or MLflow. Extra: [track].

Worker 0 needs the environment variables of the service (`WANDB_API_KEY`, `WANDB_MODE`, `MLFLOW_TRACKING_URI` ...). A
resumed run continues in the same place, and repeated steps are logged once.
"""

import hashlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from typing import Any

from igpt_ray.errors import SettingError
from igpt_ray.train.config import PretrainConfig
from igpt_ray.train.metrics import Line

log = logging.getLogger(__name__)

PROJECT = "igpt_ray"


class Tracker(ABC):
    """Calls a service in a thread, so that it does not delay steps. An error disables it with a warning."""

    def __init__(self, cfg: PretrainConfig):
        self.thread, self.failed = ThreadPoolExecutor(1), False
        self.thread.submit(self._run, self._start, cfg)

    def log(self, line: Line) -> None:
        self.thread.submit(self._run, self._log, line)

    def finish(self) -> None:
        """Wait until the service has all lines."""
        self.thread.submit(self._run, self._finish)
        self.thread.shutdown()

    def _run(self, call: Callable[..., None], *arguments: Any) -> None:
        if self.failed:
            return
        try:
            call(*arguments)
        except Exception as error:
            self.failed = True
            log.warning("the tracker failed and is disabled, training continues: %s", " ".join(str(error).split()))

    @abstractmethod
    def _start(self, cfg: PretrainConfig) -> None: ...

    @abstractmethod
    def _log(self, line: Line) -> None: ...

    @abstractmethod
    def _finish(self) -> None: ...


def tracker_of(cfg: PretrainConfig) -> Tracker | None:
    """The tracker that `cfg.run.track` names, or None. Raises `SettingError` if its package is not installed."""
    if cfg.run.track is None:
        return None
    if find_spec(cfg.run.track) is None:
        raise SettingError(f"--run.track {cfg.run.track} needs the extra [track]: pip install 'igpt_ray[track]'")
    kinds: dict[str, type[Tracker]] = {"wandb": Wandb, "mlflow": Mlflow}
    return kinds[cfg.run.track](cfg)


def identity(cfg: PretrainConfig) -> str:
    """Id of a run, the same after a resume. Runs in different folders have different ids."""
    return f"{cfg.run.name}-{hashlib.sha256(cfg.run.uri.encode()).hexdigest()[:8]}"


class Wandb(Tracker):
    """Weights & Biases. Its server ignores steps that it already has."""

    def _start(self, cfg: PretrainConfig) -> None:
        import wandb

        self.run = wandb.init(
            project=PROJECT,
            id=identity(cfg),
            name=cfg.run.name,
            resume="allow",
            config=cfg.model_dump(mode="json"),
            settings=wandb.Settings(silent=True, console="off"),
        )

    def _log(self, line: Line) -> None:
        self.run.log({name: value for name, value in line.items() if name != "step"}, step=line["step"])

    def _finish(self) -> None:
        self.run.finish()


class Mlflow(Tracker):
    """MLflow. It stores repeated steps, so steps up to the last one in its history are skipped."""

    def _start(self, cfg: PretrainConfig) -> None:
        from mlflow import MlflowClient

        self.client = MlflowClient()
        existing = self.client.get_experiment_by_name(PROJECT)
        experiment = existing.experiment_id if existing else self.client.create_experiment(PROJECT)
        name = identity(cfg)
        runs = self.client.search_runs([experiment], filter_string=f"tags.`{PROJECT}.run` = '{name}'", max_results=1)
        if runs:
            self.run_id = runs[0].info.run_id
            self.client.update_run(self.run_id, status="RUNNING")
        else:
            created = self.client.create_run(experiment, run_name=cfg.run.name, tags={f"{PROJECT}.run": name})
            self.run_id = created.info.run_id
            for section, settings in cfg.model_dump(mode="json", include={"model", "optim", "data", "workers"}).items():
                for setting, value in settings.items():
                    self.client.log_param(self.run_id, f"{section}.{setting}", value)
        history = self.client.get_metric_history(self.run_id, "nats_per_token")
        self.step = max((metric.step for metric in history), default=0)

    def _log(self, line: Line) -> None:
        from mlflow.entities import Metric

        if line["step"] > self.step:
            milliseconds = int(1000 * line["time"])
            metrics = [Metric(k, v, milliseconds, line["step"]) for k, v in line.items() if k not in ("step", "time")]
            self.client.log_batch(self.run_id, metrics=metrics)

    def _finish(self) -> None:
        self.client.set_terminated(self.run_id)
