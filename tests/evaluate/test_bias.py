"""The bias audit: errors for invalid input, correction for multiple tests, and permutations of images."""

import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import chi2_contingency

from igpt_ray import storage, weights
from igpt_ray.data import pixels
from igpt_ray.data.palette import Palette
from igpt_ray.data.token_store import TokenFormat
from igpt_ray.errors import CheckpointError, FeatureError, ImageError, SourceError
from igpt_ray.evaluate import bias

PICTURE = pixels.png(np.zeros((2, 2, 3), np.uint8))


def pictures(root: Path, **sizes: int) -> str:
    for folder, n in sizes.items():
        (root / folder).mkdir(parents=True)
        for i in range(n):
            (root / folder / f"{i}.png").write_bytes(PICTURE)
    return str(root)


# ------------------------------------------------------------------------------------------------ sets and groups


def test_a_folder_is_one_test_and_a_json_names_several(tmp_path: Path) -> None:
    """Folders next to the JSON file may be in several tests."""
    root = pictures(tmp_path / "stimuli", X=2, Y=2, A=1, B=3)
    (only,) = bias.load_tests(root)
    assert {letter: len(uris) for letter, uris in only.sets.items()} == {"X": 2, "Y": 2, "A": 1, "B": 3}
    named = {"one": {"X": "X", "Y": "Y", "A": "A", "B": "B"}, "two": {"X": "A", "Y": "A", "A": "X", "B": "Y"}}
    storage.write(f"{root}/tests.json", json.dumps(named).encode())
    one, two = bias.load_tests(f"{root}/tests.json")
    assert one.sets == only.sets
    assert two.sets["B"] == only.sets["Y"]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            {"X": 3, "Y": 2, "A": 1, "B": 1},
            "has 3 images in X and 2 in Y: iEAT needs equally many of both",
        ),
        ({"X": 2, "Y": 2, "A": 1}, "no images in B: expected .jpg.* in .*/B"),
        ({"X": 2, "Y": 2, "A": 0, "B": 1}, "no images in A"),
    ],
)
def test_sets_that_make_no_test_are_refused_by_name(tmp_path: Path, sizes: dict[str, int], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        bias.load_tests(pictures(tmp_path / "stimuli", **sizes))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no list of tests: expected"),
        ("[]", "is no list of tests"),
        ("{}", "is no list of tests"),
        ('{"career": {"X": "x", "Y": "y", "A": "a"}}', r"\(career.B: Field required\)"),
        ('{"career": {"X": "x", "Y": "y", "A": "a", "B": 3}}', r"\(career.B: "),
        ('{"career": {"X": "x", "Y": "y", "A": "a", "B": "b", "C": "c"}}', r"\(career.C: "),
    ],
)
def test_a_json_that_names_no_tests_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "tests.json").write_text(content)
    with pytest.raises(SourceError, match=message):
        bias.load_tests(str(tmp_path / "tests.json"))
    with pytest.raises(SourceError, match="no tests at"):
        bias.load_tests(str(tmp_path / "other.json"))


def test_groups_are_sub_folders_and_an_empty_one_is_an_error(tmp_path: Path) -> None:
    root = pictures(tmp_path / "groups", women=2, men=3)
    assert {group: len(uris) for group, uris in bias.load_groups(root).items()} == {"men": 3, "women": 2}
    (tmp_path / "groups/cats").mkdir()
    (tmp_path / "groups/cats/readme.txt").touch()
    with pytest.raises(SourceError, match=r"the group 'cats' of .* has no images"):
        bias.load_groups(root)
    with pytest.raises(SourceError, match="has 1 sub-folders with files: expected two or more"):
        bias.load_groups(pictures(tmp_path / "alone", women=2))


def test_the_error_names_an_unreadable_image(tmp_path: Path, kind: TokenFormat, palette: Palette) -> None:
    path = tmp_path / "torn.png"
    path.write_bytes(PICTURE[:30])
    with pytest.raises(ImageError, match=r"torn.png cannot be read: .* remove it from its folder"):
        bias.read_tokens(str(path), kind, palette)


# ------------------------------------------------------------------------------------------------ classifiers


def released(folder: Path, kind: TokenFormat, palette: Palette, n_class: int = 0) -> str:
    """A release of random weights, optionally with a class head."""
    from conftest import random_model

    model = random_model(n_class=n_class)
    about = weights.ReleaseConfig(
        format=weights.FORMAT, model=model.config, kind=kind, sha256="", classes=["cat", "dog"], trained={"steps": 0}
    )
    weights.save_release(str(folder), model.state_dict(), palette, about)
    return str(folder)


