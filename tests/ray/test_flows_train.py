"""Pretraining with Ray Train: through `ray job submit`, on any number of workers, and resumed.

What kills it is in test_flows_kills.py.
"""

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from igpt_ray import artifact, storage, weights
from igpt_ray.data.token_store import TokenStore, tokens_of
from igpt_ray.errors import CheckpointError, SettingError, TokenStoreError
from igpt_ray.evaluate.config import EvaluateConfig, ProbeConfig, ScoreConfig
from igpt_ray.evaluate.features import FeatureStore
from igpt_ray.evaluate.likelihood import masked_nats
from igpt_ray.flows import batch, evaluate, serve, train
from igpt_ray.flows.probe import probe_layers
from igpt_ray.flows.serve.replica import Replica
from igpt_ray.generate.config import CompleteConfig
from igpt_ray.model.config import ModelConfig
from igpt_ray.serve.config import ServeConfig
from igpt_ray.train import checkpoint, metrics
from igpt_ray.train.config import DataConfig, OptimConfig, PretrainConfig, RunConfig, WorkersConfig
from tests.ray.test_flows_job import handle_sigint

pytestmark = pytest.mark.ray
ROOT = Path(__file__).resolve().parents[2]
STEPS = 24


def settings_for(prepared: str, name: str, **changes: Any) -> PretrainConfig:
    return PretrainConfig(
        model=ModelConfig(n_layer=2, n_embd=32, n_head=2, n_px=8, n_vocab=16),
        optim=OptimConfig(batch_size=9, steps=STEPS, warmup_steps=4),
        data=DataConfig(tokens=storage.join(prepared, "tokens")),
        workers=WorkersConfig(n=2, micro_batch=2),
        run=RunConfig(root=storage.join(prepared, "runs"), name=name, checkpoint_every=4, keep_every=4, log_every=4),
    ).model_copy(update=changes)


def words_of(settings: PretrainConfig) -> list[str]:
    """The settings that differ from the preset tiny, as a user would type them."""
    s = settings
    return [
        *("tiny", "--model.n-layer", str(s.model.n_layer), "--model.n-embd", str(s.model.n_embd)),
        *("--model.n-head", str(s.model.n_head), "--model.n-vocab", str(s.model.n_vocab)),
        *("--optim.batch-size", str(s.optim.batch_size), "--optim.steps", str(s.optim.steps)),
        *("--optim.warmup-steps", str(s.optim.warmup_steps), "--data.tokens", s.data.tokens),
        *("--workers.n", str(s.workers.n), "--workers.micro-batch", str(s.workers.micro_batch)),
        *("--run.root", s.run.root, "--run.name", s.run.name),
        *("--run.checkpoint-every", str(s.run.checkpoint_every), "--run.log-every", str(s.run.log_every)),
        *("--run.keep-every", str(s.run.keep_every)),
    ]


@pytest.fixture(scope="module")
def undisturbed(cluster: str, prepared: str) -> dict[str, Any]:
    """A run of two workers on three nodes, submitted as users do."""
    words = ["ray", "job", "submit", "--address", cluster, "--working-dir", ".", "--", "python", "jobs/pretrain.py"]
    words += words_of(settings_for(prepared, "undisturbed"))
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    report: dict[str, Any] = json.loads(lines[-1])
    return report


def weights_of(run: str) -> bytes:
    return storage.read(storage.join(run, "release", "model.safetensors"))


def losses_of(run: str) -> dict[int, float]:
    return {line["step"]: line["nats_per_token"] for line in metrics.read(run)}


def test_a_submitted_run_trains_commits_and_releases(undisturbed: dict[str, Any]) -> None:
    losses = losses_of(undisturbed["run"])
    assert list(losses) == list(range(4, STEPS + 1, 4))
    assert losses[4] > losses[STEPS]
    assert checkpoint.committed_steps(undisturbed["run"]) == list(range(4, STEPS + 1, 4))


