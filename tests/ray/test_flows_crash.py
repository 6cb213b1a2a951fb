"""Images that end, hang or exhaust the worker that decodes them: jobs end, name the image and lose nothing else.

The faults are real: see `tests/support/sitecustomize.py`, which every process of the cluster runs.
"""

import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import ray
from dying import Dies, Fatal

from igpt_ray.data.config import PaletteConfig, PixelsConfig, PrepareConfig, VerifyConfig
from igpt_ray.data.make_shard import QUARANTINE
from igpt_ray.data.palette import Palette
from igpt_ray.data.token_store import TokenStore
from igpt_ray.errors import SourceError
from igpt_ray.evaluate.config import ScoreConfig
from igpt_ray.flows import batch, prepare
from igpt_ray.flows.actor_map import MAX_DEATHS, _Attempts, _Process, actor_map
from igpt_ray.generate.config import CompleteConfig
from igpt_ray.settings import PoolConfig

pytestmark = pytest.mark.ray
PIXELS = PixelsConfig(n_px=8, crop="centre")
CRASH = "the decoder crashes"


def faulty_copy(images: str, to: Path, fault: bytes, n: int = 1) -> list[str]:
    """A copy of the training images; the first and the last n get a fault. Returns their keys."""
    shutil.copytree(f"{images}/train", to / "train")
    paths = sorted((to / "train").rglob("*.png"))
    bad = paths[:n] + paths[-n:]
    for path in bad:
        path.write_bytes(path.read_bytes() + fault)
    return [str(path.relative_to(to / "train")) for path in bad]


def prepared_from(source: Path, prepared: str, tokens: Path) -> TokenStore:
    palette = f"{prepared}/palette.npy"
    settings = PrepareConfig(
        source=str(source), palette=palette, tokens=str(tokens), shard_images=50, budget=0.5, pixels=PIXELS
    )
    report = prepare.prepare(settings)
    assert prepare.prepare(settings)["images"] == report["images"]
    return TokenStore.open(str(tokens))


def quarantined(tokens: Path) -> dict[str, str]:
    lists = [make for path in tokens.glob("quarantine/*.json") for make in QUARANTINE.validate_json(path.read_bytes())]
    return {image.key: image.reason for image in lists}


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (b"TEST-CRASH", CRASH),
        (b"TEST-MEMORY", "decoding takes more than 2048 MiB of memory"),
        pytest.param(b"TEST-HANG", "decoding takes more than 60 s", marks=pytest.mark.slow),
    ],
)
def test_an_image_that_ends_its_worker_is_quarantined_by_name(
    prepared: str, digit_images: str, tmp_path: Path, fault: bytes, reason: str
) -> None:
    """The shards of the other images are those of a source in which the image is refused without harm."""
    bad = faulty_copy(digit_images, tmp_path / "images", fault)
    store = prepared_from(tmp_path / "images", prepared, tmp_path / "tokens")
    assert quarantined(tmp_path / "tokens") == dict.fromkeys(bad, reason)
    shutil.copytree(tmp_path / "images", tmp_path / "harmless")
    for key in bad:
        path = tmp_path / "harmless" / "train" / key
        path.write_bytes(bytes(path.stat().st_size))  # of equal size, so that the units are the same
    harmless = prepared_from(tmp_path / "harmless", prepared, tmp_path / "expected")
    assert store.manifest.shards == harmless.manifest.shards


def test_palette_and_verification_survive_such_images(prepared: str, digit_images: str, tmp_path: Path) -> None:
    bad = faulty_copy(digit_images, tmp_path / "images", b"TEST-CRASH")
    palette = str(tmp_path / "palette.npy")
    report = prepare.fit_palette(PaletteConfig(source=str(tmp_path / "images"), out=palette, k=16, pixels=PIXELS))
    assert report["unreadable"] == len(bad)
    assert len(Palette.load(palette)) == 16
    prepared_from(tmp_path / "images", prepared, tmp_path / "tokens")
    assert prepare.verify(VerifyConfig(tokens=str(tmp_path / "tokens"), remake=3))["remade"] == 3


def test_scores_and_completions_record_such_images_as_unreadable(
    released: str, digit_images: str, tmp_path: Path
) -> None:
    bad = faulty_copy(digit_images, tmp_path / "images", b"TEST-CRASH")
    common = {"release": released, "source": str(tmp_path / "images"), "split": "train", "unit_images": 60}
    report = batch.score(ScoreConfig(**common, out=str(tmp_path / "scores")))
    rows = [row for path in (tmp_path / "scores").glob("train/*.parquet") for row in pq.read_table(path).to_pylist()]
    assert {row["key"]: row["unreadable"] for row in rows if row["nats"] is None} == dict.fromkeys(bad, CRASH)
    assert report["unreadable"] == len(bad)
    done = batch.complete(CompleteConfig(**common, out=str(tmp_path / "done"), n=1, rows=7))
    assert (done["images"], done["unreadable"]) == (report["images"], len(bad))


def test_a_task_during_which_processes_die_again_and_again_ends_the_job_with_its_name(tmp_path: Path) -> None:
    tasks = [Fatal("train", "00000", 0), Fatal("train", "00001", MAX_DEATHS - 1), Fatal("train", "00002", 0)]
    deaths = actor_map(tasks, Dies, {"folder": str(tmp_path)}, PoolConfig(cpus=0.5))
    assert list(deaths) == [0, MAX_DEATHS - 1, 0]
    tasks[2] = Fatal("train", "00002", MAX_DEATHS)
    with pytest.raises(SourceError, match=f"{MAX_DEATHS} worker processes died during the unit train/00002"):
        list(actor_map(tasks, Dies, {"folder": str(tmp_path)}, PoolConfig(cpus=0.5)))


def test_a_task_that_a_lost_message_repeats_is_not_a_death() -> None:
    """A process that calls again lives, whether it repeats the task or starts another; one that is silent died."""
    list(actor_map([0], lambda: lambda task: task, {}, PoolConfig(cpus=0.5)))  # joins the cluster
    node = ray.get_runtime_context().get_node_id()
    first, second, third = (_Process(node, name) for name in ("first", "second", "third"))
    attempts = _Attempts()
    assert [attempts.start(7, first), attempts.start(7, first)] == [0, 0]  # the request was repeated
    assert attempts.start(7, second) == 1  # `first` is silent
    attempts.finish(3, first)  # and yet lives
    assert attempts.start(7, third) == 1  # `second` alone
    assert attempts.start(7, _Process("a node that has died", "fourth")) == 2
    assert attempts.start(7, first) == 2  # the fourth died with its node
