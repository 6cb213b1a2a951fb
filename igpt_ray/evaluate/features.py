"""Features of images at every layer, pooled over positions; and the folder that stores them.

    <root>/features.json                         the FeatureSpec; written first, and checked by every later job
    <root>/<split>/layer-07/<unit>.parquet       key, label, features (C,) float32; (MASKS, C) of a masked network
    <root>/<split>/units/<unit>.json             files of the unit and their sha256; written after them
    <root>/<split>/manifest.json                 all units of the split, with a checksum; written last: the commit

A unit is a shard of the token store, so a repeated job computes only the missing units. Every layer has files of its
own: any Parquet reader opens the folder of a layer as one table, and a probe reads nothing else. A unit is computed
ROWS_AT_ONCE rows at a time, which bounds the memory.
"""

import io
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import Tensor

from igpt_ray import artifact, storage, weights
from igpt_ray.data.token_format import Strict, Tokens
from igpt_ray.data.token_store import Shard, TokenStore, tokens_of
from igpt_ray.errors import FeatureError, SettingError
from igpt_ray.model import losses
from igpt_ray.model.image_gpt import ImageGPT, mean_over_positions

FORMAT = "igpt_ray features 1"
ROWS_AT_ONCE = 256
"""Rows of a Parquet row group; their features at all layers are in memory at once, in float32."""

Features = NDArray[np.float32]
Labels = NDArray[np.int64]
Pooling = Literal["mean", "last", "max", "attention"]


def attention_of_last(h: Tensor) -> Tensor:
    """(B, T, C) -> (B, C), in float32: dot-product attention of the last position over all positions."""
    h = h.float()
    return F.scaled_dot_product_attention(h[:, -1:], h, h)[:, 0]


POOLINGS: dict[Pooling, Callable[[Tensor], Tensor]] = {
    "mean": mean_over_positions,
    "last": lambda h: h[:, -1].float(),
    "max": lambda h: h.amax(1).float(),
    "attention": attention_of_last,
}


class FeatureSpec(Strict):
    """The inputs and settings that determine features. A folder has features of one specification."""

    format: str
    release: str
    """sha256 of the weights."""
    tokens: str
    """sha256 of the token store's manifest."""
    untrained: int | None
    """Seed of random initial weights instead of the release's; None for the release's."""
    pooling: Pooling
    precision: str
    layers: list[int]
    """Layer l is the ln_1 output of block l; layer n_layer is the ln_f output."""
    shape: list[int]
    """Shape of the features of an image at a layer: (C,) or (MASKS, C)."""


class File(Strict):
    """The features of a unit at one layer."""

    layer: int
    path: str
    """Relative to the root."""
    bytes: int
    sha256: str


class FeatureUnit(Strict):
    """The features of a shard of tokens."""

    source: str
    """sha256 of the shard."""
    rows: int
    files: list[File]


class Manifest(Strict):
    about: FeatureSpec
    split: str
    units: list[FeatureUnit]
    """In the order of the token store's rows."""
    made_by: dict[str, Any]


# ------------------------------------------------------------------------------------------------ computing


def check_layers(layers: Sequence[int], n_layer: int) -> list[int]:
    """The layers, sorted; all layers if there are none. Raises `SettingError` for a layer that does not exist."""
    for layer in layers:
        if not 0 <= layer <= n_layer:
            raise SettingError(f"there is no layer {layer}: this network has layers 0 to {n_layer} (the ln_f output)")
    return sorted(set(layers)) or list(range(n_layer + 1))


def network(release: str, device: str, untrained: int | None, precision: str, compiled: bool = False) -> ImageGPT:
    """Load the network of a release for features; `untrained` is the seed of random initial weights."""
    model = weights.load_release(release, device).model
    if untrained is not None:
        torch.manual_seed(untrained)
        model.init_weights()
    model.to(getattr(torch, precision))
    if compiled:
        for block in model.blocks:
            block.compile()
    return model


@torch.inference_mode()
def pooled(
    model: ImageGPT, tokens: Tokens, keys: list[str], layers: list[int], pooling: Pooling, batch_size: int
) -> Features:
    """(N, T) -> (N, layers, C); (N, MASKS, layers, C) of a masked network, with masks drawn by the keys of the images.

    The forward pass stops at the last of `layers`.
    """
    parts = []
    for _, x, masks in batches(model, tokens, keys, batch_size):
        by_mask = [model.features(x, layers[-1], mask, POOLINGS[pooling])[:, layers] for mask in masks]
        parts.append((by_mask[0] if model.causal else torch.stack(by_mask, dim=1)).cpu().numpy())
    return np.concatenate(parts)


