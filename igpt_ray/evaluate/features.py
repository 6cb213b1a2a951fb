"""Features: what a network makes of images at every layer, pooled over positions; and the folder that keeps them.

    <root>/features.json                         what they are features of; written first, and nothing else fits in
    <root>/<split>/layer-07/<unit>.parquet       key, label, features (C,) float32; (MASKS, C) of a masked network
    <root>/<split>/units/<unit>.json             the unit's files and their sha256; written after them
    <root>/<split>/manifest.json                 all units of the split, sealed; written last: the commit

A unit is a shard of the token store, so a repeated job makes only the units that are not there. A layer has files of
its own: any Parquet reader opens its folder as one table, and a probe of it reads nothing else. While a unit is made,
ROWS_AT_ONCE rows of features are held, whatever the unit or the split has.
"""

import hashlib
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

from igpt_ray import storage, weights
from igpt_ray.data import token_store
from igpt_ray.data.token_format import Strict, Tokens
from igpt_ray.data.token_store import Shard, TokenStore, tokens_of
from igpt_ray.errors import FeatureError, NotFound, SettingError
from igpt_ray.model import losses
from igpt_ray.model.image_gpt import ImageGPT, mean_over_positions

FORMAT = "igpt_ray features 1"
ROWS_AT_ONCE = 256
"""Rows of a Parquet row group, and of features that are in memory at once: all layers of them, in float32."""

Features = NDArray[np.float32]
Labels = NDArray[np.int64]
Pooling = Literal["mean", "last", "max", "attention"]


def attention_of_the_last(h: Tensor) -> Tensor:
    """(B, T, C) -> (B, C), in float32: all positions, weighted by how the last one's dot product attends to them."""
    h = h.float()
    return F.scaled_dot_product_attention(h[:, -1:], h, h)[:, 0]


POOLINGS: dict[Pooling, Callable[[Tensor], Tensor]] = {
    "mean": mean_over_positions,
    "last": lambda h: h[:, -1].float(),
    "max": lambda h: h.amax(1).float(),
    "attention": attention_of_the_last,
}


class About(Strict):
    """What features are of. Those of anything else do not go into the same folder."""

    format: str
    release: str
    """sha256 of the weights."""
    tokens: str
    """sha256 of the token store's manifest."""
    untrained: int | None
    """The seed, if the weights were drawn anew instead."""
    pooling: Pooling
    precision: str
    layers: list[int]
    """Block l's ln_1 output; the number of blocks stands for ln_f's."""
    shape: list[int]
    """Of an image's features at a layer: (C,) or (MASKS, C)."""


class File(Strict):
    """A unit's features at one layer."""

    layer: int
    path: str
    """Below the root."""
    bytes: int
    sha256: str


class FeatureUnit(Strict):
    """The features of a shard of tokens."""

    source: str
    """sha256 of the shard."""
    rows: int
    files: list[File]


class Manifest(Strict):
    about: About
    split: str
    units: list[FeatureUnit]
    """In the order of the token store's rows."""
    made_by: dict[str, Any]


# ------------------------------------------------------------------------------------------------ computing


def check_layers(layers: Sequence[int], n_layer: int) -> list[int]:
    """The layers asked for, in order; all of them if none is. Raises `SettingError` for one that does not exist."""
    for layer in layers:
        if not 0 <= layer <= n_layer:
            raise SettingError(f"there is no layer {layer}: this network has 0 to {n_layer} (ln_f's output)")
    return sorted(set(layers)) or list(range(n_layer + 1))


def network(release: str, device: str, untrained: int | None, precision: str, compiled: bool = False) -> ImageGPT:
    """A release's network as features want it; `untrained` is the seed of weights drawn anew."""
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
    """(N, T) -> (N, layers, C); under a masked network, which looks at an image under MASKS masks, (N, MASKS, layers,
    C). The forward pass stops at the last of `layers`."""
    if model.causal:
        return _look(model, tokens, None, layers, pooling, batch_size)
    keeps = (losses.visible_masks_of_keys(keys, mask, tokens.shape[1]) for mask in range(losses.MASKS))
    return np.stack([_look(model, tokens, keep, layers, pooling, batch_size) for keep in keeps], axis=1)