def test_one_worker_reads_the_batches_of_two(undisturbed: dict[str, Any], prepared: str) -> None:
    """The same batches in the same order: losses differ by the order of float32 sums only."""
    report = train.pretrain(settings_for(prepared, "alone", workers=WorkersConfig(n=1, micro_batch=32))).line()
    alone, together = losses_of(report["run"]), losses_of(undisturbed["run"])
    assert alone == pytest.approx(together, rel=1e-5)


@pytest.mark.slow
def test_a_masked_run_is_trained_and_evaluated_with_masked_tokens(prepared: str, tmp_path: Path) -> None:
    """A likelihood, a completion or a server from a network that has none; a probe of unmasked pictures."""
    model = ModelConfig(objective="masked", n_layer=2, n_embd=32, n_head=2, n_px=8, n_vocab=16)
    trained = train.pretrain(settings_for(prepared, "masked", model=model)).line()
    losses = losses_of(trained["run"])
    assert losses[4] > losses[STEPS]

    both = {"release": trained["release"], "tokens": storage.join(prepared, "tokens")}
    table = pa.concat_tables(TokenStore.open(both["tokens"]).read_split("test"))
    nats = masked_nats(
        weights.load_release(both["release"]).model, tokens_of(table), table["key"].to_pylist(), batch_size=7
    )
    report = evaluate.evaluate(EvaluateConfig(**both)).line()
    assert report["nats_per_masked_token"] == pytest.approx(nats.mean(), rel=1e-6)
    assert (report["masks"], report["images"]) == (5, len(nats))

    probed = probe_layers(ProbeConfig(**both, out=str(tmp_path)))
    assert len(probed.layers) == 3
    assert FeatureStore(str(tmp_path / "features")).layer("test", 2)[0].shape == (len(nats), 5, 32)

    for refused in (
        lambda: batch.complete(CompleteConfig(**both, out=str(tmp_path))),
        lambda: batch.score(ScoreConfig(**both, out=str(tmp_path))),
        lambda: serve.run(ServeConfig(release=both["release"], open=True)),
        lambda: Replica("masked", both["release"], {}, 1),
    ):
        with pytest.raises(CheckpointError, match="is a masked model: completions, scores and the server need"):
            refused()
    with pytest.raises(SettingError, match="remove --baselines, --out and --against"):
        evaluate.evaluate(EvaluateConfig(**both, baselines="train"))


def test_a_run_without_a_newer_setting_is_resumed(undisturbed: dict[str, Any], prepared: str) -> None:
    """Its config.json lacks the setting, which then had what is now the default."""
    path = Path(undisturbed["run"], "config.json")
    whole = path.read_text()
    older = json.loads(whole)
    del older["identity"]["model"]["objective"], older["identity"]["model"]["n_class"]
    path.write_text(json.dumps(older))
    settings = settings_for(prepared, "undisturbed")
    train._write_or_check_config(settings, train.check(settings))
    masked = settings.model.model_copy(update={"objective": "masked"})
    with pytest.raises(CheckpointError, match=r"model\.objective was next, now masked"):
        train._write_or_check_config(settings.model_copy(update={"model": masked}), train.check(settings))
    path.write_text(whole)


def test_a_resumed_run_keeps_the_workers_settings_of_its_start(undisturbed: dict[str, Any], prepared: str) -> None:
    """config.json has what `auto` was resolved to. The values of older runs are no change of settings."""
    path = Path(undisturbed["run"], "config.json")
    whole = path.read_text()
    recorded = train._workers_at_start(undisturbed["run"])
    assert recorded is not None
    assert (recorded["precision"], recorded["compile"], recorded["micro_batch"]) == ("float32", False, 2)
    settings = settings_for(prepared, "undisturbed", workers=WorkersConfig(n=2))
    assert settings.resolved(False, recorded).workers.micro_batch == 2

    older = json.loads(whole)
    older["settings"]["workers"] |= {"gpus": 1, "precision": "float32", "compile": False, "micro_batch": 0}
    path.write_text(json.dumps(older))
    resumed = settings.resolved(True, train._workers_at_start(undisturbed["run"]))
    assert (resumed.workers.precision, resumed.workers.compile) == ("float32", False)
    assert resumed.workers.micro_batch == "auto"
    train._write_or_check_config(resumed, train.check(resumed))
    path.write_text(whole)
    assert train._workers_at_start(storage.join(prepared, "runs", "not-started")) is None


