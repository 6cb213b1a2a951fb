"""A run's metrics in Weights & Biases or MLflow: the lines of `metrics.py`, live, from worker 0. Extra: [track].

Where they go and who may write there is said by their own environment variables (`WANDB_API_KEY`, `WANDB_MODE`,
`MLFLOW_TRACKING_URI` ...), which the worker must have. A run that is resumed goes on in the same place, and a step that
it takes again is not there twice. A tracker that fails costs a warning and no step.
"""

import hashlib
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from typing import Any, Protocol

from igpt_ray.errors import SettingError
from igpt_ray.train.config import PretrainConfig

log = logging.getLogger(__name__)

PROJECT = "igpt_ray"
Line = dict[str, Any]


class Tracker(Protocol):
    def __init__(self, cfg: PretrainConfig): ...

    def log(self, line: Line) -> None: ...

    def finish(self) -> None: ...


class Beside:
    """Talks to a tracker in a thread, so that a slow one takes no time of the steps; one that fails is left."""

    def __init__(self, kind: type[Tracker], cfg: PretrainConfig):
        self.thread = ThreadPoolExecutor(1)
        self.tracker: Tracker | None = None
        self.thread.submit(self._or_leave, self._begin, kind, cfg)

    def log(self, line: Line) -> None:
        self.thread.submit(self._or_leave, self._log, line)

    def finish(self) -> None:
        """Wait until everything is handed over."""
        self.thread.submit(self._or_leave, self._finish)
        self.thread.shutdown()

    def _begin(self, kind: type[Tracker], cfg: PretrainConfig) -> None:
        self.tracker = kind(cfg)

    def _log(self, line: Line) -> None:
        if self.tracker is not None:
            self.tracker.log(line)

    def _finish(self) -> None:
        if self.tracker is not None:
            self.tracker.finish()

    def _or_leave(self, work: Callable[..., None], *arguments: Any) -> None:
        try:
            work(*arguments)
        except Exception as error:
            self.tracker = None
            log.warning("metrics are not tracked any more, training goes on: %s", " ".join(str(error).split()))


def tracker_of(cfg: PretrainConfig) -> Beside | None:
    """The tracker that `cfg.run.track` names, or None. Raises `SettingError` if its package is not installed."""
    if cfg.run.track is None:
        return None
    if find_spec(cfg.run.track) is None:
        raise SettingError(f"--run.track {cfg.run.track} needs the extra [track]: pip install 'igpt_ray[track]'")
    kinds: dict[str, type[Tracker]] = {"wandb": Wandb, "mlflow": Mlflow}
    return Beside(kinds[cfg.run.track], cfg)


def identity(cfg: PretrainConfig) -> str:
    """The same for a run that is resumed, another for every other folder."""
    return f"{cfg.run.name}-{hashlib.sha256(cfg.run.uri.encode()).hexdigest()[:8]}"


class Wandb:
    """Its server ignores steps that it has seen."""

    def __init__(self, cfg: PretrainConfig):
        import wandb

        self.run = wandb.init(
            project=PROJECT,
            id=identity(cfg),
            name=cfg.run.name,
            resume="allow",
            config=cfg.model_dump(mode="json"),
            settings=wandb.Settings(silent=True, console="off"),
        )

    def log(self, line: Line) -> None:
        self.run.log({name: value for name, value in line.items() if name != "step"}, step=line["step"])

    def finish(self) -> None:
        self.run.finish()


class Mlflow:
    """It would keep a step twice, so it is asked how far it has come."""

    def __init__(self, cfg: PretrainConfig):
        from mlflow import MlflowClient

        self.client = MlflowClient()
        there = self.client.get_experiment_by_name(PROJECT)
        experiment = there.experiment_id if there else self.client.create_experiment(PROJECT)
        name = identity(cfg)
        found = self.client.search_runs([experiment], filter_string=f"tags.`{PROJECT}.run` = '{name}'", max_results=1)
        if found:
            self.run_id = found[0].info.run_id
            self.client.update_run(self.run_id, status="RUNNING")
        else:
            created = self.client.create_run(experiment, run_name=cfg.run.name, tags={f"{PROJECT}.run": name})
            self.run_id = created.info.run_id
            for section, settings in cfg.model_dump(mode="json", include={"model", "optim", "data", "workers"}).items():
                for setting, value in settings.items():
                    self.client.log_param(self.run_id, f"{section}.{setting}", value)
        history = self.client.get_metric_history(self.run_id, "nats_per_token")
        self.step = max((metric.step for metric in history), default=0)

    def log(self, line: Line) -> None:
        from mlflow.entities import Metric

        if line["step"] > self.step:
            when = int(1000 * line["time"])
            metrics = [Metric(k, v, when, line["step"]) for k, v in line.items() if k not in ("step", "time")]
            self.client.log_batch(self.run_id, metrics=metrics)

    def finish(self) -> None:
        self.client.set_terminated(self.run_id)