def batches(
    model: ImageGPT, tokens: Tokens, keys: list[str], batch_size: int
) -> Iterator[tuple[slice, Tensor, Sequence[Tensor | None]]]:
    """Rows, their tokens (B, T) on the model's device, and the masks (B, T) of a masked network, drawn by the keys;
    [None] for a causal network, which does not need keys."""
    device = model.wpe.device
    for start in range(0, len(tokens), batch_size):
        rows = slice(start, start + batch_size)
        x = torch.from_numpy(tokens[rows].astype(np.int64)).to(device)
        masks = (losses.visible_masks_of_keys(keys[rows], mask, x.shape[1]) for mask in range(losses.MASKS))
        yield rows, x, [None] if model.causal else [mask.to(device) for mask in masks]


# ------------------------------------------------------------------------------------------------ writing


def create_or_check(root: str, spec: FeatureSpec) -> None:
    """Create the folder for features of `spec`. Raises `FeatureError` if it has another specification."""
    uri = storage.join(root, "features.json")
    if not storage.exists(uri):
        storage.write_new(uri, (spec.model_dump_json(indent=1) + "\n").encode())
    existing = load_spec(root)
    for field in FeatureSpec.model_fields:
        expected, actual = getattr(spec, field), getattr(existing, field)
        if expected != actual:
            raise FeatureError(
                f"{root} has features of another specification: {field} {actual}, not {expected}: choose another folder"
            )


def load_spec(root: str) -> FeatureSpec:
    """Read features.json. Raises `FeatureError` if it is missing or damaged."""
    missing = f"no features at {root}: run jobs/features.py"
    damaged = f"{root}/features.json is damaged or of another version: remove {root}"
    uri = storage.join(root, "features.json")
    return artifact.load(uri, FeatureSpec.model_validate_json, FeatureError, missing, damaged)


def finished(root: str, shards: list[Shard]) -> dict[str, FeatureUnit]:
    """Path of a shard -> its unit, if all files exist with the right size. Reading checks their sha256."""
    folders = {storage.join(root, shard.split) for shard in shards}
    sizes = {entry.uri: entry.size for folder in folders for entry in storage.walk(folder)}
    units = {}
    for shard in shards:
        uri = _unit_uri(root, shard)
        if uri not in sizes:
            continue
        try:
            unit = FeatureUnit.model_validate_json(storage.read(uri))
        except ValidationError:
            continue  # damaged: computed again
        complete = all(sizes.get(storage.join(root, file.path)) == file.bytes for file in unit.files)
        if unit.source == shard.sha256 and complete:
            units[shard.path] = unit
    return units


def make_unit(
    root: str, store: TokenStore, shard: Shard, spec: FeatureSpec, model: ImageGPT, batch_size: int
) -> FeatureUnit:
    """Compute and store the features of a shard, one file per layer, then units/<unit>.json.

    Raises `FeatureError` with the key of the image if features are not finite.
    """
    table = store.read(shard)
    keys, tokens = table["key"].to_pylist(), tokens_of(table)
    with tempfile.TemporaryDirectory() as folder:
        paths = {layer: Path(folder, f"{layer}.parquet") for layer in spec.layers}
        with ExitStack() as stack:
            schema = _schema(spec)
            writers = {layer: stack.enter_context(_writer(path, schema)) for layer, path in paths.items()}
            for start in range(0, len(tokens), ROWS_AT_ONCE):
                rows = slice(start, start + ROWS_AT_ONCE)
                pooled_rows = pooled(model, tokens[rows], keys[rows], spec.layers, spec.pooling, batch_size)
                _check_finite(pooled_rows, keys[rows], spec)
                for i, layer in enumerate(spec.layers):
                    part = table.slice(start, ROWS_AT_ONCE).select(["key", "label"])
                    column = pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(pooled_rows[..., i, :]))
                    writers[layer].write_table(part.append_column("features", column).cast(schema))
        files = [_store(root, shard, layer, path) for layer, path in paths.items()]
    unit = FeatureUnit(source=shard.sha256, rows=len(tokens), files=files)
    storage.write(_unit_uri(root, shard), (unit.model_dump_json(indent=1) + "\n").encode())
    return unit


def commit(root: str, manifest: Manifest) -> None:
    """Write the manifest of a split, unless it exists with the same content."""
    uri, data = _manifest_uri(root, manifest.split), artifact.seal(manifest.model_dump_json(indent=1))
    try:
        existing = _manifest(root, manifest.split)
        if (existing.about, existing.units) == (manifest.about, manifest.units):
            return
    except FeatureError:
        pass  # missing or damaged
    storage.write(uri, data)


