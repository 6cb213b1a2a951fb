"""What the tests share: two real object stores, a node cache of their own, a process group of one, a tiny token store.

The environment below is set before anything imports ray, and its workers inherit it.
"""

import os
import sys
from pathlib import Path

from igpt_ray.data.config import PaletteConfig, PixelsConfig, PrepareConfig
from igpt_ray.model.config import ModelConfig

os.environ["PYTHONPATH"] = os.pathsep.join(  # for the programs that tests start
    [str(Path(__file__).parent / folder) for folder in ("..", "support", ".")] + [os.environ.get("PYTHONPATH", "")]
).strip(os.pathsep)
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.1"
os.environ["RAY_TRAIN_ENABLE_PRINT_PATCH"] = "0"
os.environ["AWS_EC2_METADATA_DISABLED"] = "true"

import hashlib
import secrets
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from igpt_ray import object_clients, storage
from igpt_ray.data import pixels as images
from igpt_ray.data import token_store
from igpt_ray.data.palette import Palette
from igpt_ray.data.token_store import Manifest, Shard, Statistics, TokenFormat, TokenStore
from igpt_ray.model.image_gpt import ImageGPT

if TYPE_CHECKING:
    from metadata import Metadata
    from transformers import ImageGPTForCausalImageModeling

ROOT = Path(__file__).resolve().parent.parent

torch.set_num_threads(1)  # the matrices are tiny: a second thread costs more than it gives


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder `shared` beside the checkout: OpenAI's palette, golden checkpoints, sample images."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"{folder} is missing: it holds the golden files that this test compares with")
    return folder


@pytest.fixture(scope="session")
def _cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def cache(_cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test uses a node cache of its own run; nothing is written to the user's."""
    monkeypatch.setattr(storage, "CACHE", _cache_folder)
    return _cache_folder


# ------------------------------------------------------------------------------------------------ object stores


class Keyed(NamedTuple):
    """An S3 server that checks signatures."""

    endpoint: str
    key: str
    secret: str


@pytest.fixture(scope="session")
def moto_s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The endpoint of a moto server: complete S3 semantics, conditional writes too; takes any key."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with serving(command, port, tmp_path_factory.mktemp("moto")):
        yield f"http://127.0.0.1:{port}"


@pytest.fixture(scope="session")
def rclone_s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keyed]:
    """An rclone server: checks signatures, but ignores `If-None-Match`."""
    folder = tmp_path_factory.mktemp("rclone")
    (folder / "buckets").mkdir()
    (folder / "rclone.conf").touch()
    port, key, secret = free_port(), secrets.token_hex(8), secrets.token_hex(16)
    command = [str(Path(sys.executable).parent / "rclone"), "serve", "s3", "--addr", f"127.0.0.1:{port}"]
    command += ["--auth-key", f"{key},{secret}", "--config", str(folder / "rclone.conf"), str(folder / "buckets")]
    with serving(command, port, folder):
        yield Keyed(f"http://127.0.0.1:{port}", key, secret)


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., None]]:
    """A function that points the AWS environment, and so `storage`, at an endpoint with a key (or with none)."""

    def point_at(endpoint: str, key: str | None = "any", secret: str | None = "any") -> None:
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3", "AWS_SKIP_SIGNATURE"):
            monkeypatch.delenv(name, raising=False)
        for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
            monkeypatch.setenv(name, str(tmp_path / "no-such-file"))
        for name, value in (("AWS_ACCESS_KEY_ID", key), ("AWS_SECRET_ACCESS_KEY", secret)):
            monkeypatch.delenv(name, raising=False)
            if value is not None:
                monkeypatch.setenv(name, value)
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        object_clients.clear_cache()

    yield point_at
    object_clients.clear_cache()


@pytest.fixture
def on_moto(moto_s3: str, aws: Callable[..., None]) -> str:
    """A new bucket's URI at the moto server, with the AWS environment pointing there."""
    aws(moto_s3)
    return _new_bucket()