@pytest.mark.parametrize(
    ("cooldown", "schedule"),
    [
        (None, {}),
        (0, {"schedule": "constant"}),
        (0.8, {"schedule": "warmup_stable_decay", "decay_fraction": 0.8}),
    ],
)
def test_the_cooldown_of_older_runs_is_read_as_a_schedule(cooldown: float | None, schedule: dict[str, Any]) -> None:
    """A modern or fine-tuning run of version 0.1 could not be resumed."""
    assert train._with_schedule({"lr": 0.1, "cooldown": cooldown}) == {"lr": 0.1, **schedule}


def test_a_finished_run_repeated_changes_nothing_and_other_settings_are_refused(
    undisturbed: dict[str, Any], prepared: str
) -> None:
    before = weights_of(undisturbed["run"])
    again = train.pretrain(settings_for(prepared, "undisturbed")).line()
    assert again["step"] == STEPS
    other = OptimConfig(batch_size=9, steps=STEPS, warmup_steps=4, lr=1e-4)
    with pytest.raises(CheckpointError, match=r"optim\.lr was 0\.003, now 0\.0001.*--run\.name"):
        train.pretrain(settings_for(prepared, "undisturbed", optim=other))
    wider = ModelConfig(n_layer=2, n_embd=64, n_head=2, n_px=8, n_vocab=16)
    with pytest.raises(CheckpointError, match=r"model\.n_embd was 32, now 64"):
        train.pretrain(settings_for(prepared, "undisturbed", model=wider))
    assert weights_of(undisturbed["run"]) == before


def test_a_run_resumes_from_the_requested_step_or_not_at_all(undisturbed: dict[str, Any], prepared: str) -> None:
    """A run that was to be new and trains over another's checkpoints."""
    settings = settings_for(prepared, "again")
    shutil.copytree(undisturbed["run"], settings.run.uri)
    never, from_8, from_9 = (
        settings.model_copy(update={"run": settings.run.model_copy(update={"resume": how})}) for how in ("never", 8, 9)
    )
    with pytest.raises(CheckpointError, match=rf"has checkpoints up to step {STEPS}, .* choose another --run\.name"):
        train.pretrain(never)
    with pytest.raises(CheckpointError, match="no checkpoint of step 9 to resume from: available: 4, 8, 12"):
        train.pretrain(from_9)
    storage.delete(storage.join(settings.run.uri, "release", "model.safetensors"))
    report = train.pretrain(from_8).line()
    assert weights_of(report["run"]) == weights_of(undisturbed["run"])
    assert losses_of(report["run"]) == losses_of(undisturbed["run"])
    aside = [Path(e.uri).parent.name for e in storage.walk(settings.run.uri) if e.uri.endswith(checkpoint.SET_ASIDE)]
    assert aside == [f"step_{step:08d}" for step in range(12, STEPS + 1, 4)]


