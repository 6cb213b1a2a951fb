"""Features equal transformers' at every layer; their folder has features of one kind only."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import HF_SHAPES, ROOT, listing_of, manifest_of, random_hf, random_model, random_tokens, shifted

from igpt_ray import artifact, storage, weights
from igpt_ray.data import token_store
from igpt_ray.data.mapper import serial_map
from igpt_ray.data.palette import Palette
from igpt_ray.data.token_store import TokenFormat, TokenStore, tokens_of
from igpt_ray.errors import FeatureError, SettingError
from igpt_ray.evaluate import features
from igpt_ray.evaluate.config import FeaturesConfig
from igpt_ray.evaluate.features import FeatureStore
from igpt_ray.model import losses
from igpt_ray.model.image_gpt import ImageGPT

if TYPE_CHECKING:
    from igpt_ray.flows import features as flow

Extract = Callable[..., "flow.FeaturesResult"]


@pytest.fixture
def release(store: TokenStore, tmp_path: Path) -> str:
    return release_of(random_model(), store, str(tmp_path / "release"))


def release_of(model: ImageGPT, store: TokenStore, uri: str) -> str:
    about = weights.ReleaseConfig(
        format=weights.FORMAT, model=model.config, kind=store.kind, sha256="", classes=["cat", "dog"], trained={}
    )
    weights.save_release(uri, model.state_dict(), store.palette(), about)
    return uri


@pytest.fixture
def extract(store: TokenStore, release: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Extract:
    """Run the flow in this process; tests/ray has tests with Ray."""
    from igpt_ray.flows import features as flow  # here, because it needs Ray

    monkeypatch.setattr(flow, "actor_map", serial_map)
    monkeypatch.setattr(features, "ROWS_AT_ONCE", 4)

    def extracted(**settings: object) -> "flow.FeaturesResult":
        given = {"release": release, "tokens": store.root, "out": str(tmp_path / "features"), "batch_size": 3}
        return flow.extract(FeaturesConfig.model_validate(given | settings))

    return extracted


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def is_data(name: str) -> bool:
    """Not a manifest, which has a time and a host, nor a file of a killed write."""
    return not Path(name).name.startswith((".", "manifest"))


# ------------------------------------------------------------------------------------------------ the numbers


@pytest.mark.parametrize("shape", HF_SHAPES)
def test_features_equal_transformers_at_every_layer(device: torch.device, shape: dict[str, int]) -> None:
    """With a start token, and with ln_1's output instead of the residual stream, which a popular notebook omits."""
    hf = random_hf(**shape)
    model = weights.load_hf(hf.state_dict(), n_head=hf.config.n_head)
    x = random_tokens(model, 5)
    with torch.no_grad():
        states = hf(shifted(x, model), output_hidden_states=True).hidden_states
        expected = [block.ln_1(h).mean(1) for block, h in zip(hf.transformer.h, states[:-1], strict=True)]
    expected.append(states[-1].mean(1))  # transformers has put it through ln_f already
    layers = list(range(shape["n_layer"] + 1))
    found = features.pooled(
        model.to(device), x.numpy().astype(np.uint16), ["" for _ in x], layers, "mean", batch_size=2
    )
    for layer in layers:
        np.testing.assert_allclose(found[:, layer], expected[layer], rtol=0, atol=1e-5)
        assert np.abs(found[:, layer]).max() > 0.01  # not a comparison of zeros


def test_other_poolings_equal_their_definitions(device: torch.device) -> None:
    """The maximum is over positions, and the last position is of the same layer."""
    model = random_model(device=device)
    x = random_tokens(model, 3)
    h = model.blocks[0](model.embed(x))
    normed = model.blocks[1].ln_1(h).cpu().numpy()
    tokens, keys = x.cpu().numpy().astype(np.uint16), list("abc")
    last = features.pooled(model, tokens, keys, [1], "last", 3)
    highest = features.pooled(model, tokens, keys, [1], "max", 3)
    np.testing.assert_allclose(last[:, 0], normed[:, -1], atol=1e-5)
    np.testing.assert_allclose(highest[:, 0], normed.max(1), atol=1e-5)
    scores = np.einsum("btc,bc->bt", normed, normed[:, -1]) / np.sqrt(normed.shape[2])
    shares = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    pooled = features.pooled(model, tokens, keys, [1], "attention", 3)
    np.testing.assert_allclose(pooled[:, 0], np.einsum("bt,btc->bc", shares, normed), atol=1e-5)


