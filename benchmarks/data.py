"""JPEG files to token shards: how fast, beside the JPEG decoder alone, PIL and transformers; and in how much memory.

Every way works through the same units of the same files on Ray actors, one a core, taking turns. A rate is the sum
over actors of images per busy second, so that neither the start of actors nor their last unit counts; figures are
medians over the rounds. `by_cpu` are the same ratios in seconds of the processor, which neighbours on the machine
disturb less, but which leave out waiting for the disk. `whole` are full preparations, from the plan to the commit, with
all that; what they hold is read from the kernel's own record of each worker's largest resident size.
"""

import io
import os
import shutil
import tarfile
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from pydantic import Field

from igpt_ray import storage
from igpt_ray.data import pixels as images
from igpt_ray.data import sources
from igpt_ray.data.config import PixelsConfig, PrepareConfig
from igpt_ray.data.image_files import header_of, scaled_jpeg
from igpt_ray.data.make_shard import MakeShard, Task, path_of
from igpt_ray.data.palette import Palette
from igpt_ray.data.sources.units import batched
from igpt_ray.data.token_format import TokenFormat
from igpt_ray.flows import job, local_cluster, prepare
from igpt_ray.flows.actor_map import actor_map
from igpt_ray.settings import Count, PoolConfig, Section, Uri

Report = dict[str, Any]
UNIT = 1000
"""Images per unit and shard."""


class BenchDataConfig(Section):
    """From JPEG files to token shards, beside the JPEG decoder alone, PIL and transformers."""

    images: Uri
    """URI of JPEG files on this machine; they are repeated to the numbers below."""
    n_px: Annotated[int, Field(gt=0, le=224)] = 32
    """Pixels a side."""
    n: Count = 16_000
    """Images that each way works through in a round: enough for actors to be warm for most of them."""
    rounds: Count = 3
    """How often each way is tried."""
    whole: tuple[Count, ...] = (1000, 100_000)
    """Images of whole preparations, whose memory should not grow with them."""


def data(settings: BenchDataConfig) -> Report:
    """Raises `SourceError` if there are no images at `settings.images`."""
    with (
        tempfile.TemporaryDirectory() as scratch,
        local_cluster.s3_server(Path(scratch), "bucket", Path(scratch)) as env,
    ):
        os.environ.update(env)  # before Ray starts: its workers inherit it
        bucket = Path(scratch, "bucket")
        n_files = repeated(settings.images, bucket / "some", settings.n)
        packed(bucket / "some", bucket / "packed")
        job.connect()
        Palette.load("openai").save(str(bucket / "palette.npy"))
        rounds = [one_round(str(bucket), settings.n_px) for _ in range(settings.rounds)]
        whole = [a_whole_preparation(settings, bucket, n) for n in settings.whole]
    return {
        "files": n_files,
        "images_a_way": settings.n,
        "rounds": settings.rounds,
        "ways": {way: against([found[way] for found in rounds], rounds) for way in rounds[0]},
        "whole": whole,
    }


class Rate(NamedTuple):
    """Images per second on all cores, and images per second of a processor."""

    wall: float
    cpu: float
    server_cores: float = 0.0
    """What the S3 server took beside that."""


Round = dict[str, Rate]


def one_round(bucket: str, n_px: int) -> Round:
    rates = {way: rate(f"{bucket}/some", way, bucket, n_px) for way in WAYS}
    for place in ("some", "packed"):
        with cores_of("rclone") as cores:
            found = rate(f"s3://bucket/{place}", "fast_centre", bucket, n_px)
        rates[f"fast_centre_from_s3_{'files' if place == 'some' else 'tars'}"] = found._replace(server_cores=cores())
    return rates


def rate(source: str, way: str, root: str, n_px: int) -> Rate:
    units = sources.plan(source, UNIT).units
    done = list(actor_map(units, Way, {"name": way, "root": root, "n_px": n_px}, PoolConfig()))
    busy: dict[int, list[Done]] = defaultdict(list)
    for unit in done:
        busy[unit.process].append(unit)
    wall = sum(sum(unit.images for unit in found) / sum(unit.seconds for unit in found) for found in busy.values())
    return Rate(wall, sum(unit.images for unit in done) / sum(unit.cpu_seconds for unit in done))


def against(found: list[Rate], rounds: list[Round]) -> Report:
    """Medians; the ratios are those of a round, so that slow minutes slow both sides."""

    def ratio(way: str, clock: str) -> float:
        return float(
            np.median([getattr(r, clock) / getattr(o[way], clock) for r, o in zip(found, rounds, strict=True)])
        )

    return {
        "images_per_second": round(float(np.median([rate.wall for rate in found]))),
        "of_jpeg_eighth": round(ratio("jpeg_eighth", "wall"), 3),
        "of_jpeg_eighth_by_cpu": round(ratio("jpeg_eighth", "cpu"), 3),
        "of_transformers": round(ratio("transformers", "wall"), 2),
        **({"s3_server_cores": round(found[0].server_cores, 2)} if found[0].server_cores else {}),
    }


class Done(NamedTuple):
    process: int
    images: int
    seconds: float
    cpu_seconds: float


class Way:
    """Unit -> Done. What a way may have ready before the clock starts, it prepares."""

    def __init__(self, name: str, root: str, n_px: int):
        self.prepare, self.work = WAYS[name](root, n_px)

    def __call__(self, unit: sources.WorkUnit) -> Done:
        ready = self.prepare(unit)
        wall, cpu = time.perf_counter(), time.process_time()
        self.work(ready)
        return Done(os.getpid(), unit.images, time.perf_counter() - wall, time.process_time() - cpu)