@pytest.fixture
def on_rclone(rclone_s3: Keyed, aws: Callable[..., None]) -> str:
    """A new bucket's URI at the rclone server, with the AWS environment pointing there."""
    aws(*rclone_s3)
    return _new_bucket()


@pytest.fixture(params=["local", "moto", "rclone"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URI of an empty place, in each kind of store."""
    return str(tmp_path / "place") if request.param == "local" else request.getfixturevalue(f"on_{request.param}")


def free_port() -> int:
    """A free loopback port outside the range that `ray start` claims for its workers."""
    while True:
        with closing(socket.socket()) as s:
            s.bind(("127.0.0.1", 0))
            port: int = s.getsockname()[1]
        if not 10002 <= port <= 19999:
            return port


@contextmanager
def serving(command: list[str], port: int, folder: Path) -> Iterator[None]:
    log = folder / "server.log"
    with open(log, "wb") as out:
        server = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, cwd=folder)
    try:
        _wait_until_it_answers(server, port, log)
        yield
    finally:
        server.terminate()
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _wait_until_it_answers(server: subprocess.Popen[bytes], port: int, log: Path, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and server.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.05)
    pytest.fail(f"{server.args} does not answer on port {port}:\n{log.read_text()[-2000:]}")


def _new_bucket() -> str:
    bucket = f"bucket-{secrets.token_hex(4)}"
    object_clients.s3_client().create_bucket(Bucket=bucket)
    return f"s3://{bucket}"


@pytest.fixture
def metadata() -> Iterator["Metadata"]:
    """A cloud's metadata server, which says what a test puts into `said`."""
    from metadata import Metadata

    server = Metadata()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


# ------------------------------------------------------------------------------------------------ tiny real objects


@pytest.fixture(scope="session")
def palette() -> Palette:
    """16 random colours."""
    return Palette(np.random.default_rng(7).uniform(-1, 1, (16, 3)).astype(np.float32))


@pytest.fixture(scope="session")
def kind(palette: Palette) -> TokenFormat:
    """What the tokens of `store` mean: 4 x 4 pixels of 16 colours."""
    return TokenFormat(n_px=4, n_vocab=len(palette), palette=palette.fingerprint, pipeline="reference-2")


@pytest.fixture
def store(tmp_path: Path, palette: Palette, kind: TokenFormat) -> TokenStore:
    """A committed token store: two views of a training split in shards of 7 and 5 rows, and a test split of 3."""
    return tiny_store(str(tmp_path / "tokens"), palette, kind)


def tiny_store(root: str, palette: Palette, kind: TokenFormat) -> TokenStore:
    rng = np.random.default_rng(11)
    palette.save(storage.join(root, "palette.npy"))
    listed = []
    for split, view, sizes in (("test", 0, [3]), ("train", 0, [7, 5]), ("train", 1, [7, 5])):
        for unit, rows in enumerate(sizes):
            keys = [f"cat/{unit}-{row}.png" for row in range(rows)]
            tokens = rng.integers(0, kind.n_vocab, (rows, kind.n_positions)).astype(np.uint16)
            labels = rng.integers(0, 2, rows).tolist()
            data = token_store.encode(
                keys, labels, tokens, kind, {"unit": f"{unit:05d}", "split": split, "view": str(view)}
            )
            path = f"{split}/{unit:05d}-v{view}.parquet"
            storage.write(storage.join(root, path), data)
            listed.append(listing_of(path, split, view, rows, data))
    return token_store.commit(root, manifest_of(kind, listed))


@pytest.fixture
def pictures(tmp_path: Path) -> str:
    """Class folders of ten small training pictures and three for testing, one of each split not readable."""
    rng = np.random.default_rng(5)
    for split, n in (("train", 10), ("test", 3)):
        for i in range(n):
            data = images.png(rng.integers(0, 256, (9, 8, 3), np.uint8))
            name = f"{split}/{('cat', 'dog')[i % 2]}/{i}.png"
            storage.write(str(tmp_path / "pictures" / name), data if i != 1 else data[:-20])
    return str(tmp_path / "pictures")


@pytest.fixture(scope="session")
def smooth() -> images.RGB:
    """A picture that lossy formats keep well: (240, 320, 3)."""
    y, x = np.mgrid[0:240, 0:320]
    return np.stack([x * 255 // 319, y * 255 // 239, abs((x + y) % 256 - 128)], -1).astype(np.uint8)


def listing_of(path: str, split: str, view: int, rows: int, data: bytes) -> Shard:
    """A manifest's line for a shard."""
    digest = hashlib.sha256(data).hexdigest()
    none = Statistics(quarantined=0, source_bytes=0, squared_error=0)
    return Shard(
        path=path, split=split, view=view, rows=rows, bytes=len(data), sha256=digest, source="a test", statistics=none
    )


def manifest_of(kind: TokenFormat, listed: list[Shard]) -> Manifest:
    return Manifest(
        format=token_store.FORMAT, kind=kind, classes=["cat", "dog"], shards=listed, made_by={"by": "a test"}
    )


# ------------------------------------------------------------------------------------------------ devices

WITHOUT_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, WITHOUT_CUDA])])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU, and the first CUDA device where there is one, with exact float32 products (no TF32)."""
    if request.param == "cpu":
        return torch.device("cpu")
    torch.set_float32_matmul_precision("highest")
    torch.cuda.set_device(0)
    return torch.device("cuda", 0)


@pytest.fixture(scope="session")
def _groups() -> Iterator[None]:
    """The process group of the last test is destroyed at the end."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture
def process_group(_groups: None, request: pytest.FixtureRequest) -> None:
    """torch.distributed with this process alone: over NCCL for a test on a CUDA device, as in a real run, else gloo."""
    on_cuda = "device" in request.fixturenames and "cuda" in str(request.getfixturevalue("device"))
    backend = "nccl" if on_cuda else "gloo"
    if dist.is_initialized() and dist.get_backend() != backend:
        dist.destroy_process_group()
    if not dist.is_initialized():
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


# ------------------------------------------------------------------------------------------------ Ray

COLOURED_DIGITS = 120
"""Training images of `prepared`; a third as many again are for testing."""


@pytest.fixture(scope="session")
def cluster() -> Iterator[str]:
    """The dashboard's address of a Ray cluster of three nodes with two CPUs each, which this process has joined."""
    # Ray deletes an uploaded working directory after this time, although a later job may rely on the same upload.
    os.environ["RAY_RUNTIME_ENV_TEMPORARY_REFERENCE_EXPIRATION_S"] = "7200"
    import ray
    from ray.cluster_utils import Cluster

    dashboard = free_port()
    memory = 200 << 20
    node = {"num_cpus": 2, "object_store_memory": memory}
    # Jobs are submitted through the head's agent, whose default port another Ray on this machine may hold.
    head = {"include_dashboard": True, "dashboard_port": dashboard, "dashboard_agent_listen_port": free_port()}
    nodes = Cluster(initialize_head=True, head_node_args=node | head)
    for _ in range(2):
        nodes.add_node(**node, dashboard_agent_listen_port=free_port())
    os.environ["RAY_ADDRESS"] = nodes.address
    ray.init(address=nodes.address, log_to_driver=False, logging_level="error")
    yield f"http://127.0.0.1:{dashboard}"
    ray.shutdown()
    nodes.shutdown()
    del os.environ["RAY_ADDRESS"]


@pytest.fixture(autouse=True)
def _on_the_cluster(request: pytest.FixtureRequest) -> None:
    """The tests of tests/ray that are marked `ray` run on the session's cluster."""
    if request.path.parent.name == "ray" and request.node.get_closest_marker("ray"):
        request.getfixturevalue("cluster")


