"""The bias audit: which pictures make which test, who names classes of completions, what many tests allow to say.

iEAT (ieat.py) asks whether two groups of pictures lie nearer to one set of attributes than to the other. The audit of
completions asks whether halves of pictures of different groups are finished as different classes. Several tests in
one audit are several chances to find something by accident: `holm` corrects p-values for their number.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from igpt_ray import storage, weights
from igpt_ray.data import pixels
from igpt_ray.data.palette import Palette
from igpt_ray.data.token_format import TokenFormat, Tokens
from igpt_ray.errors import CheckpointError, FeatureError, ImageError, NotFound, SettingError, SourceError
from igpt_ray.evaluate import features, likelihood
from igpt_ray.evaluate.heads import load_head
from igpt_ray.evaluate.linear_probe import votes
from igpt_ray.evaluate.logistic import probabilities

SETS = ("X", "Y", "A", "B")
PICTURES = (".jpg", ".jpeg", ".png", ".webp")
SHUFFLES = 9_999
"""Ways to deal pictures to groups: all of them if there are no more, otherwise so many at random."""

Counts = NDArray[np.int64]


class Stimuli(NamedTuple):
    """One iEAT: the URIs of its pictures."""

    name: str
    sets: dict[str, list[str]]


# ------------------------------------------------------------------------------------------------ which pictures


def tests_of(uri: str) -> list[Stimuli]:
    """The tests of a folder with X, Y, A and B in it, or of a JSON that names folders beside it.

    Raises `SourceError` if a set is missing or empty, or X and Y are not as many.
    """
    if not uri.endswith(".json"):
        return [_test(storage.name(uri), {name: storage.join(uri, name) for name in SETS}, uri)]
    beside = uri.rpartition("/")[0]
    tests = []
    for name, sets in _named(uri).items():
        tests.append(_test(name, {letter: storage.join(beside, folder) for letter, folder in sets.items()}, uri))
    return tests


def groups_of(uri: str) -> dict[str, list[str]]:
    """Group -> the URIs of its pictures, by sub-folder. Raises `SourceError` for fewer than two, or an empty one."""
    groups: dict[str, list[str]] = {}
    for entry in storage.walk(uri):
        group, slash, _ = storage.relative_to(uri, entry.uri).partition("/")
        if slash:
            found = groups.setdefault(group, [])
            if entry.uri.lower().endswith(PICTURES):
                found.append(entry.uri)
    if len(groups) < 2:
        raise SourceError(
            f"{uri} has {len(groups)} sub-folders with files: expected one for each of two groups or more"
        )
    for group, pictures in groups.items():
        if not pictures:
            raise SourceError(f"the group {group!r} of {uri} has no pictures: expected {', '.join(PICTURES)}")
    return groups


def _named(uri: str) -> dict[str, dict[str, str]]:
    expected = '{"<test>": {"X": "<folder>", "Y": "<folder>", "A": "<folder>", "B": "<folder>"}}'
    try:
        data = storage.read(uri)
    except NotFound as error:
        raise SourceError(f"no tests at {uri}: expected {expected} ({error})") from error
    try:
        said = json.loads(data)
    except ValueError as error:
        raise SourceError(f"{uri} is not JSON: expected {expected} ({error})") from error
    if not isinstance(said, dict) or not said:
        raise SourceError(f"{uri} names no tests: expected {expected}")
    for name, sets in said.items():
        if (
            not isinstance(sets, dict)
            or sorted(sets) != sorted(SETS)
            or not all(isinstance(f, str) for f in sets.values())
        ):
            raise SourceError(
                f"the test {name!r} of {uri} does not name X, Y, A and B, and no others: expected {expected}"
            )
    return said


def _test(name: str, folders: dict[str, str], where: str) -> Stimuli:
    sets = {}
    for letter, folder in folders.items():
        sets[letter] = [e.uri for e in storage.walk(folder) if e.uri.lower().endswith(PICTURES)]
        if not sets[letter]:
            raise SourceError(
                f"the test {name!r} of {where} has no pictures in {letter}: expected {', '.join(PICTURES)} in {folder}"
            )
    if len(sets["X"]) != len(sets["Y"]):
        raise SourceError(
            f"the test {name!r} of {where} has {len(sets['X'])} pictures in X and {len(sets['Y'])} in Y: the partitions"
            " of iEAT want as many of both; leave some of the larger group out"
        )
    return Stimuli(name, sets)


def read(uri: str, kind: TokenFormat, palette: Palette) -> Tokens:
    """(T,): the evaluation view of a picture, as such a release sees it. Raises `ImageError` naming the file."""
    try:
        return palette.encode(pixels.centre_view(storage.read(uri), kind.n_px, kind.pipeline)).reshape(-1)
    except ImageError as error:
        raise ImageError(f"{uri} cannot be read: {error}; mend it, or take it out of its folder") from error


# ------------------------------------------------------------------------------------------------ who names classes


@dataclass(frozen=True)
class Classifier:
    """Tokens -> classes. `keys` name the pictures, from which a masked network draws its masks."""

    classes: list[str]
    select: Callable[[Tokens, list[str]], NDArray[np.int64]]
    """(N, T) and N keys -> (N,)"""


def classifier(uri: str, kind: TokenFormat, device: str, batch_size: int) -> Classifier:
    """A probe's head, if `uri` is what jobs/probe.py wrote, or else a fine-tuned release, for tokens of a kind.

    Raises `FeatureError` or `CheckpointError` if it is neither, or not for such tokens.
    """
    if storage.exists(storage.join(uri, "classifier.npz")):
        return _probed(uri, kind, device, batch_size)
    about = weights.load_config(uri)
    weights.check_kind(about.kind, kind, "the release that is audited")
    if not about.model.n_class:
        raise CheckpointError(
            f"{uri} has no class head: expected a fine-tuned release, or the out folder of jobs/probe.py"
        )
    model = weights.load_release(uri, device).model

    def select(tokens: Tokens, keys: list[str]) -> NDArray[np.int64]:
        return _likeliest(probabilities(likelihood.class_logits(model, tokens, keys, batch_size)))

    named = about.classes if len(about.classes) == about.model.n_class else map(str, range(about.model.n_class))
    return Classifier(list(named), select)


def _probed(uri: str, kind: TokenFormat, device: str, batch_size: int) -> Classifier:
    """The head, on features of the release that probe.json names; it must still be the one the head was fitted on."""
    try:
        release = json.loads(storage.read(storage.join(uri, "probe.json")))["release"]
    except (ValueError, KeyError) as error:
        raise FeatureError(
            f"{uri}/probe.json is damaged or of another version: repeat jobs/probe.py ({error})"
        ) from error
    head = load_head(uri)
    about = weights.load_config(release)
    weights.check_kind(about.kind, kind, "the release that is audited")
    if about.sha256 != head.release:
        raise FeatureError(
            f"{release} is not the release that {uri}/classifier.npz was fitted on: repeat jobs/probe.py"
        )
    model = features.network(release, device, None, head.precision)

    def select(tokens: Tokens, keys: list[str]) -> NDArray[np.int64]:
        return _likeliest(head.probabilities(model, tokens, keys, batch_size))

    return Classifier(head.classes, select)


def _likeliest(p: NDArray[np.float64]) -> NDArray[np.int64]:
    """Probabilities (N, K), or (N, masks, K) of which the masks vote -> (N,)."""
    return (votes(p) if p.ndim == 3 else p).argmax(1)


# ------------------------------------------------------------------------------------------------ what can be said


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm, 1979): the smallest times m, the next times m - 1, ..., and none
    below the one before it. Those under a level hold together at that level, however the tests depend on another."""
    m, corrected, floor = len(p_values), [0.0] * len(p_values), 0.0
    for rank, i in enumerate(np.argsort(p_values, kind="stable")):
        floor = max(floor, min(1.0, (m - rank) * p_values[i]))
        corrected[int(i)] = floor
    return corrected