def test_impossible_settings_are_refused_before_workers_start(prepared: str, tmp_path: Path, cluster: str) -> None:
    fits = settings_for(prepared, "refused")
    for change, error, complaint in (
        ({"data": DataConfig()}, SettingError, "--data.tokens is not set"),
        ({"data": DataConfig(tokens=str(tmp_path))}, TokenStoreError, "no token store is committed"),
        ({"data": DataConfig(tokens=fits.data.tokens, split="dev")}, TokenStoreError, "has test, train"),
        ({"data": DataConfig(tokens=fits.data.tokens, val_split="val")}, TokenStoreError, "has test, train"),
        (
            {"run": fits.run.model_copy(update={"validate_every": 4})},
            SettingError,
            "--run.validate-every needs --data.val-split",
        ),
        (
            {
                "run": fits.run.model_copy(update={"sample_every": 4}),
                "model": fits.model.model_copy(update={"objective": "masked"}),
            },
            SettingError,
            "--run.sample-every needs --model.objective next",
        ),
        ({"model": fits.model.model_copy(update={"n_px": 16})}, SettingError, r"n_px is 16, but .* n_px 8"),
        ({"model": fits.model.model_copy(update={"n_vocab": 512})}, SettingError, "n_vocab is 512"),
        ({"model": fits.model.model_copy(update={"n_class": 10})}, SettingError, "--model.n-class is for fine-tuning"),
        ({"workers": WorkersConfig(n=10)}, SettingError, "batch_size 9 is smaller than workers.n 10"),
    ):
        with pytest.raises(error, match=complaint):
            train.pretrain(fits.model_copy(update=change))
    assert not storage.exists(storage.join(fits.run.uri, "config.json"))


def test_a_damaged_shard_ends_the_run_with_its_name_and_without_retries(prepared: str, tmp_path: Path) -> None:
    """Found on the workers, where the cache is filled; starting again would find it again."""
    shutil.copytree(storage.join(prepared, "tokens"), tmp_path / "tokens")
    shard = next((tmp_path / "tokens/train").glob("*.parquet"))
    data = shard.read_bytes()
    shard.write_bytes(data[:200] + bytes([data[200] ^ 4]) + data[201:])
    manifest = tmp_path / "tokens/manifest.json"  # another store's hash, or the node's cache would serve its tokens
    manifest.write_bytes(artifact.seal(json.dumps(json.loads(artifact.unseal(manifest.read_bytes())))))
    with pytest.raises(TokenStoreError, match=f"{shard} is damaged"):
        train.pretrain(settings_for(prepared, "damaged", data=DataConfig(tokens=str(tmp_path / "tokens"))))


def test_settings_can_be_changed_until_the_first_checkpoint(prepared: str, cluster: str) -> None:
    """A run that was stopped at once must not keep its name from the run that was meant."""
    settings = settings_for(prepared, "mended")
    store = train.check(settings)
    train._write_or_check_config(settings, store)
    train._write_or_check_config(settings.model_copy(update={"seed": 1}), store)
    identity = json.loads(storage.read(storage.join(settings.run.uri, "config.json")))["identity"]
    assert identity["seed"] == 1


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "code", "word"), [(2, 130, "interrupted"), (15, 143, "terminated")])
def test_an_interrupted_run_saves_first(signum: int, code: int, word: str, prepared: str, tmp_path: Path) -> None:
    """Neither the last steps before Ctrl-C are lost, nor the reason hidden behind messages of Ray."""
    settings = settings_for(prepared, "interrupted", optim=OptimConfig(batch_size=9, steps=100_000, warmup_steps=4))
    run = settings.run.model_copy(update={"root": str(tmp_path), "checkpoint_every": 50_000, "keep_every": None})
    settings = settings.model_copy(update={"run": run})
    command = [sys.executable, "jobs/pretrain.py", *words_of(settings)]
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    program = subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True, preexec_fn=handle_sigint)
    try:
        assert program.stderr is not None
        before = list(itertools.takewhile(lambda line: "nats per token" not in line, program.stderr))
        program.send_signal(signum)
        _, after = program.communicate(timeout=120)
    finally:
        program.kill()
    assert program.returncode == code, after
    last = after.splitlines()[-1]
    steps = checkpoint.committed_steps(settings.run.uri)
    assert len(steps) == 1
    assert last == f"{word}: step {steps[0]} is saved, the same command resumes the run", after
    assert not [line for line in before + after.splitlines() if "pid=" in line]
