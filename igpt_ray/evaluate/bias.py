"""The bias audit: stimuli of iEAT tests, classifiers of completions, and corrected p-values.

iEAT (ieat.py) compares the similarity of two groups of images to two sets of attributes. The audit of completions
compares the classes of completed images between groups. An audit runs several tests, so `holm` corrects the p-values.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, TypeAdapter

from igpt_ray import artifact, storage, weights
from igpt_ray.data import pixels
from igpt_ray.data.decoding import decode
from igpt_ray.data.palette import Palette
from igpt_ray.data.token_format import Strict, TokenFormat, Tokens
from igpt_ray.errors import CheckpointError, FeatureError, ImageError, SettingError, SourceError
from igpt_ray.evaluate import features, likelihood
from igpt_ray.evaluate.heads import load_head
from igpt_ray.evaluate.linear_probe import votes
from igpt_ray.evaluate.logistic import probabilities

SETS = ("X", "Y", "A", "B")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
RESAMPLES = 9_999
"""Permutations of images between groups: all of them up to this number, beyond it a random sample."""

Counts = NDArray[np.int64]


class Folders(Strict):
    """The folders of an iEAT test's images, relative to the JSON file."""

    X: str
    Y: str
    A: str
    B: str


TESTS = TypeAdapter(Annotated[dict[str, Folders], Field(min_length=1)])


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
        return [_stimuli(storage.name(uri), Folders(X="X", Y="Y", A="A", B="B"), uri, uri)]
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


def _read_tests(uri: str) -> dict[str, Folders]:
    expected = 'expected {"<test>": {"X": "<folder>", "Y": "<folder>", "A": "<folder>", "B": "<folder>"}}'
    messages = f"no tests at {uri}: {expected}", f"{uri} is no list of tests: {expected}"
    return artifact.load(uri, TESTS.validate_json, SourceError, *messages)


def _stimuli(test: str, folders: Folders, root: str, source: str) -> Stimuli:
    sets = {}
    for letter, name in folders:
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
    """Class names, and the function from tokens to probabilities."""

    classes: list[str]
    probabilities: Callable[[Tokens, list[str]], NDArray[np.float64]]
    """(N, T) and N keys -> (N, K), or (N, MASKS, K) of a masked network, which draws its masks by the keys."""

    def select(self, tokens: Tokens, keys: list[str]) -> NDArray[np.int64]:
        """The most probable class of every image; masks vote: (N, T) -> (N,)."""
        p = self.probabilities(tokens, keys)
        return (votes(p) if p.ndim == 3 else p).argmax(1)


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
    named = config.classes if len(config.classes) == config.model.n_class else map(str, range(config.model.n_class))
    return Classifier(
        list(named), lambda tokens, keys: probabilities(likelihood.class_logits(model, tokens, keys, batch_size))
    )


def _load_probe(uri: str, kind: TokenFormat, device: str, batch_size: int) -> Classifier:
    """Load the head and the release of probe.json, which must be the release that the head was fitted on."""
    file = storage.join(uri, "probe.json")
    messages = f"{file} is missing", f"{file} is damaged or of another version: repeat jobs/probe.py"
    release = artifact.load(file, lambda data: json.loads(data)["release"], FeatureError, *messages)
    head = load_head(uri)
    config = weights.load_config(release)
    weights.check_kind(config.kind, kind, "the release that is audited")
    if config.sha256 != head.release:
        raise FeatureError(
            f"{release} is not the release that {uri}/classifier.npz was fitted on: repeat jobs/probe.py"
        )
    model = features.network(release, device, None, head.precision)
    return Classifier(head.classes, lambda tokens, keys: head.probabilities(model, tokens, keys, batch_size))


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
