"""JPEG files to token shards: speed next to the JPEG decoder alone, PIL and transformers; and peak memory.

Every alternative processes the same units of the same files on Ray actors, one per core, in turn. A rate is the sum
over actors of images per busy second, so that it includes neither the start of actors nor idle time at the end. Results
are medians over the rounds. `by_cpu` ratios use processor time, which other load disturbs less, but which excludes
waits for the disk. `whole` lists full preparations, from the plan to the commit; their memory is the largest resident
size of a worker according to the kernel (VmHWM).
"""

import io
import os
import shutil
import tarfile
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from pydantic import Field

from benchmarks.timing import median_ratio, timed
from igpt_ray import storage
from igpt_ray.data import pixels as images
from igpt_ray.data import sources
from igpt_ray.data.config import PixelsConfig, PrepareConfig
from igpt_ray.data.image_files import header_of, scaled_jpeg
from igpt_ray.data.make_shard import MakeShard, Task, path_of
from igpt_ray.data.palette import Palette
from igpt_ray.data.sources.folders import READ_AHEAD, Files
from igpt_ray.data.sources.units import batched
from igpt_ray.data.token_format import TokenFormat
from igpt_ray.errors import SettingError
from igpt_ray.flows import job, local_cluster, prepare
from igpt_ray.flows.actor_map import actor_map
from igpt_ray.object_clients import key_of
from igpt_ray.settings import Count, PoolConfig, Section, Uri

Report = dict[str, Any]
UNIT = 1000
"""Images per unit of work and per shard."""


class BenchDataConfig(Section):
    """Compare the preparation of JPEG files with the JPEG decoder alone, PIL and transformers."""

    images: Uri
    """URI of JPEG files on this machine, which are repeated to the numbers below."""
    n_px: Annotated[int, Field(gt=0, le=224)] = 32
    """Side of an image in pixels."""
    n: Count = 16_000
    """Images per alternative and round. Few images make the warm-up of the actors visible."""
    rounds: Count = 3
    """Repetitions of each alternative."""
    whole: tuple[Count, ...] = (1000, 100_000)
    """Images of each full preparation; their peak memory should not depend on it."""
    only: tuple[str, ...] = ()
    """Names of the alternatives to run in addition to jpeg_eighth and transformers_from_s3_files; empty: all."""


def data(settings: BenchDataConfig) -> Report:
    """Return rates of all alternatives, and rates and peak memory of full preparations.

    Raises `SourceError` if there are no images at `settings.images`, `SettingError` for an unknown alternative.
    """
    if unknown := set(settings.only) - set(RUNS):
        raise SettingError(f"--only has {', '.join(sorted(unknown))}: expected some of {', '.join(RUNS)}")
    with (
        tempfile.TemporaryDirectory() as scratch,
        local_cluster.s3_server(Path(scratch), "bucket", Path(scratch)) as env,
    ):
        os.environ.update(env)  # before Ray starts: its workers inherit it
        bucket = Path(scratch, "bucket")
        n_files = link_repeatedly(settings.images, bucket / "files", settings.n)
        pack_tars(bucket / "files", bucket / "tars")
        job.connect()
        Palette.load("openai").save(str(bucket / "palette.npy"))
        requests = processor_ms_a_read(bucket / "reads")
        names = [
            name
            for name in RUNS
            if not settings.only or name in (*settings.only, "jpeg_eighth", "transformers_from_s3_files")
        ]
        rounds = [one_round(str(bucket), settings.n_px, names) for _ in range(settings.rounds)]
        whole = [full_preparation(settings, bucket, n) for n in settings.whole]
    return {
        "files": n_files,
        "images_per_alternative": settings.n,
        "rounds": settings.rounds,
        "processor_ms_a_read": requests,
        "alternatives": {name: summary(name, rounds) for name in rounds[0]},
        "whole": whole,
    }


def processor_ms_a_read(folder: Path, n: int = 400, n_bytes: int = 110_000, rounds: int = 5) -> dict[str, float]:
    """Processor time of a read of a small object from the S3 server, by boto3 and by this library in turns; medians."""
    import boto3

    folder.mkdir()
    for i in range(n):
        (folder / str(i)).write_bytes(os.urandom(n_bytes))
    client = boto3.Session().client("s3")
    ways: dict[str, Callable[[str], bytes]] = {
        "boto3": lambda key: client.get_object(Bucket="bucket", Key=key)["Body"].read(),
        "igpt_ray": lambda key: storage.read(f"s3://bucket/{key}"),
    }
    times = defaultdict(list)
    for _ in range(rounds):
        for way, read in ways.items():
            cpu = time.process_time()
            for i in range(n):
                assert len(read(f"{folder.name}/{i}")) == n_bytes
            times[way].append((time.process_time() - cpu) / n * 1000)
    shutil.rmtree(folder)
    return {way: round(float(np.median(found)), 3) for way, found in times.items()}


class Rate(NamedTuple):
    """Images per second on all cores, and images per second of processor time."""

    wall: float
    cpu: float
    server_cores: float = 0.0
    """Cores that the S3 server used in addition."""


