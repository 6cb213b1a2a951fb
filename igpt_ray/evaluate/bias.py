"""The bias audit: stimuli of iEAT tests, classifiers of completions, and corrected p-values.

iEAT (ieat.py) compares the similarity of two groups of images to two sets of attributes. The audit of completions
compares the classes of completed images between groups. An audit runs several tests, so `holm` corrects the p-values.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from igpt_ray import storage, weights
from igpt_ray.data import pixels
from igpt_ray.data.decoding import decode
from igpt_ray.data.palette import Palette
from igpt_ray.data.token_format import TokenFormat, Tokens
from igpt_ray.errors import CheckpointError, FeatureError, ImageError, NotFound, SettingError, SourceError
from igpt_ray.evaluate import features, likelihood
from igpt_ray.evaluate.heads import load_head
from igpt_ray.evaluate.linear_probe import votes
from igpt_ray.evaluate.logistic import probabilities

SETS = ("X", "Y", "A", "B")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
RESAMPLES = 9_999
"""Permutations of images between groups: all of them up to this number, beyond it a random sample."""

Counts = NDArray[np.int64]


class Stimuli(NamedTuple):
    """One iEAT test: set -> URIs of its images."""

    name: str
    sets: dict[str, list[str]]


# ------------------------------------------------------------------------------------------------ stimuli


def load_tests(uri: str) -> list[Stimuli]:
    """The test in a folder with sub-folders X, Y, A and B, or the tests of a JSON file next to their folders.

    Raises `SourceError` if a set is missing or empty, or X and Y differ in size.
    """
    if not uri.endswith(".json"):
        return [_stimuli(storage.name(uri), {name: name for name in SETS}, uri, uri)]
    parent = uri.rpartition("/")[0]
    return [_stimuli(name, folders, parent, uri) for name, folders in _read_tests(uri).items()]


def load_groups(uri: str) -> dict[str, list[str]]:
    """Sub-folder -> URIs of its images. Raises `SourceError` for fewer than two groups, or one without images."""
    groups: dict[str, list[str]] = {}
    for entry in storage.walk(uri):
        group, slash, _ = storage.relative_to(uri, entry.uri).partition("/")
        if slash:
            images = groups.setdefault(group, [])
            if entry.uri.lower().endswith(SUFFIXES):
                images.append(entry.uri)
    if len(groups) < 2:
        raise SourceError(f"{uri} has {len(groups)} sub-folders with files: expected two or more, one per group")
    for group, images in groups.items():
        if not images:
            raise SourceError(f"the group {group!r} of {uri} has no images: expected {', '.join(SUFFIXES)}")
    return groups


def _read_tests(uri: str) -> dict[str, dict[str, str]]:
    expected = 'expected {"<test>": {"X": "<folder>", "Y": "<folder>", "A": "<folder>", "B": "<folder>"}}'
    try:
        tests = json.loads(storage.read(uri))
    except NotFound as error:
        raise SourceError(f"no tests at {uri}: {expected} ({error})") from error
    except ValueError as error:
        raise SourceError(f"{uri} is not JSON: {expected} ({error})") from error
    if not isinstance(tests, dict) or not tests:
        raise SourceError(f"{uri} has no tests: {expected}")
    for name, sets in tests.items():
        valid = isinstance(sets, dict) and set(sets) == set(SETS) and all(isinstance(f, str) for f in sets.values())
        if not valid:
            raise SourceError(f"the test {name!r} of {uri} does not have exactly X, Y, A and B: {expected}")
    return tests


def _stimuli(test: str, folders: dict[str, str], root: str, source: str) -> Stimuli:
    sets = {}
    for letter, name in folders.items():
        folder = storage.join(root, name)
        sets[letter] = [e.uri for e in storage.walk(folder) if e.uri.lower().endswith(SUFFIXES)]
        if not sets[letter]:
            raise SourceError(
                f"the test {test!r} of {source} has no images in {letter}: expected {', '.join(SUFFIXES)} in {folder}"
            )
    if len(sets["X"]) != len(sets["Y"]):
        raise SourceError(
            f"the test {test!r} of {source} has {len(sets['X'])} images in X and {len(sets['Y'])} in Y: iEAT needs"
            " equally many of both; remove some of the larger set"
        )
    return Stimuli(test, sets)


def read_tokens(uri: str, kind: TokenFormat, palette: Palette) -> Tokens:
    """Tokens (T,) of the centre crop of an image. Raises `ImageError` with the URI if it cannot be read."""
    try:
        return palette.encode(decode(pixels.centre_view, storage.read(uri), kind.n_px, kind.pipeline)).reshape(-1)
    except ImageError as error:
        raise ImageError(f"{uri} cannot be read: {error}; repair it, or remove it from its folder") from error


# ------------------------------------------------------------------------------------------------ classifiers


@dataclass(frozen=True)
class Classifier:
    """Class names, and the function from tokens to class indices."""

    classes: list[str]
    select: Callable[[Tokens, list[str]], NDArray[np.int64]]
    """(N, T) and N keys -> (N,). A masked network draws its masks by the keys."""


def load_classifier(uri: str, kind: TokenFormat, device: str, batch_size: int) -> Classifier:
    """Load a probe's head if `uri` is the output folder of jobs/probe.py, otherwise a fine-tuned release.

    Raises `FeatureError` or `CheckpointError` if it is neither, or has another token format than `kind`.
    """
    if storage.exists(storage.join(uri, "classifier.npz")):
        return _load_probe(uri, kind, device, batch_size)
    config = weights.load_config(uri)
    weights.check_kind(config.kind, kind, "the release that is audited")
    if not config.model.n_class:
        raise CheckpointError(
            f"{uri} has no class head: expected a fine-tuned release, or the output folder of jobs/probe.py"
        )
    model = weights.load_release(uri, device).model

    def select(tokens: Tokens, keys: list[str]) -> NDArray[np.int64]:
        return _predicted(probabilities(likelihood.class_logits(model, tokens, keys, batch_size)))

    named = config.classes if len(config.classes) == config.model.n_class else map(str, range(config.model.n_class))
    return Classifier(list(named), select)


def _load_probe(uri: str, kind: TokenFormat, device: str, batch_size: int) -> Classifier:
    """Load the head and the release of probe.json, which must be the release that the head was fitted on."""
    try:
        release = json.loads(storage.read(storage.join(uri, "probe.json")))["release"]
    except (ValueError, KeyError) as error:
        raise FeatureError(
            f"{uri}/probe.json is damaged or of another version: repeat jobs/probe.py ({error})"
        ) from error
    head = load_head(uri)
    config = weights.load_config(release)
    weights.check_kind(config.kind, kind, "the release that is audited")
    if config.sha256 != head.release:
        raise FeatureError(
            f"{release} is not the release that {uri}/classifier.npz was fitted on: repeat jobs/probe.py"
        )
    model = features.network(release, device, None, head.precision)

    def select(tokens: Tokens, keys: list[str]) -> NDArray[np.int64]:
        return _predicted(head.probabilities(model, tokens, keys, batch_size))

    return Classifier(head.classes, select)


def _predicted(p: NDArray[np.float64]) -> NDArray[np.int64]:
    """Probabilities (N, K), or (N, MASKS, K), where the masks vote -> (N,)."""
    return (votes(p) if p.ndim == 3 else p).argmax(1)


# ------------------------------------------------------------------------------------------------ statistics


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for multiple tests (Holm, 1979): the smallest times m, the next times m - 1, ..., and none
    below the previous one. Controls the family-wise error rate under any dependence between the tests."""
    m, corrected, floor = len(p_values), [0.0] * len(p_values), 0.0
    for rank, i in enumerate(np.argsort(p_values, kind="stable")):
        floor = max(floor, min(1.0, (m - rank) * p_values[i]))
        corrected[int(i)] = floor
    return corrected