def _look(
    model: ImageGPT, tokens: Tokens, keep: Tensor | None, layers: list[int], pooling: Pooling, batch_size: int
) -> Features:
    found, device = [], model.wpe.device
    for start in range(0, len(tokens), batch_size):
        rows = slice(start, start + batch_size)
        x = torch.from_numpy(tokens[rows].astype(np.int64)).to(device)
        seen = None if keep is None else keep[rows].to(device)
        found.append(model.features(x, layers[-1], seen, POOLINGS[pooling])[:, layers].cpu().numpy())
    return np.concatenate(found)


# ------------------------------------------------------------------------------------------------ writing


def create_or_check(root: str, about: About) -> None:
    """Make `root` the folder of these features. Raises `FeatureError` if it holds those of something else."""
    uri = storage.join(root, "features.json")
    if not storage.exists(uri):
        storage.write_new(uri, (about.model_dump_json(indent=1) + "\n").encode())
    there = about_of(root)
    for field in About.model_fields:
        ours, theirs = getattr(about, field), getattr(there, field)
        if ours != theirs:
            raise FeatureError(
                f"{root} holds features of another kind: {field} {theirs}, not {ours}: choose another folder"
            )


def about_of(root: str) -> About:
    """Raises `FeatureError` if no features are kept at `root`."""
    try:
        return About.model_validate_json(storage.read(storage.join(root, "features.json")))
    except NotFound as error:
        raise FeatureError(f"no features at {root}: run jobs/features.py ({error})") from error
    except ValidationError as error:
        raise FeatureError(f"{root}/features.json is damaged or of another version: remove {root}") from error


def finished(root: str, listed: list[Shard]) -> dict[str, FeatureUnit]:
    """Path of a shard -> the unit that is there, its files in their full size. Reading compares their sha256 too."""
    places = {storage.join(root, shard.split) for shard in listed}
    sizes = {entry.uri: entry.size for place in places for entry in storage.walk(place)}
    found = {}
    for shard in listed:
        uri = _line_uri(root, shard)
        if uri not in sizes:
            continue
        try:
            unit = FeatureUnit.model_validate_json(storage.read(uri))
        except ValidationError:
            continue  # damaged: it is made again
        whole = all(sizes.get(storage.join(root, file.path)) == file.bytes for file in unit.files)
        if unit.source == shard.sha256 and whole:
            found[shard.path] = unit
    return found


def make_unit(
    root: str, store: TokenStore, shard: Shard, about: About, model: ImageGPT, batch_size: int
) -> FeatureUnit:
    """Compute the features of a shard and store them, a file a layer, then the line that says so.

    Raises `FeatureError` if they are not finite, naming the image.
    """
    table = store.read(shard)
    keys, tokens = table["key"].to_pylist(), tokens_of(table)
    with tempfile.TemporaryDirectory() as folder:
        paths = {layer: Path(folder, f"{layer}.parquet") for layer in about.layers}
        with ExitStack() as stack:
            schema = _schema(about)
            writers = {layer: stack.enter_context(_writer(path, schema)) for layer, path in paths.items()}
            for start in range(0, len(tokens), ROWS_AT_ONCE):
                rows = slice(start, start + ROWS_AT_ONCE)
                found = pooled(model, tokens[rows], keys[rows], about.layers, about.pooling, batch_size)
                _check_finite(found, keys[rows], about)
                for i, layer in enumerate(about.layers):
                    part = table.slice(start, ROWS_AT_ONCE).select(["key", "label"])
                    column = pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(found[..., i, :]))
                    writers[layer].write_table(part.append_column("features", column).cast(schema))
        files = [_store(root, shard, layer, path) for layer, path in paths.items()]
    unit = FeatureUnit(source=shard.sha256, rows=len(tokens), files=files)
    storage.write(_line_uri(root, shard), (unit.model_dump_json(indent=1) + "\n").encode())
    return unit


def commit(root: str, manifest: Manifest) -> None:
    """Write a split's manifest, the last step; one that says the same already is left alone."""
    uri, data = _manifest_uri(root, manifest.split), token_store.append_checksum(manifest.model_dump_json(indent=1))
    try:
        there = _manifest(root, manifest.split)
        if (there.about, there.units) == (manifest.about, manifest.units):
            return
    except FeatureError:
        pass  # none there, or a damaged one
    storage.write(uri, data)


def _schema(about: About) -> pa.Schema:
    said = {"igpt_ray": json.dumps(about.model_dump(), sort_keys=True)}
    features = pa.fixed_shape_tensor(pa.float32(), about.shape)
    return pa.schema([("key", pa.string()), ("label", pa.int32()), ("features", features)], said)