Round = dict[str, Rate]


def one_round(bucket: str, n_px: int, names: list[str]) -> Round:
    """Rates of the named alternatives."""
    rates = {}
    for name in names:
        alternative, source = RUNS[name]
        if not source.startswith("s3:"):
            rates[name] = measure(f"{bucket}/{source}", alternative, bucket, n_px)
            continue
        with cores_of("rclone") as cores:
            rate = measure(source, alternative, bucket, n_px)
        rates[name] = rate._replace(server_cores=cores())
    return rates


def measure(source: str, name: str, root: str, n_px: int) -> Rate:
    """Rate of one alternative over all units of `source`."""
    units = sources.plan(source, UNIT).units
    done = list(actor_map(units, Alternative, {"name": name, "root": root, "n_px": n_px}, PoolConfig()))
    by_process: dict[int, list[Done]] = defaultdict(list)
    for unit in done:
        by_process[unit.process].append(unit)
    wall = sum(sum(unit.images for unit in own) / sum(unit.seconds for unit in own) for own in by_process.values())
    return Rate(wall, sum(unit.images for unit in done) / sum(unit.cpu_seconds for unit in done))


def summary(name: str, rounds: list[Round]) -> Report:
    """Median rate, and median ratios to the alternatives of `COMPARED` that were run."""

    def ratio(other: str, clock: str) -> float:
        ratio = median_ratio([getattr(r[name], clock) for r in rounds], [getattr(r[other], clock) for r in rounds])
        return round(ratio, 3)

    server_cores = rounds[0][name].server_cores
    others = [other for other in COMPARED if other in rounds[0]]
    return {
        "images_per_second": round(float(np.median([r[name].wall for r in rounds]))),
        **{f"of_{other}": ratio(other, "wall") for other in others},
        **{f"of_{other}_by_cpu": ratio(other, "cpu") for other in others},
        **({"s3_server_cores": round(server_cores, 2)} if server_cores else {}),
    }


class Done(NamedTuple):
    """One unit of work that an actor has finished."""

    process: int
    images: int
    seconds: float
    cpu_seconds: float


class Alternative:
    """Maps a unit of work to `Done`. Only the second of its two functions is timed."""

    def __init__(self, name: str, root: str, n_px: int):
        self.prepare, self.work = ALTERNATIVES[name](root, n_px)

    def __call__(self, unit: sources.WorkUnit) -> Done:
        prepared = self.prepare(unit)
        seconds, images = timed(lambda: self.work(prepared))
        return Done(os.getpid(), images, seconds.wall, seconds.cpu)


Steps = tuple[Callable[[sources.WorkUnit], Any], Callable[[Any], int]]
"""Preparation of a unit, which is not timed, and the timed work on its result, which returns the number of images. (The
plan only estimates the number in an archive.)"""


def jpeg_eighth(root: str, n_px: int) -> Steps:
    """libjpeg-turbo alone at 1/8 scale, from memory: an upper bound for everything that decodes."""

    def decode(prepared: list[tuple[bytes, Any]]) -> int:
        for encoded, header in prepared:
            scaled_jpeg(encoded, header, 1)
        return len(prepared)

    return lambda unit: [(image, header_of(image)) for image in in_memory(unit)], decode


def transformers(root: str, n_px: int) -> Steps:
    """transformers' ImageGPT processor with PIL, from bytes in memory to token arrays in memory."""
    from PIL import Image
    from transformers.models.imagegpt.image_processing_pil_imagegpt import ImageGPTImageProcessorPil

    clusters = Palette.load(f"{root}/palette.npy").colours
    processor = ImageGPTImageProcessorPil(clusters=clusters, size={"height": n_px, "width": n_px})

    def process(images: Iterable[bytes]) -> int:
        n = 0
        for encoded in images:
            processor(images=Image.open(io.BytesIO(encoded)).convert("RGB"))
            n += 1
        return n

    return in_memory, process


def transformers_boto3(root: str, n_px: int) -> Steps:
    """The same, from objects that boto3 reads with as many threads as this library."""
    import boto3
    from botocore.config import Config

    client = boto3.Session().client("s3", config=Config(max_pool_connections=READ_AHEAD))
    _, process = transformers(root, n_px)

    def keys(unit: sources.WorkUnit) -> list[str]:
        assert isinstance(unit.content, Files)
        return [key_of(storage.join(unit.content.root, path)) for path in unit.content.paths]

    def get(key: str) -> bytes:
        data: bytes = client.get_object(Bucket="bucket", Key=key)["Body"].read()
        return data

    def work(keys: list[str]) -> int:
        with ThreadPoolExecutor(READ_AHEAD) as pool:
            return process(pool.map(get, keys))

    return keys, work