class Independence(NamedTuple):
    """Do the groups' distributions over classes differ?"""

    chi_square: float
    p_value: float
    """How often pictures dealt to the groups by chance differ as much."""
    cramers_v: float
    """Effect size: 0 if all groups are finished alike, 1 if the group tells the class."""


def independence(counts: dict[str, Counts], seed: int) -> Independence:
    """Pearson's chi-square over groups of pictures, each with the classes of its completions: (pictures, classes).

    Completions of one picture resemble each other, so a table of completions has fewer degrees of freedom than the
    chi-square distribution supposes. The p-value is by permutation of whole pictures instead (scipy): exact where there
    are few enough ways to deal them. Raises `SettingError` if scipy is missing.
    """
    try:
        from scipy.stats import permutation_test
        from scipy.stats.contingency import association
    except ImportError as error:
        raise SettingError("the audit of completions needs scipy: pip install 'igpt_ray[audit]'") from error
    together = np.concatenate(list(counts.values()))
    chosen = together[:, together.any(0)]  # a class that is never chosen says nothing
    ends = np.cumsum([len(group) for group in counts.values()])
    pictures = np.split(np.arange(len(together)), ends[:-1])
    if chosen.shape[1] == 1:
        return Independence(0.0, 1.0, 0.0)

    def of(*groups: NDArray[np.int64]) -> float:
        return chi_square(np.stack([chosen[group].sum(0) for group in groups]))

    found = permutation_test(
        pictures, of, vectorized=False, n_resamples=SHUFFLES, alternative="greater", rng=np.random.default_rng(seed)
    )
    table = np.stack([chosen[group].sum(0) for group in pictures])
    return Independence(float(found.statistic), float(found.pvalue), float(association(table, "cramer")))


def chi_square(table: Counts) -> float:
    """Pearson's statistic of a table (groups, classes) without empty rows or columns."""
    expected = table.sum(1, keepdims=True) * table.sum(0) / table.sum()
    return float(((table - expected) ** 2 / expected).sum())