def test_layers_after_the_last_requested_one_are_not_run(device: torch.device) -> None:
    """This halves the time for the middle layers."""
    model = random_model(device=device)
    for block in model.blocks[2:]:
        block.attn.register_forward_hook(lambda *_: pytest.fail("a block too many"))
    found = features.pooled(
        model, random_tokens(model, 2).cpu().numpy().astype(np.uint16), ["a", "b"], [0, 2], "mean", 2
    )
    assert found.shape == (2, 2, 32)


def test_the_masks_of_a_masked_network_depend_on_the_image_s_key(device: torch.device) -> None:
    """An image's features must not depend on its batch."""
    model = random_model(std=0.15, objective="masked", device=device)
    x, keys = random_tokens(model, 4), ["a", "b", "c", "d"]
    found = features.pooled(model, x.cpu().numpy().astype(np.uint16), keys, [0, 1, 3], "mean", 3)
    assert found.shape == (4, losses.MASKS, 3, 32)
    for mask in range(losses.MASKS):
        keep = losses.visible_masks_of_keys(["c"], mask, 16).to(device)
        expected = model.features(x[2:3], visible_mask=keep)[0, [0, 1, 3]]
        np.testing.assert_allclose(found[2, mask], expected.cpu(), atol=1e-5)


def test_the_untrained_network_is_different_and_reproducible(release: str) -> None:
    """All actors must use the same weights."""
    trained, first, second = (features.network(release, "cpu", seed, "float32") for seed in (None, 1, 1))
    assert torch.equal(first.wte.weight, second.wte.weight)
    assert not torch.equal(first.wte.weight, trained.wte.weight)


# ------------------------------------------------------------------------------------------------ the folder


def test_the_folder_has_every_image_at_every_layer(extract: Extract, store: TokenStore, release: str) -> None:
    """No row is lost between row groups of 4 and shards of 7 and 5, and labels are in order."""
    report = extract()
    assert (report.units, report.units_made, report.layers) == (3, 3, [0, 1, 2, 3])
    kept = FeatureStore(report.features)
    model = weights.load_release(release).model
    tables = list(store.read_split("train"))
    tokens = np.concatenate([tokens_of(table) for table in tables])
    direct = features.pooled(model, tokens, [""] * 12, [0, 1, 2, 3], "mean", 12)
    for layer in range(4):
        found, labels = kept.layer("train", layer)
        np.testing.assert_allclose(found, direct[:, layer], atol=1e-5)
        assert labels.tolist() == [label for table in tables for label in table["label"].to_pylist()]
    assert kept.layer("train+test", 2)[0].shape == (15, 32)


def test_a_layer_s_folder_is_a_table_for_any_reader(extract: Extract, store: TokenStore) -> None:
    folder = Path(extract().features)
    table = pq.read_table(folder / "train" / "layer-02")
    assert table.column_names == ["key", "label", "features"]
    assert sorted(table["key"].to_pylist()) == sorted(
        k for t in store.read_split("train") for k in t["key"].to_pylist()
    )
    assert len(table["features"][0].as_py()) == 32


def test_a_repeat_computes_only_missing_or_truncated_files(extract: Extract) -> None:
    """It ends with the same bytes."""
    folder = Path(extract().features)
    whole = files_of(folder)
    untouched = (folder / "train/layer-00/00000-v0.parquet").stat().st_mtime_ns
    assert extract().units_made == 0
    (folder / "train/layer-02/00001-v0.parquet").unlink()
    cut = folder / "test/layer-03/00000-v0.parquet"
    cut.write_bytes(cut.read_bytes()[:-1])
    assert extract().units_made == 2
    (folder / "train/units/00001-v0.json").write_text("{")
    (folder / "train/manifest.json").unlink()
    assert extract().units_made == 1
    again = files_of(folder)
    assert all(again[name] == whole[name] for name in whole if is_data(name))
    assert again.keys() == whole.keys()
    assert (folder / "train/layer-00/00000-v0.parquet").stat().st_mtime_ns == untouched