Steps = tuple[Callable[[sources.WorkUnit], Any], Callable[[Any], Any]]


def jpeg_eighth(root: str, n_px: int) -> Steps:
    """libjpeg-turbo alone at 1/8 scale, of bytes in memory: what nobody who decodes can pass."""

    def decode(ready: list[tuple[bytes, Any]]) -> None:
        for encoded, header in ready:
            scaled_jpeg(encoded, header, 1)

    return lambda unit: [(image, header_of(image)) for image in in_memory(unit)], decode


def transformers(root: str, n_px: int) -> Steps:
    """ImageGPT's processor on PIL, of bytes in memory, to token arrays and no further."""
    from PIL import Image
    from transformers.models.imagegpt.image_processing_pil_imagegpt import ImageGPTImageProcessorPil

    clusters = Palette.load(f"{root}/palette.npy").colours
    processor = ImageGPTImageProcessorPil(clusters=clusters, size={"height": n_px, "width": n_px})

    def process(ready: list[bytes]) -> None:
        for encoded in ready:
            processor(images=Image.open(io.BytesIO(encoded)).convert("RGB"))

    return in_memory, process


def shards_by(pipeline: str, crop: str) -> Callable[[str, int], Steps]:
    """Ours, from files to a shard in its place."""

    def steps(root: str, n_px: int) -> Steps:
        palette = Palette.load(f"{root}/palette.npy")
        pixels = PixelsConfig.model_validate({"n_px": n_px, "pipeline": pipeline, "crop": crop})
        kind = TokenFormat(
            n_px=n_px, n_vocab=len(palette), palette=palette.fingerprint, pipeline=images.PIPELINES[pixels.pipeline]
        )
        make = MakeShard(root, kind, pixels, holdout=0.0, committed={})

        def forget(unit: sources.WorkUnit) -> Task:
            task = Task(unit, 0)
            storage.delete(storage.join(root, path_of(unit.split, task)))
            return task

        return forget, make

    return steps


WAYS: dict[str, Callable[[str, int], Steps]] = {
    "jpeg_eighth": jpeg_eighth,
    "fast_centre": shards_by("fast", "centre"),
    "fast_random": shards_by("fast", "random"),
    "reference_centre": shards_by("reference", "centre"),
    "transformers": transformers,
}


def in_memory(unit: sources.WorkUnit) -> list[bytes]:
    return [image.data for image in sources.read(unit) if isinstance(image, sources.Image)]


def a_whole_preparation(settings: BenchDataConfig, bucket: Path, n: int) -> Report:
    """`prepare` of n images, random crops as it does by default."""
    repeated(settings.images, bucket / f"{n}", n)
    wanted = PrepareConfig(
        source=str(bucket / f"{n}"),
        palette=str(bucket / "palette.npy"),
        tokens=str(bucket / f"tokens-{n}"),
        shard_images=UNIT,
        pixels=PixelsConfig(n_px=settings.n_px),
    )
    with peak_of_workers() as peak:
        report = prepare.prepare(wanted)
    shutil.rmtree(bucket / f"{n}")
    return {
        "images": report["images"],
        "images_per_second": report["images_per_second"],
        "mb_per_second": report["mb_per_second"],
        "peak_mb_of_a_worker": peak(),
    }


def repeated(source: str, folder: Path, n: int) -> int:
    """n images below `folder`, as hard links to those at `source`, over and over; returns how many there are."""
    found = [entry.uri for entry in storage.walk(source)]
    for i in range(n):
        uri = found[i % len(found)]
        place = folder / f"train/{i % 10}/{i // len(found):05d}-{storage.name(uri)}"
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(uri, place)
        except OSError:  # another disk, or one without links
            shutil.copyfile(uri, place)
    return len(found)


def packed(folder: Path, out: Path) -> None:
    """The same images in WebDataset shards of a unit each."""
    out.mkdir()
    paths = sorted(folder.glob("train/*/*"))
    out.joinpath("classes.txt").write_text("".join(f"{digit}\n" for digit in range(10)))
    for n, part in enumerate(batched(paths, UNIT)):
        with tarfile.open(out / f"train-{n:05d}.tar", "w", dereference=True) as shard:  # or links would stay links
            for i, path in enumerate(part):
                shard.add(path, f"{i:05d}.jpg")
                label = tarfile.TarInfo(f"{i:05d}.cls")
                label.size = 1
                shard.addfile(label, io.BytesIO(path.parent.name.encode()))


@contextmanager
def cores_of(program: str) -> Iterator[Callable[[], float]]:
    """How many cores a child process of that name takes while the block lasts."""
    import psutil

    child = next(p for p in psutil.Process().children(recursive=True) if program in p.name())

    def used() -> float:
        return float(sum(child.cpu_times()[:2]))

    cpu, wall = used(), time.perf_counter()
    taken = 0.0
    yield lambda: taken
    taken = (used() - cpu) / (time.perf_counter() - wall)


@contextmanager
def peak_of_workers() -> Iterator[Callable[[], int]]:
    """Megabytes: the largest resident size that any of Ray Data's workers has reached while the block lasts."""
    import psutil

    peaks: dict[int, int] = {}
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.2):
            for process in psutil.Process().children(recursive=True):
                try:
                    if "MapWorker" in process.name() + " ".join(process.cmdline()):
                        status = Path(f"/proc/{process.pid}/status").read_text()
                        peaks[process.pid] = int(status.split("VmHWM:")[1].split()[0]) // 1024
                except (psutil.Error, OSError, IndexError):
                    continue  # it has just ended

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield lambda: max(peaks.values())
    finally:
        over.set()
        thread.join()