def _schema(spec: FeatureSpec) -> pa.Schema:
    metadata = {"igpt_ray": json.dumps(spec.model_dump(), sort_keys=True)}
    features = pa.fixed_shape_tensor(pa.float32(), spec.shape)
    return pa.schema([("key", pa.string()), ("label", pa.int32()), ("features", features)], metadata)


def _writer(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    """Uncompressed, because float32 features hardly compress."""
    return pq.ParquetWriter(path, schema, compression="none", use_dictionary=False, write_page_checksum=True)


def _store(root: str, shard: Shard, layer: int, path: Path) -> File:
    name = f"{shard.split}/layer-{layer:02d}/{Path(shard.path).name}"
    storage.upload(path, storage.join(root, name))
    return File(layer=layer, path=name, bytes=path.stat().st_size, sha256=artifact.sha256_of(path))


def _check_finite(features: Features, keys: list[str], spec: FeatureSpec) -> None:
    wrong = np.argwhere(~np.isfinite(features))
    if len(wrong):
        image, layer = wrong[0, 0], spec.layers[wrong[0, -2]]
        raise FeatureError(
            f"the features of {keys[image]} at layer {layer} are not finite: the release diverged in training, or"
            f" {spec.precision} is too narrow for it"
        )


def _unit_uri(root: str, shard: Shard) -> str:
    return storage.join(root, shard.split, "units", f"{Path(shard.path).stem}.json")


def _manifest_uri(root: str, split: str) -> str:
    return storage.join(root, split, "manifest.json")


# ------------------------------------------------------------------------------------------------ reading


class FeatureStore:
    """Committed features, open for reading; a split may be several splits joined by +, as in a token store."""

    def __init__(self, root: str):
        self.root = root
        self.spec = load_spec(root)

    def read(self, split: str, layer: int) -> Iterator[tuple[Features, Labels]]:
        """Yield features (rows, C) or (rows, MASKS, C) and labels (rows,) of one unit at a time.

        Raises `FeatureError` with the URI of the file if features are missing, damaged or not finite.
        """
        if layer not in self.spec.layers:
            raise FeatureError(f"{self.root} has no layer {layer}: it has {', '.join(map(str, self.spec.layers))}")
        for name in split.split("+"):
            for unit in _manifest(self.root, name, self.spec).units:
                yield self._open(next(file for file in unit.files if file.layer == layer))

    def rows(self, split: str) -> int:
        return sum(unit.rows for name in split.split("+") for unit in _manifest(self.root, name, self.spec).units)

    def layer(self, split: str, layer: int) -> tuple[Features, Labels]:
        """Features and labels of a split at a layer, in memory."""
        features = np.empty((self.rows(split), *self.spec.shape), np.float32)
        return features, fill(features, self.read(split, layer))

    def _open(self, file: File) -> tuple[Features, Labels]:
        uri = storage.join(self.root, file.path)
        data = artifact.read(uri, file.bytes, file.sha256, FeatureError, "jobs/features.py")
        table = pq.read_table(io.BytesIO(data))
        features = np.asarray(table["features"].combine_chunks().to_numpy_ndarray()).reshape(-1, *self.spec.shape)
        if not np.isfinite(features).all():
            raise FeatureError(f"{uri} has features that are not finite: compute them again, in another folder")
        return features, table["label"].to_numpy().astype(np.int64)


def fill(features: Features, units: Iterator[tuple[Features, Labels]]) -> Labels:
    """Copy consecutive units into an array in memory or on disk; return the labels."""
    labels, start = [np.empty(0, np.int64)], 0
    for part, part_labels in units:
        features[start : start + len(part)] = part
        labels.append(part_labels)
        start += len(part)
    return np.concatenate(labels)


def _manifest(root: str, split: str, spec: FeatureSpec | None = None) -> Manifest:
    """Raise `FeatureError` if the split is not committed, or its manifest is damaged or has another specification."""
    uri = _manifest_uri(root, split)

    def parse(data: bytes) -> Manifest:
        if (body := artifact.unseal(data)) is None:
            raise ValueError("it does not end with the sha256 of its other bytes")
        return Manifest.model_validate_json(body)

    missing = f"no features of {split!r} are committed at {root}: run jobs/features.py"
    damaged = f"{uri} is damaged or of another version: delete it and repeat jobs/features.py"
    manifest = artifact.load(uri, parse, FeatureError, missing, damaged)
    if spec is not None and manifest.about != spec:
        raise FeatureError(f"{uri} has another specification than {root}/features.json: remove {root}")
    return manifest
