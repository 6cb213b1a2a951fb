"""The loader: the same verified images in the same order on any number of workers, each once per epoch."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from igpt_ray.data import loader, token_store
from igpt_ray.data.loader import Batch, SplitCache, global_batch, permute, share
from igpt_ray.data.token_store import TokenStore
from igpt_ray.errors import TokenStoreError
from igpt_ray.train.batches import passes

quick = settings(deadline=None, max_examples=40, derandomize=True)
seeds, epochs = st.integers(0, 2**32 - 1), st.integers(0, 10**6)


@quick
@given(st.integers(1, 5000), seeds, epochs)
@example(1, 0, 0)
@example(2, 0, 0)
@example(4, 0, 0)
@example(4096, 0, 0)
@example(4097, 0, 0)
def test_an_epoch_is_a_permutation(n: int, seed: int, epoch: int) -> None:
    """A hash instead of a bijection would omit a third of the images and repeat others."""
    order = permute(np.arange(n), n, seed, epoch)
    np.testing.assert_array_equal(np.sort(order), np.arange(n))


@quick
@given(st.integers(1, 5000), seeds, epochs, st.data())
def test_a_row_is_computed_independently_of_others(n: int, seed: int, epoch: int, data: st.DataObject) -> None:
    """Cycle walking that depended on the other rows of a call would differ between workers."""
    asked = np.array(data.draw(st.lists(st.integers(0, n - 1), max_size=20)), np.int64)
    np.testing.assert_array_equal(permute(asked, n, seed, epoch), permute(np.arange(n), n, seed, epoch)[asked])


def test_epochs_and_seeds_have_different_random_orders() -> None:
    """Orders must not repeat, and adjacent rows must be separated, or batches would have a single class."""
    n = 3000
    orders = [permute(np.arange(n), n, seed, epoch) for seed in range(4) for epoch in range(4)]
    for i, a in enumerate(orders):
        assert abs(np.corrcoef(a, np.arange(n))[0, 1]) < 0.08
        assert (np.abs(np.diff(a)) < 10).mean() < 0.02
        for b in orders[:i]:
            assert (a == b).mean() < 0.01
            assert abs(np.corrcoef(a, b)[0, 1]) < 0.08


def test_the_order_of_a_seed_does_not_change() -> None:
    """With another order, a resumed run would repeat some images and skip others."""
    assert permute(np.arange(10), 10, 0, 0).tolist() == [6, 1, 2, 9, 5, 3, 7, 0, 4, 8]
    assert permute(np.arange(10), 10, 1, 7).tolist() == [1, 0, 8, 2, 9, 6, 5, 3, 7, 4]


def test_a_billion_rows_cost_no_memory() -> None:
    """A shuffled array of indices would take 8 GB on every worker."""
    rows = permute(np.arange(1000), 10**9, 3, 0)
    assert len(np.unique(rows)) == 1000
    assert 0 <= rows.min() < rows.max() < 10**9
    assert rows.max() > 9 * 10**8


@quick
@given(st.integers(1, 300), st.integers(1, 64), seeds)
def test_every_epoch_shows_each_image_once(n_rows: int, batch_size: int, seed: int) -> None:
    """Also if the batch size is larger or does not divide the rows: no partial batch is dropped."""
    n_epochs = 3
    n_steps = -(-n_epochs * n_rows // batch_size)
    batches = [global_batch(seed, step, batch_size, n_rows) for step in range(n_steps)]
    assert all(len(batch.rows) == batch_size for batch in batches)
    epoch = np.concatenate([batch.epochs for batch in batches])
    row = np.concatenate([batch.rows for batch in batches])
    assert (np.diff(epoch) >= 0).all()
    for e in range(n_epochs):
        np.testing.assert_array_equal(np.sort(row[epoch == e]), np.arange(n_rows))


@quick
@given(st.integers(1, 1000), st.integers(0, 10**6), st.integers(1, 128), seeds, st.integers(1, 16))
def test_the_batch_does_not_depend_on_the_number_of_workers(
    n_rows: int, step: int, batch_size: int, seed: int, world_size: int
) -> None:
    """Workers have parts of a batch, not of the data, so that a resume uses the same images."""
    whole = global_batch(seed, step, batch_size, n_rows)
    parts = [share(whole, rank, world_size) for rank in range(world_size)]
    np.testing.assert_array_equal(np.concatenate([part.rows for part in parts]), whole.rows)
    np.testing.assert_array_equal(np.concatenate([part.epochs for part in parts]), whole.epochs)
    sizes = [len(part.rows) for part in parts]
    assert max(sizes) - min(sizes) <= 1


@quick
@given(
    st.integers(1, 300),
    st.integers(1, 40),
    seeds,
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 7), st.integers(1, 4)), min_size=1, max_size=4),
)
@example(10, 8, 0, [(3, 2, 2), (1, 8, 1), (2, 3, 2)])
@example(5, 2, 0, [(7, 1, 3)])
def test_a_run_whose_workers_change_has_the_same_batches_and_passes(
    n_rows: int, batch_size: int, seed: int, legs: list[tuple[int, int, int]]
) -> None:
    """Each leg is (workers, largest micro-batch, steps). Workers divide a batch without gaps or overlaps and have the
    same number of passes, or some would wait in a collective."""
    step = 0
    for world_size, micro_batch, n_steps in legs:
        for _ in range(n_steps):
            whole = global_batch(seed, step, batch_size, n_rows)
            taken = [passes(whole, rank, world_size, micro_batch) for rank in range(world_size)]
            assert len({len(of_one) for of_one in taken}) == 1
            parts = [part for of_one in taken for part in of_one]
            assert max(len(part.rows) for part in parts) <= micro_batch
            np.testing.assert_array_equal(np.concatenate([part.rows for part in parts]), whole.rows)
            np.testing.assert_array_equal(np.concatenate([part.epochs for part in parts]), whole.epochs)
            step += 1


# ------------------------------------------------------------------------------------------------ the node's cache


def rows_of(store: TokenStore, split: str, view: int) -> np.ndarray:
    return np.concatenate([token_store.tokens_of(store.read(shard)) for shard in store.manifest.select(split, view)])


def test_the_cache_has_the_rows_of_the_store(store: TokenStore, tmp_path: Path) -> None:
    """The order of the shards and the shape of the map are correct."""
    cache = SplitCache(store, "test", tmp_path)
    assert len(cache) == 3
    everything = Batch(np.zeros(3, np.int64), np.arange(3))
    np.testing.assert_array_equal(cache[everything], rows_of(store, "test", 0))


def test_epochs_read_their_views_in_turn(store: TokenStore, tmp_path: Path) -> None:
    """Also within a batch that spans two epochs."""
    cache = SplitCache(store, "train", tmp_path)
    views = [rows_of(store, "train", view) for view in (0, 1)]
    batch = Batch(np.array([0, 1, 2, 3, 3, 1_000_000]), np.array([4, 4, 11, 11, 0, 7]))
    expected = [views[epoch % 2][row] for epoch, row in zip(*batch, strict=True)]
    np.testing.assert_array_equal(cache[batch], expected)
    assert (views[0] != views[1]).any()


def test_a_worker_without_images_gets_none(store: TokenStore, tmp_path: Path) -> None:
    """More workers than images in the batch."""
    nothing = Batch(np.zeros(0, np.int64), np.zeros(0, np.int64))
    for split in ("test", "train"):
        assert SplitCache(store, split, tmp_path)[nothing].shape == (0, 16)


def test_a_node_downloads_a_split_once(store: TokenStore, tmp_path: Path) -> None:
    """The workers of a node share the cache."""
    SplitCache(store, "train", tmp_path)
    for shard in store.manifest.shards:
        Path(store.root, shard.path).unlink()
    assert len(SplitCache(store, "train", tmp_path)) == 12


def test_another_store_has_another_cache(store: TokenStore, tmp_path: Path) -> None:
    """After a store is prepared again with the same name, training must not use the old tokens."""
    SplitCache(store, "test", tmp_path)
    changed = store.manifest.model_copy(update={"made_by": {"by": "another"}})
    other = TokenStore(store.root, changed, "0" * 64)
    SplitCache(other, "test", tmp_path)
    assert len(list(tmp_path.glob("tokens-*-test-v0.u16"))) == 2


def test_a_damaged_shard_does_not_reach_the_cache(store: TokenStore, tmp_path: Path) -> None:
    """It is verified before the file has its final name, which other processes use."""
    path = Path(store.root, store.manifest.select("train", 1)[1].path)
    good = path.read_bytes()
    path.write_bytes(good[:100] + bytes([good[100] ^ 1]) + good[101:])
    for _ in range(2):
        with pytest.raises(TokenStoreError, match=path.name):
            SplitCache(store, "train", tmp_path / "cache")
    path.write_bytes(good)
    cache = SplitCache(store, "train", tmp_path / "cache")
    np.testing.assert_array_equal(cache[Batch(np.ones(12, np.int64), np.arange(12))], rows_of(store, "train", 1))


def test_a_bit_that_flips_in_the_cache_never_reaches_a_batch(
    store: TokenStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A disk may fail during a run of weeks; each resume verifies the cache."""
    SplitCache(store, "train", tmp_path)
    victim = next(tmp_path.glob("*-train-v1.u16"))
    data = victim.read_bytes()
    victim.write_bytes(data[:99] + bytes([data[99] ^ 4]) + data[100:])
    cache = SplitCache(store, "train", tmp_path)
    assert f"{victim} is damaged" in caplog.text
    np.testing.assert_array_equal(cache[Batch(np.ones(12, np.int64), np.arange(12))], rows_of(store, "train", 1))


def test_the_error_of_an_unknown_split_lists_the_splits(store: TokenStore, tmp_path: Path) -> None:
    """Instead of `max() arg is an empty sequence` from a worker."""
    with pytest.raises(TokenStoreError, match="it has test, train"):
        SplitCache(store, "val", tmp_path)


def test_the_cache_is_in_the_configured_folder(store: TokenStore, cache: Path) -> None:
    """The path must not be fixed at import."""
    SplitCache(store, "test")
    assert list(cache.glob(f"tokens-{store.sha256[:24]}-test-v0.u16"))
    assert cache == loader.storage.CACHE