@pytest.mark.slow
def test_after_a_kill_at_any_write_a_repeat_computes_only_uncommitted_units(
    store: TokenStore, release: str, tmp_path: Path
) -> None:
    """No partial unit is reused, and no complete one is computed again."""
    settings = {"release": release, "tokens": store.root, "splits": ["train"], "layers": [1]}
    command = [
        sys.executable,
        str(ROOT / "tests/support/killed_features.py"),
        json.dumps(settings),
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    ends = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(ends) > 15
    assert [made for _, _, made, _ in ends] == [2 - lines for _, lines, _, _ in ends]
    assert {lines for _, lines, _, _ in ends} == {0, 1, 2}
    final = [{name: sha for name, sha in files.items() if is_data(name)} for *_, files in ends]
    assert final == [final[-1]] * len(ends)
    assert all("train/manifest.json" in files for *_, files in ends)


def test_another_split_can_be_added_to_a_folder(extract: Extract) -> None:
    folder = extract(splits=["test"]).features
    with pytest.raises(FeatureError, match="no features of 'train' are committed"):
        FeatureStore(folder).layer("train", 0)
    assert extract().units_made == 2
    assert FeatureStore(folder).rows("train") == 12


def test_a_unit_without_images_is_valid(store: TokenStore, extract: Extract, release: str) -> None:
    """All images of a unit may be in quarantine."""
    empty = store.manifest.shards[0].model_copy(update={"rows": 0, "path": "test/empty-v0.parquet"})
    data = token_store.encode([], [], np.empty((0, 16), np.uint16), store.kind, {"unit": "empty"})
    storage.write(storage.join(store.root, empty.path), data)
    empty = empty.model_copy(update={"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()})
    manifest = store.manifest.model_copy(update={"shards": [empty, *store.manifest.shards]})
    storage.write(storage.join(store.root, "manifest.json"), artifact.seal(manifest.model_dump_json()))
    folder = extract().features
    assert FeatureStore(folder).layer("test", 1)[0].shape == (3, 32)


@pytest.mark.slow
def test_memory_does_not_grow_with_rows(tmp_path: Path) -> None:
    """With 130 MB or 4 MB of features in a unit, the process needs the same memory within 30 MB."""
    script = """
import resource, sys
from tests.evaluate.test_features import wide_unit
wide_unit(sys.argv[1], int(sys.argv[2]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""
    peaks = []
    for rows in (500, 16_000):
        command = [sys.executable, "-c", script, str(tmp_path / str(rows)), str(rows)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
        assert done.returncode == 0, done.stderr
        peaks.append(float(done.stdout))
    stored = sum(path.stat().st_size for path in (tmp_path / "16000/features").rglob("*.parquet"))
    assert stored > 120e6
    assert peaks[1] < peaks[0] + 30


def wide_unit(root: str, rows: int) -> None:
    """A shard of many rows and a small network of many layers, so that features are large and fast to compute."""
    from igpt_ray.data import token_store
    from igpt_ray.flows import features as flow

    palette = Palette(np.random.default_rng(7).uniform(-1, 1, (16, 3)).astype(np.float32))
    kind = TokenFormat(n_px=2, n_vocab=16, palette=palette.fingerprint, pipeline="reference-1")
    tokens = np.random.default_rng(0).integers(0, 16, (rows, 4)).astype(np.uint16)
    data = token_store.encode([str(i) for i in range(rows)], [0] * rows, tokens, kind, {"unit": "0"})
    storage.write(f"{root}/train/0-v0.parquet", data)
    palette.save(f"{root}/palette.npy")
    store = token_store.commit(root, manifest_of(kind, [listing_of("train/0-v0.parquet", "train", 0, rows, data)]))
    model = random_model(n_layer=62, n_embd=32, n_head=1, n_px=2)
    uri = release_of(model, store, f"{root}/release")
    flow.actor_map = serial_map
    flow.extract(FeaturesConfig(release=uri, tokens=root, out=f"{root}/features"))


# ------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"pooling": "max"}, "pooling mean, not max"),
        ({"layers": [1]}, r"layers \[0, 1, 2, 3\], not \[1\]"),
        ({"untrained": 4}, "untrained None, not 4"),
        ({"precision": "bfloat16"}, "precision float32, not bfloat16"),
    ],
)
def test_the_error_names_settings_that_differ(extract: Extract, change: dict[str, object], named: str) -> None:
    """Otherwise a probe would mix two kinds of features."""
    folder = extract().features
    with pytest.raises(FeatureError, match=f"has features of another specification: {named}: choose another folder"):
        extract(**change)
    assert extract().features == folder


def test_the_error_names_another_release_or_store(extract: Extract, store: TokenStore, tmp_path: Path) -> None:
    """Also if the first job was killed before it committed anything."""
    folder = Path(extract().features)
    for manifest in folder.glob("*/manifest.json"):
        manifest.unlink()
    other = release_of(random_model(seed=1), store, str(tmp_path / "other"))
    with pytest.raises(FeatureError, match=r"another specification: release [0-9a-f]{64}, not"):
        extract(release=other)
    changed = store.manifest.model_copy(update={"made_by": {"by": "another test"}})
    storage.write(storage.join(store.root, "manifest.json"), artifact.seal(changed.model_dump_json()))
    with pytest.raises(FeatureError, match=r"another specification: tokens [0-9a-f]{64}, not"):
        extract()


@pytest.mark.parametrize("layer", [-1, 4])
def test_a_layer_that_does_not_exist_is_refused(extract: Extract, layer: int) -> None:
    """-1 would silently be the last."""
    with pytest.raises(SettingError, match=rf"there is no layer {layer}: this network has layers 0 to 3"):
        extract(layers=[layer])
    extract(layers=[2])


def test_a_layer_without_features_is_an_error(extract: Extract) -> None:
    folder = extract(layers=[2]).features
    with pytest.raises(FeatureError, match="has no layer 1: it has 2"):
        FeatureStore(folder).layer("train", 1)


def test_features_that_are_not_finite_are_an_error_at_once(extract: Extract, store: TokenStore, tmp_path: Path) -> None:
    """Otherwise a probe would fail hours later."""
    model = random_model()
    model.blocks[1].mlp.c_proj.weight.data.fill_(1e38)
    overflowing = release_of(model, store, str(tmp_path / "overflowing"))
    with pytest.raises(FeatureError, match=r"the features of cat/0-0.png at layer 2 are not finite"):
        extract(release=overflowing)


def test_the_error_names_the_file_of_a_flipped_bit(extract: Extract) -> None:
    folder = Path(extract().features)
    path = folder / "train/layer-01/00000-v0.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    kept = FeatureStore(str(folder))
    with pytest.raises(FeatureError, match=r"train/layer-01/00000-v0.parquet is damaged .* delete it and repeat"):
        kept.layer("train", 1)
    path.unlink()
    assert extract().units_made == 1
    assert kept.layer("train", 1)[0].shape == (12, 32)


def test_a_damaged_manifest_is_an_error_and_a_repeat_rewrites_it(extract: Extract) -> None:
    folder = Path(extract().features)
    manifest = folder / "train/manifest.json"
    manifest.write_text(manifest.read_text().replace('"rows": 7', '"rows": 6'))
    with pytest.raises(FeatureError, match="damaged or of another version: delete it and repeat"):
        FeatureStore(str(folder)).layer("train", 0)
    assert extract().units_made == 0
    assert FeatureStore(str(folder)).layer("train", 0)[0].shape == (12, 32)


def test_a_folder_without_features_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FeatureError, match=r"no features at .*: run jobs/features.py"):
        FeatureStore(str(tmp_path))