def _writer(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    """Uncompressed: the digits of a float hardly repeat."""
    return pq.ParquetWriter(path, schema, compression="none", use_dictionary=False, write_page_checksum=True)


def _store(root: str, shard: Shard, layer: int, path: Path) -> File:
    with open(path, "rb") as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()
    name = f"{shard.split}/layer-{layer:02d}/{Path(shard.path).name}"
    storage.upload(path, storage.join(root, name))
    return File(layer=layer, path=name, bytes=path.stat().st_size, sha256=digest)


def _check_finite(found: Features, keys: list[str], about: About) -> None:
    wrong = np.argwhere(~np.isfinite(found))
    if len(wrong):
        image, layer = wrong[0, 0], about.layers[wrong[0, -2]]
        raise FeatureError(
            f"the features of {keys[image]} at layer {layer} are not finite: the release diverged in training, or"
            f" {about.precision} is too narrow for it"
        )


def _line_uri(root: str, shard: Shard) -> str:
    return storage.join(root, shard.split, "units", f"{Path(shard.path).stem}.json")


def _manifest_uri(root: str, split: str) -> str:
    return storage.join(root, split, "manifest.json")


# ------------------------------------------------------------------------------------------------ reading


class FeatureStore:
    """Committed features, open for reading; a split may be several joined by +, as in a token store."""

    def __init__(self, root: str):
        self.root = root
        self.about = about_of(root)

    def read(self, split: str, layer: int) -> Iterator[tuple[Features, Labels]]:
        """A unit at a time: (rows, C) or (rows, MASKS, C), and (rows,). Raises `FeatureError` if they are not there,
        damaged or not finite, naming the file."""
        if layer not in self.about.layers:
            raise FeatureError(f"{self.root} has no layer {layer}: it has {', '.join(map(str, self.about.layers))}")
        for name in split.split("+"):
            for unit in _manifest(self.root, name, self.about).units:
                yield self._open(next(file for file in unit.files if file.layer == layer))

    def rows(self, split: str) -> int:
        return sum(unit.rows for name in split.split("+") for unit in _manifest(self.root, name, self.about).units)

    def layer(self, split: str, layer: int) -> tuple[Features, Labels]:
        """All of a split at a layer, in memory."""
        features = np.empty((self.rows(split), *self.about.shape), np.float32)
        return features, fill(features, self.read(split, layer))

    def _open(self, file: File) -> tuple[Features, Labels]:
        uri = storage.join(self.root, file.path)
        data = storage.read(uri)
        if len(data) != file.bytes or hashlib.sha256(data).hexdigest() != file.sha256:
            raise FeatureError(
                f"{uri} is damaged ({len(data)} bytes, expected {file.bytes} with sha256 {file.sha256[:12]}...):"
                " delete it and repeat jobs/features.py"
            )
        table = pq.read_table(io.BytesIO(data))
        features = np.asarray(table["features"].combine_chunks().to_numpy_ndarray()).reshape(-1, *self.about.shape)
        if not np.isfinite(features).all():
            raise FeatureError(f"{uri} holds features that are not finite: make them again, in another folder")
        return features, table["label"].to_numpy().astype(np.int64)


def fill(features: Features, units: Iterator[tuple[Features, Labels]]) -> Labels:
    """Copy units one behind the other into an array in memory or on disk; returns the labels."""
    labels, start = [np.empty(0, np.int64)], 0
    for part, part_labels in units:
        features[start : start + len(part)] = part
        labels.append(part_labels)
        start += len(part)
    return np.concatenate(labels)


def _manifest(root: str, split: str, about: About | None = None) -> Manifest:
    """Raises `FeatureError` if the split is not committed, its manifest damaged, or of other features."""
    uri = _manifest_uri(root, split)
    try:
        body = token_store.unseal(storage.read(uri))
    except NotFound as error:
        raise FeatureError(f"no features of {split!r} are committed at {root}: run jobs/features.py") from error
    if body is None:
        raise FeatureError(f"{uri} is damaged: delete it and repeat jobs/features.py, which keeps what is whole")
    try:
        found = Manifest.model_validate_json(body)
    except ValidationError as error:
        raise FeatureError(f"{uri} is of another version: remove {root} and repeat jobs/features.py") from error
    if about is not None and found.about != about:
        raise FeatureError(f"{uri} is of other features than {root}/features.json: remove {root}")
    return found
