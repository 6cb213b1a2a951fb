"""The training loop without Ray: losses that are not finite, resuming, metrics and samples."""

import itertools
import re
import secrets
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from conftest import listing_of, manifest_of
from PIL import Image
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.tensor import DTensor

from igpt_ray import storage, weights
from igpt_ray.data import token_store
from igpt_ray.data.loader import SplitCache, global_batch, share
from igpt_ray.data.palette import Palette
from igpt_ray.data.token_store import TokenFormat, TokenStore, tokens_of
from igpt_ray.errors import TrainingError
from igpt_ray.evaluate.likelihood import image_nats, masked_nats
from igpt_ray.generate import completion
from igpt_ray.model.image_gpt import ImageGPT
from igpt_ray.train import checkpoint, loop, metrics, monitor
from igpt_ray.train.batches import sample_masks
from igpt_ray.train.config import PretrainConfig

CPU = torch.device("cpu")
STEPS = 12


def settings_for(store: TokenStore, folder: Path, name: str = "run", **changes: dict[str, Any]) -> PretrainConfig:
    sections: dict[str, dict[str, Any]] = {
        "model": {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_px": 4, "n_vocab": 16},
        "optim": {"batch_size": 5, "steps": STEPS, "warmup_steps": 2},
        "data": {"tokens": store.root},
        "workers": {"micro_batch": 2, "precision": "float32", "compile": False},
        "run": {"root": str(folder / "runs"), "name": name, "checkpoint_every": 4, "log_every": 2, "keep_every": 4},
    }
    for section, change in changes.items():
        sections[section] |= change
    return PretrainConfig.model_validate(sections)


def losses_of(run: str) -> dict[int, float]:
    return {line["step"]: line["nats_per_token"] for line in metrics.read(run)}


def weights_of(run: str) -> bytes:
    return storage.read(storage.join(run, "release", "model.safetensors"))


# ------------------------------------------------------------------------------------------------ what is not finite


def state_of(built: list[Any]) -> dict[str, Any]:
    """Weights and moments of a network and its optimiser, by name."""
    model, optimizer = built
    state, moments = get_state_dict(model, optimizer)
    found = dict(state) | {f"{n}.{k}": v for n, of_one in moments["state"].items() for k, v in of_one.items()}
    return {k: (v.full_tensor() if isinstance(v, DTensor) else v).clone() for k, v in found.items()}


@pytest.mark.parametrize("muon_lr", [None, 0.02])
@pytest.mark.parametrize("fused", [False, True])  # as on a GPU, where the device decides
def test_a_loss_that_is_not_finite_stops_before_the_step_and_names_the_image(
    fused: bool,
    muon_lr: float | None,
    device: torch.device,
    process_group: None,
    tmp_path: Path,
    palette: Palette,
    kind: TokenFormat,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A NaN in a gradient would reach all weights a step later, and then the checkpoint.

    Only image 7 has colour 15, whose embedding is NaN.
    """
    tokens = np.random.default_rng(3).integers(0, 15, (12, kind.n_positions)).astype(np.uint16)
    tokens[7, 0] = 15
    root = str(tmp_path / "tokens")
    palette.save(storage.join(root, "palette.npy"))
    keys = [f"cat/{row}.png" for row in range(12)]
    data = token_store.encode(keys, [0] * 12, tokens, kind, {"unit": "0", "split": "train", "view": "0"})
    storage.write(storage.join(root, "train/00000-v0.parquet"), data)
    store = token_store.commit(root, manifest_of(kind, [listing_of("train/00000-v0.parquet", "train", 0, 12, data)]))
    cfg = settings_for(store, tmp_path, run={"checkpoint_every": 1, "keep_every": 1}, optim={"muon_lr": muon_lr})

    built: list[Any] = []
    build = loop.build

    def poisoned(*arguments: Any) -> Any:
        built[:] = build(*arguments)
        for settings in (built[1].defaults, *built[1].param_groups):
            settings["fused"] = fused or device.type == "cuda"
        with torch.no_grad():
            built[0].wte.weight.to_local()[15] = torch.nan
        return tuple(built)

    monkeypatch.setattr(loop, "build", poisoned)
    step = next(s for s in range(STEPS) if 7 in global_batch(cfg.seed, s, 5, 12).rows)
    named = rf"step {step + 1}, images {5 * step} to {5 * step + 4} .* the loss .* epoch 0: .*cat/7\.png \(row 7\)"
    with pytest.raises(TrainingError, match=named) as refused:
        loop.train(cfg, device)
    assert str(refused.value).count(".png") <= cfg.workers.micro_batch  # the micro-batch with the NaN, not the batch
    assert step > 0
    assert checkpoint.committed_steps(cfg.run.uri) == list(range(1, step + 1))

    after = state_of(built)
    saved = list(build(cfg, device))
    checkpoint.load_newest(cfg.run.uri, *saved)
    before = state_of(saved)
    assert before.keys() == after.keys()
    for name in before:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=0, equal_nan=True, msg=name)
    assert torch.isfinite(before["wtet.weight"]).all()


def test_a_gradient_that_overflows_stops_the_run_although_the_loss_is_finite(
    device: torch.device, process_group: None, store: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The norm must be checked in every step, not only when it is logged."""
    build = loop.build

    def steep(*arguments: Any) -> Any:
        model, optimizer = build(*arguments)
        with torch.no_grad():
            model.wtet.weight.to_local().normal_()
        model.wtet.register_full_backward_hook(lambda m, gi, go: (gi[0] * 1e38,))
        return model, optimizer

    monkeypatch.setattr(loop, "build", steep)
    cfg = settings_for(store, tmp_path)
    with pytest.raises(TrainingError, match=r"step 1, .* the gradient \(norm (inf|nan)\) .* 5 image\(s\) of train"):
        loop.train(cfg, device)
    assert checkpoint.committed_steps(cfg.run.uri) == []


# ------------------------------------------------------------------------------------------------ going on


def test_a_run_resumed_from_an_older_step_ends_with_the_same_bits(
    device: torch.device, process_group: None, store: TokenStore, tmp_path: Path
) -> None:
    """Metrics and checkpoints of the abandoned steps are not used."""
    cfg = settings_for(store, tmp_path)
    loop.train(cfg, device)
    bits, losses = weights_of(cfg.run.uri), losses_of(cfg.run.uri)
    checkpoint.rewind(cfg.run.uri, 4)
    assert checkpoint.committed_steps(cfg.run.uri) == [4]
    resumed = loop.train(cfg, device)
    assert resumed["step"] == STEPS
    assert losses_of(cfg.run.uri) == losses
    assert [line["step"] for line in metrics.read(cfg.run.uri)] == list(range(2, STEPS + 1, 2))
    assert weights_of(cfg.run.uri) == bits
    assert checkpoint.committed_steps(cfg.run.uri) == [4, 8, 12]


def test_a_stop_request_saves_the_current_step_and_the_resumed_run_has_the_same_bits(
    device: torch.device, process_group: None, store: TokenStore, tmp_path: Path
) -> None:
    """No step is lost. After a request in its last step, a run simply ends."""
    undisturbed = settings_for(store, tmp_path, "undisturbed")
    loop.train(undisturbed, device)
    cfg = settings_for(store, tmp_path)
    for reached in (5, 11):
        told = itertools.count(0 if reached == 5 else 5)
        assert loop.train(cfg, device, lambda told=told, end=reached: next(told) == end - 1) == {"stopped_at": reached}
        assert checkpoint.committed_steps(cfg.run.uri)[-1] == reached
    report = loop.train(cfg, device, lambda: True)
    assert report["step"] == STEPS
    assert weights_of(cfg.run.uri) == weights_of(undisturbed.run.uri)
    assert [line["step"] for line in metrics.read(cfg.run.uri)] == [2, 4, 5, 6, 8, 10, 11, 12]


def test_activation_checkpointing_and_micro_batches_change_no_result(
    device: torch.device, process_group: None, store: TokenStore, tmp_path: Path
) -> None:
    """They change how a step is computed, not its result."""
    plain = loop.train(settings_for(store, tmp_path), device)
    expected = losses_of(plain["run"])
    for name, workers in (
        ("again", {"activation_checkpointing": "full"}),
        ("half", {"activation_checkpointing": "selective"}),
        ("fits", {"micro_batch": "auto"}),
        ("one", {"micro_batch": 1}),
    ):
        other = loop.train(settings_for(store, tmp_path, name, workers=workers), device)
        assert losses_of(other["run"]) == pytest.approx(expected, rel=1e-5), name


def test_the_precision_of_float32_products_is_that_of_the_settings(
    process_group: None, store: TokenStore, tmp_path: Path
) -> None:
    """It is a setting of the process: every run sets it."""
    for precision in ("high", "highest"):
        loop.build(settings_for(store, tmp_path, workers={"float32_matmul": precision}), CPU)
        assert torch.get_float32_matmul_precision() == precision


@pytest.mark.slow
@pytest.mark.parametrize("activation_checkpointing", ["selective", "full"])
def test_compiled_blocks_give_the_same_losses(
    process_group: None,
    store: TokenStore,
    tmp_path: Path,
    activation_checkpointing: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Blocks are compiled in place, so that the names of parameters do not change. All their inputs have one shape."""
    data, run = {"val_split": "test", "val_images": 3}, {"validate_every": 6}
    plain = loop.train(settings_for(store, tmp_path, data=data, run=run), CPU)
    workers = {"compile": True, "activation_checkpointing": activation_checkpointing}
    shapes, build = set(), loop.build

    def watched(*arguments: Any) -> Any:
        built = build(*arguments)
        built[0].blocks[0].register_forward_pre_hook(lambda block, inputs: shapes.add(tuple(inputs[0].shape)))
        return built

    monkeypatch.setattr(loop, "build", watched)
    other = loop.train(settings_for(store, tmp_path, "compiled", workers=workers, data=data, run=run), CPU)
    assert shapes == {(2, 16, 32)}
    assert other["val_nats_per_token"] == pytest.approx(plain["val_nats_per_token"], rel=1e-6)
    assert losses_of(other["run"]) == pytest.approx(losses_of(plain["run"]), rel=1e-6)
    names = [weights.load_release(report["release"]).model.state_dict().keys() for report in (plain, other)]
    assert names[0] == names[1]


def test_the_masks_of_a_batch_do_not_depend_on_its_division() -> None:
    """Masks must not depend on the number of workers."""
    batch = global_batch(seed=3, step=5, batch_size=9, n_rows=20)
    whole = sample_masks(3, batch, 64)
    for world_size in (2, 3, 9):
        parts = [sample_masks(3, share(batch, rank, world_size), 64) for rank in range(world_size)]
        assert torch.equal(torch.cat(parts), whole)
    again = sample_masks(3, global_batch(seed=3, step=25, batch_size=9, n_rows=20), 64)
    assert not (again[:, None] == whole).all(-1).any()  # an image has another mask in every epoch


def on_workers(n: int, folder: Path, cache: Path, cfg: PretrainConfig, leave_after: int = STEPS) -> None:
    """Train on n workers, the last of which receives a stop request in this step."""
    rendezvous = str(folder / secrets.token_hex(4))
    arguments = (n, rendezvous, cfg.model_dump_json(), str(cache), leave_after)
    torch.multiprocessing.spawn(_work, arguments, nprocs=n)


def _work(rank: int, n: int, rendezvous: str, settings: str, cache: str, leave_after: int) -> None:
    """One of n workers."""
    torch.set_num_threads(1)
    storage.CACHE = Path(cache)
    checkpoint.PAUSE = 0.1
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=n)
    steps = itertools.count(1)
    loop.train(PretrainConfig.model_validate_json(settings), CPU, lambda: rank == n - 1 and next(steps) >= leave_after)
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["next", "masked"])
def test_metrics_do_not_depend_on_the_number_of_workers(
    store: TokenStore, cache: Path, tmp_path: Path, objective: str
) -> None:
    """Losses on training and held-out images do not depend on their division; three workers share two images."""
    told = []
    for n in (1, 2, 3):
        more = {"sample_every": 6} if objective == "next" else {}
        cfg = settings_for(
            store,
            tmp_path,
            f"{objective}-{n}",
            model={"objective": objective},
            data={"val_split": "test", "val_images": 2},
            workers={"n": n, "micro_batch": 1},
            run={"validate_every": 6, **more},
        )
        on_workers(n, tmp_path, cache, cfg)
        held_out = [line.get("val_nats_per_token") for line in metrics.read(cfg.run.uri)]
        assert [held is not None for held in held_out] == [False, False, True, False, False, True]
        told.append(list(losses_of(cfg.run.uri).values()) + [held for held in held_out if held is not None])
        assert checkpoint.committed_steps(cfg.run.uri) == [4, 8, 12]
        if more:
            assert (Path(cfg.run.uri) / "samples/step_00000012.png").exists()
    assert told[1] == pytest.approx(told[0], rel=1e-5)
    assert told[2] == pytest.approx(told[0], rel=1e-5)


@pytest.mark.slow
def test_a_run_whose_workers_change_has_the_same_batches(store: TokenStore, cache: Path, tmp_path: Path) -> None:
    """Three workers stop after five steps, one after three more, and two finish, with the results of one worker alone.

    A run that stops between two regular checkpoints saves its current step.
    """
    alone = settings_for(store, tmp_path, "alone", run={"log_every": 1})
    on_workers(1, tmp_path, cache, alone)
    changing = settings_for(store, tmp_path, "changing", run={"log_every": 1, "keep_every": None})
    for n, leave_after, reached in ((3, 5, 5), (1, 3, 8), (2, STEPS, STEPS)):
        on_workers(n, tmp_path, cache, changing, leave_after)
        assert checkpoint.committed_steps(changing.run.uri)[-1] == reached
    assert losses_of(changing.run.uri) == pytest.approx(losses_of(alone.run.uri), rel=1e-5)


@pytest.mark.slow
def test_a_failed_upload_of_one_worker_costs_a_checkpoint_and_no_restart(
    store: TokenStore, cache: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The others must neither wait for its file nor commit without it. A folder blocks the file's path."""
    cfg = settings_for(store, tmp_path)
    Path(checkpoint.uri_of(cfg.run.uri, 4), "__1_0.distcp").mkdir(parents=True)
    on_workers(2, tmp_path, cache, cfg)
    said = capfd.readouterr().err
    assert said.count("retrying in") == checkpoint.ATTEMPTS - 1
    assert re.findall(r"no checkpoint at step (\d+), training continues: .*__1_0.distcp: Is a directory", said) == ["4"]
    assert checkpoint.committed_steps(cfg.run.uri) == [8, 12]


@pytest.mark.slow
def test_a_checkpoint_of_two_workers_loads_on_one_and_three_and_its_release_everywhere(
    store: TokenStore, cache: Path, tmp_path: Path
) -> None:
    """Weights and moments are bit-identical in shards of other sizes, and so is the release."""
    from igpt_ray.flows.serve.replica import Replica  # here, because it needs Ray

    cfg = settings_for(store, tmp_path)
    on_workers(2, tmp_path, cache, cfg)
    states = []
    for n in (1, 2, 3):
        file = tmp_path / f"state-{n}"
        torch.multiprocessing.spawn(_load, (n, str(tmp_path / f"meet-{n}"), cfg.model_dump_json(), str(file)), nprocs=n)
        states.append(torch.load(file))
    for state in states[1:]:
        assert state.keys() == states[0].keys()
        assert all(torch.equal(state[name], states[0][name]) for name in state)
    assert any(name.endswith("exp_avg_sq") for name in states[0])
    release = storage.join(cfg.run.uri, "release")
    for model in (weights.load_release(release).model, Replica("it", release, {}, 1).model):
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, states[0][name]), name


def _load(rank: int, n: int, rendezvous: str, settings: str, file: str) -> None:
    """One of n workers that load a run's newest checkpoint; the first writes the gathered state to `file`."""
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=n)
    cfg = PretrainConfig.model_validate_json(settings)
    built = list(loop.build(cfg, CPU))
    loaded = checkpoint.load_newest(cfg.run.uri, *built)
    assert loaded is not None
    assert loaded.step == STEPS
    state = state_of(built)
    if rank == 0:
        torch.save(state, file)
    dist.barrier()  # gloo aborts a process whose peer has left during a collective
    dist.destroy_process_group()


# ------------------------------------------------------------------------------------------------ what is shown


@pytest.mark.parametrize("objective", ["next", "masked"])
def test_the_held_out_loss_is_of_the_current_network(
    device: torch.device, process_group: None, store: TokenStore, tmp_path: Path, objective: str
) -> None:
    """It is the mean over the held-out images, with the weights after the step."""
    changes = {"data": {"val_split": "test", "val_images": 2}, "run": {"validate_every": 5}}
    cfg = settings_for(store, tmp_path, model={"objective": objective}, **changes)
    report = loop.train(cfg, device)
    measured = {x["step"]: x["val_nats_per_token"] for x in metrics.read(cfg.run.uri) if "val_nats_per_token" in x}
    assert list(measured) == [5, 10, 12]
    model = weights.load_release(report["release"]).model
    images = tokens_of(next(store.read_split("test")))[[0, 2]]
    if objective == "next":
        assert measured[12] == pytest.approx(image_nats(model, images, 2).sum() / images.size, rel=1e-5)
    else:  # under masks of its own, so only near
        assert measured[12] == pytest.approx(masked_nats(model, images, ["a", "b"], 2).mean(), rel=0.2)
    without = loop.train(settings_for(store, tmp_path, "without", model={"objective": objective}), device)
    assert weights_of(without["run"]) == weights_of(cfg.run.uri)  # looking does not touch


def test_samples_are_completions_by_the_current_network(
    device: torch.device, process_group: None, store: TokenStore, tmp_path: Path
) -> None:
    """The random numbers are the same in each sheet."""
    cfg = settings_for(store, tmp_path, run={"sample_every": 8})
    report = loop.train(cfg, device)
    folder = Path(cfg.run.uri) / "samples"
    assert [path.name for path in sorted(folder.iterdir())] == ["step_00000008.png", "step_00000012.png"]
    sheet = np.asarray(Image.open(folder / "step_00000012.png"))

    split = SplitCache(store, "train")
    again = loop.build(cfg, device)[0]
    state = weights.load_release(report["release"]).model.state_dict()
    for name, parameter in again.named_parameters():
        parameter.data.to_local().copy_(state[name])
    monitor.draw_samples(again, split, store.palette(), device, "float32", str(tmp_path / "other"), 0)
    assert (np.asarray(Image.open(tmp_path / "other/samples/step_00000000.png")) == sheet).all()


def test_samples_are_computed_in_the_precision_of_the_run(
    process_group: None, store: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    types, complete = [], completion.complete

    def watched(model: ImageGPT, *arguments: Any) -> torch.Tensor:
        types.append(model.wpe.dtype)
        return complete(model, *arguments)

    monkeypatch.setattr(completion, "complete", watched)
    for precision in ("float32", "bfloat16"):
        workers, run = {"precision": precision}, {"sample_every": 8}
        loop.train(settings_for(store, tmp_path, precision, workers=workers, run=run, optim={"steps": 1}), CPU)
        assert Path(tmp_path, "runs", precision, "samples/step_00000001.png").exists()
    assert types == [torch.float32, torch.bfloat16]


def test_a_line_of_metrics_is_consistent(process_group: None, store: TokenStore, tmp_path: Path) -> None:
    """Shares of time sum to at most one, and epochs are not counted in steps."""
    cfg = settings_for(store, tmp_path, run={"tensorboard": True})
    loop.train(cfg, CPU)
    lines = metrics.read(cfg.run.uri)
    for line in lines:
        assert line["epoch"] == pytest.approx(line["step"] * 5 / 12, abs=1e-4)
        assert 0 <= sum(line[name] for name in monitor.TIMED) < 1
        assert 0.05 < line["memory_gb"] < 20
        assert "mfu" not in line  # the peak FLOPs of this processor are unknown
    assert events_of(cfg.run.uri) == {
        (line["step"], name): pytest.approx(value, rel=1e-6)
        for line in lines
        for name, value in line.items()
        if name not in ("step", "time")
    }


def test_tensorboard_s_events_have_no_duplicates_after_a_resume(
    process_group: None, store: TokenStore, tmp_path: Path
) -> None:
    """The first file's events of the steps that are trained again are hidden."""
    cfg = settings_for(store, tmp_path, run={"tensorboard": True})
    loop.train(cfg, CPU)
    before = {key: value for key, value in events_of(cfg.run.uri).items() if key[1] == "nats_per_token"}
    checkpoint.rewind(cfg.run.uri, 4)
    loop.train(cfg, CPU)
    assert {key: value for key, value in events_of(cfg.run.uri).items() if key[1] == "nats_per_token"} == before
    assert len(list(Path(cfg.run.uri, "tensorboard").iterdir())) == 2


def events_of(run: str) -> dict[tuple[int, str], float]:
    """(step, name) -> value, as TensorBoard reads a run's folder; each must be there once."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(f"{run}/tensorboard", size_guidance={"scalars": 0})  # 0: all
    events.Reload()
    values = [((e.step, name), e.value) for name in events.Tags()["scalars"] for e in events.Scalars(name)]
    assert len(dict(values)) == len(values)
    return dict(values)