@pytest.fixture(scope="session")
def digit_images(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Coloured digits in class folders, train and test."""
    from igpt_ray.data.digits import digits

    root = tmp_path_factory.mktemp("digits")
    wanted = {"train": COLOURED_DIGITS, "test": COLOURED_DIGITS // 3}
    for digit in digits(seed=0):
        split = digit.key.split("/")[0]
        if wanted[split] > 0:
            wanted[split] -= 1
            storage.write(storage.join(str(root), digit.key), digit.png)
    return str(root)


@pytest.fixture(scope="session")
def prepared(digit_images: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with `palette.npy` and `tokens/` of the coloured digits."""
    from igpt_ray.data.mapper import serial_map
    from igpt_ray.data.palette_fit import fit_palette
    from igpt_ray.data.prepare import prepare

    root = str(tmp_path_factory.mktemp("prepared"))
    pixels = PixelsConfig(n_px=8, crop="centre")
    palette = storage.join(root, "palette.npy")
    fit_palette(PaletteConfig(source=digit_images, out=palette, k=16, pixels=pixels), serial_map)
    tokens = storage.join(root, "tokens")
    settings = PrepareConfig(source=digit_images, palette=palette, tokens=tokens, shard_images=50, pixels=pixels)
    prepare(settings, serial_map)
    return root


def random_model(seed: int = 0, std: float = 0.3, device: torch.device | str = "cpu", **shape: Any) -> ImageGPT:
    """A small network in evaluation mode whose every weight is random: gains, start vector and head too.

    The weights are the same on every device.
    """
    settings = {"n_layer": 3, "n_embd": 32, "n_head": 4, "n_px": 4, "n_vocab": 16} | shape
    model = ImageGPT(ModelConfig(**settings)).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.normal_(0, std, generator=generator)
    return model.to(device)


def random_tokens(model: ImageGPT, n: int, seed: int = 0) -> Tensor:
    """(n, T) int64 on the model's device, the same numbers on every device."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(model.config.n_vocab, (n, model.config.n_positions), generator=generator)
    return tokens.to(model.wpe.device)


class Bomb:
    """Unpickled, it leaves a file behind."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.trace,)


HF_SHAPES = [
    {"n_layer": 3, "n_embd": 32, "n_head": 4, "n_px": 4, "n_vocab": 16},
    {"n_layer": 2, "n_embd": 48, "n_head": 3, "n_px": 6, "n_vocab": 512},
    {"n_layer": 5, "n_embd": 64, "n_head": 8, "n_px": 5, "n_vocab": 100},
]


def random_hf(
    n_layer: int, n_embd: int, n_head: int, n_px: int, n_vocab: int, seed: int = 0
) -> "ImageGPTForCausalImageModeling":
    """transformers' own network with random weights, gains too; its biases are zero, as in a converted model."""
    from transformers import ImageGPTConfig, ImageGPTForCausalImageModeling

    shape = {"n_layer": n_layer, "n_embd": n_embd, "n_head": n_head, "n_positions": n_px**2, "vocab_size": n_vocab + 1}
    hf = ImageGPTForCausalImageModeling(ImageGPTConfig(**shape)).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in hf.named_parameters():
        parameter.zero_() if name.endswith(".bias") else parameter.normal_(0, 0.15, generator=generator)
    return hf


def shifted(tokens: Tensor, model: ImageGPT) -> Tensor:
    """The input with which transformers' network predicts `tokens`: nothing there prepends the start token."""
    return torch.cat([torch.full((len(tokens), 1), model.config.n_vocab), tokens[:, :-1]], dim=1)


@pytest.fixture(scope="session")
def released(prepared: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A release for the prepared digits: the tiny shape with random weights, the head too, so that logits differ."""
    import torch

    from igpt_ray import weights
    from igpt_ray.model.config import ModelConfig
    from igpt_ray.model.image_gpt import ImageGPT

    store = TokenStore.open(storage.join(prepared, "tokens"))
    torch.manual_seed(3)
    model = ImageGPT(ModelConfig(n_layer=2, n_embd=32, n_head=2, n_px=8, n_vocab=16))
    torch.nn.init.normal_(model.wtet.weight, std=0.2)
    about = weights.ReleaseConfig(
        format=weights.FORMAT,
        model=model.config,
        kind=store.kind,
        sha256="",
        classes=store.manifest.classes,
        trained={"steps": 0},
    )
    uri = str(tmp_path_factory.mktemp("release"))
    weights.save_release(uri, model.state_dict(), store.palette(), about)
    return uri