class Independence(NamedTuple):
    """Test of whether the groups differ in their distribution over classes."""

    chi_square: float
    p_value: float
    """By permutation of images between the groups."""
    cramers_v: float
    """Effect size: 0 for equal distributions, 1 if the group determines the class."""


def independence(counts: dict[str, Counts], seed: int) -> Independence:
    """Pearson's chi-square over groups, each with class counts of the completions of an image: (images, classes).

    Completions of one image are not independent, so the chi-square distribution does not apply. The p-value is by
    permutation of whole images (scipy), and exact up to RESAMPLES permutations. Raises `SettingError` if scipy is
    missing.
    """
    try:
        from scipy.stats import permutation_test
        from scipy.stats.contingency import association
    except ImportError as error:
        raise SettingError("the audit of completions needs scipy: pip install 'igpt_ray[audit]'") from error
    by_image = np.concatenate(list(counts.values()))
    by_image = by_image[:, by_image.any(0)]  # a class that never occurs would divide by zero
    if by_image.shape[1] == 1:
        return Independence(0.0, 1.0, 0.0)
    ends = np.cumsum([len(group) for group in counts.values()])
    groups = np.split(np.arange(len(by_image)), ends[:-1])

    def table(*groups: NDArray[np.int64]) -> Counts:
        return np.stack([by_image[group].sum(0) for group in groups])

    result = permutation_test(
        groups,
        lambda *groups: chi_square(table(*groups)),
        vectorized=False,
        n_resamples=RESAMPLES,
        alternative="greater",
        rng=np.random.default_rng(seed),
    )
    cramers_v = association(table(*groups), "cramer")
    return Independence(float(result.statistic), float(result.pvalue), float(cramers_v))


def chi_square(table: Counts) -> float:
    """Pearson's statistic of a table (groups, classes) without empty rows or columns."""
    expected = table.sum(1, keepdims=True) * table.sum(0) / table.sum()
    return float(((table - expected) ** 2 / expected).sum())