def shards_by(pipeline: str, crop: str) -> Callable[[str, int], Steps]:
    """Our preparation, from files to stored shards."""

    def steps(root: str, n_px: int) -> Steps:
        palette = Palette.load(f"{root}/palette.npy")
        pixels = PixelsConfig.model_validate({"n_px": n_px, "pipeline": pipeline, "crop": crop})
        pipeline_id = images.pipeline_id(pixels.pipeline, pixels.view)
        token_format = TokenFormat(n_px=n_px, n_vocab=len(palette), palette=palette.fingerprint, pipeline=pipeline_id)
        make = MakeShard(root, token_format, pixels, holdout=0.0, committed={})

        def delete_shard(unit: sources.WorkUnit) -> Task:
            next(sources.read(unit))  # loads the S3 client, which takes as long as reading a thousand images
            task = Task(unit, 0)
            storage.delete(storage.join(root, path_of(unit.split, task)))
            return task

        def count(task: Task) -> int:
            return sum(shard.rows for shard, _ in make(task).shards)

        return delete_shard, count

    return steps


ALTERNATIVES: dict[str, Callable[[str, int], Steps]] = {
    "jpeg_eighth": jpeg_eighth,
    "fast_centre": shards_by("fast", "centre"),
    "fast_random": shards_by("fast", "random"),
    "reference_centre": shards_by("reference", "centre"),
    "transformers": transformers,
    "transformers_boto3": transformers_boto3,
}
RUNS = {
    **{name: (name, "files") for name in ALTERNATIVES if name != "transformers_boto3"},
    "fast_centre_from_s3_files": ("fast_centre", "s3://bucket/files"),
    "fast_centre_from_s3_tars": ("fast_centre", "s3://bucket/tars"),
    "transformers_from_s3_files": ("transformers_boto3", "s3://bucket/files"),
}
"""Name -> alternative, and its source: a URI, or a folder of this machine."""
COMPARED = ("jpeg_eighth", "transformers", "transformers_from_s3_files")
"""Every run is compared with those of these that are run."""


def in_memory(unit: sources.WorkUnit) -> list[bytes]:
    return [image.data for image in sources.read(unit) if isinstance(image, sources.Image)]


def full_preparation(settings: BenchDataConfig, bucket: Path, n: int) -> Report:
    """`prepare` of n images with its default random crops."""
    link_repeatedly(settings.images, bucket / f"{n}", n)
    config = PrepareConfig(
        source=str(bucket / f"{n}"),
        palette=str(bucket / "palette.npy"),
        tokens=str(bucket / f"tokens-{n}"),
        shard_images=UNIT,
        pixels=PixelsConfig(n_px=settings.n_px),
    )
    with peak_of_workers() as peak:
        report = prepare.prepare(config)
    shutil.rmtree(bucket / f"{n}")
    return {
        "images": report["images"],
        "images_per_second": report["images_per_second"],
        "mb_per_second": report["mb_per_second"],
        "peak_mb_of_a_worker": peak(),
    }


def link_repeatedly(source: str, folder: Path, n: int) -> int:
    """Create n images in `folder` as hard links to those at `source`, in turn; returns how many `source` has."""
    uris = [entry.uri for entry in storage.walk(source)]
    for i in range(n):
        uri = uris[i % len(uris)]
        path = folder / f"train/{i % 10}/{i // len(uris):05d}-{storage.name(uri)}"
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(uri, path)
        except OSError:  # another file system, or one without hard links
            shutil.copyfile(uri, path)
    return len(uris)


def pack_tars(folder: Path, out: Path) -> None:
    """Write the images of `folder` to WebDataset shards of one unit each."""
    out.mkdir()
    paths = sorted(folder.glob("train/*/*"))
    out.joinpath("classes.txt").write_text("".join(f"{digit}\n" for digit in range(10)))
    for n, part in enumerate(batched(paths, UNIT)):
        # dereference=True, because tarfile would store a repeated inode as a link
        with tarfile.open(out / f"train-{n:05d}.tar", "w", dereference=True) as shard:
            for i, path in enumerate(part):
                shard.add(path, f"{i:05d}.jpg")
                label = tarfile.TarInfo(f"{i:05d}.cls")
                label.size = 1
                shard.addfile(label, io.BytesIO(path.parent.name.encode()))


@contextmanager
def cores_of(program: str) -> Iterator[Callable[[], float]]:
    """Yields a function that returns, after the block, how many cores a child process named `program` used in it."""
    import psutil

    child = next(p for p in psutil.Process().children(recursive=True) if program in p.name())

    def used() -> float:
        return float(sum(child.cpu_times()[:2]))

    cpu, wall = used(), time.perf_counter()
    cores = 0.0
    yield lambda: cores
    cores = (used() - cpu) / (time.perf_counter() - wall)


@contextmanager
def peak_of_workers() -> Iterator[Callable[[], int]]:
    """Yields a function that returns the largest resident size, in megabytes, of a Ray Data worker in the block."""
    import psutil

    peaks: dict[int, int] = {}
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.2):
            for process in psutil.Process().children(recursive=True):
                try:
                    if "MapWorker" in process.name() + " ".join(process.cmdline()):
                        status = Path(f"/proc/{process.pid}/status").read_text()
                        peaks[process.pid] = int(status.split("VmHWM:")[1].split()[0]) // 1024
                except (psutil.Error, OSError, IndexError):
                    continue  # the process has ended

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield lambda: max(peaks.values())
    finally:
        stop.set()
        thread.join()