def test_a_fine_tuned_release_classifies_with_its_head(tmp_path: Path, kind: TokenFormat, palette: Palette) -> None:
    """The order of the batches is preserved."""
    import torch

    uri = released(tmp_path / "tuned", kind, palette, n_class=2)
    tokens = np.random.default_rng(0).integers(0, 16, (7, 16)).astype(np.uint16)
    classifier = bias.load_classifier(uri, kind, "cpu", batch_size=3)
    direct = (
        weights.load_release(uri).model.forward_with_classifier(torch.from_numpy(tokens.astype(np.int64)))[1].argmax(1)
    )
    assert classifier.select(tokens, [""] * 7).tolist() == direct.tolist()
    assert classifier.classes == ["cat", "dog"]


def test_an_unusable_classifier_is_an_error(tmp_path: Path, kind: TokenFormat, palette: Palette) -> None:
    """A release without a head; one for other tokens; a head whose release has been replaced; a damaged head."""
    uri = released(tmp_path / "plain", kind, palette)
    with pytest.raises(CheckpointError, match="has no class head: expected a fine-tuned release"):
        bias.load_classifier(uri, kind, "cpu", 8)
    with pytest.raises(CheckpointError, match="trained with pipeline reference-2, but the release that is audited"):
        bias.load_classifier(uri, kind.model_copy(update={"pipeline": "fast-1"}), "cpu", 8)
    probe = tmp_path / "probe"
    storage.write(str(probe / "probe.json"), json.dumps({"release": uri}).encode())
    head = {"mean": np.zeros(32), "deviation": np.ones(32), "weight": np.ones((2, 32)), "bias": np.zeros(2)}
    np.savez(probe / "classifier.npz", **head)
    with pytest.raises(FeatureError, match=r"classifier.npz is damaged or of another version: repeat jobs/probe.py"):
        bias.load_classifier(str(probe), kind, "cpu", 8)
    whole = (probe / "classifier.npz").read_bytes()
    for damaged in (whole[:100], whole[:-30], b"", b"text"):
        (probe / "classifier.npz").write_bytes(damaged)
        with pytest.raises(FeatureError, match=r"classifier.npz is damaged or of another version"):
            bias.load_classifier(str(probe), kind, "cpu", 8)
    how = {"layer": 1, "pooling": "mean", "precision": "float32", "classes": ["cat", "dog"]}
    np.savez(probe / "classifier.npz", **head, **how, release="another")
    with pytest.raises(FeatureError, match=r"is not the release that .* was fitted on"):
        bias.load_classifier(str(probe), kind, "cpu", 8)


# ------------------------------------------------------------------------------------------------ significance


def test_holm_s_correction_equals_a_worked_example() -> None:
    """By hand: 0.01 * 4, 0.02 * 3, 0.03 * 2, each at least the one before, 0.04."""
    assert bias.holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert bias.holm([0.5, 0.9]) == [1.0, 1.0]
    assert bias.holm([0.2]) == [0.2]


def test_chi_square_equals_scipy_s() -> None:
    table = np.random.default_rng(0).integers(1, 30, (3, 4))
    assert bias.chi_square(table) == pytest.approx(chi2_contingency(table, correction=False).statistic)


def test_the_p_value_of_few_images_is_over_all_partitions() -> None:
    """Seven images have 35 partitions into groups of three and four."""
    counts = np.random.default_rng(4).multinomial(16, [0.5, 0.3, 0.2], 7)
    counts[:3, 0] += 20

    def of(rows: tuple[int, ...]) -> float:
        rest = [i for i in range(7) if i not in rows]
        return float(chi2_contingency(np.stack([counts[list(rows)].sum(0), counts[rest].sum(0)])).statistic)

    observed = of((0, 1, 2))
    expected = sum(of(rows) >= observed - 1e-9 for rows in combinations(range(7), 3)) / 35
    found = bias.independence({"a": counts[:3], "b": counts[3:]}, seed=0)
    assert found.p_value == pytest.approx(expected)
    assert found.chi_square == pytest.approx(observed)
    assert found.cramers_v == pytest.approx((observed / counts.sum()) ** 0.5)


def test_many_completions_of_few_images_are_not_significant() -> None:
    """Two images per group, and all completions of an image have its own class: with independent completions p would be
    below 1e-100, but all partitions of these images are equivalent."""
    counts = 1000 * np.eye(4, dtype=np.int64)
    assert chi2_contingency(np.stack([counts[:2].sum(0), counts[2:].sum(0)])).pvalue < 1e-100
    assert bias.independence({"a": counts[:2], "b": counts[2:]}, seed=0).p_value == 1


def test_completions_of_a_single_class_do_not_differ() -> None:
    counts = np.array([[0, 16, 0], [0, 16, 0], [0, 16, 0]])
    assert bias.independence({"a": counts[:1], "b": counts[1:]}, seed=0) == (0, 1, 0)
