"""The bias audit with Ray Data: embeddings of images for iEAT, and completions of images by group.

<out>/audit.json             effect sizes, p-values with and without correction, counts of classes by group
<out>/completions.parquet    group, key, and the tokens and classes of the completions of every image
"""

import io
import json
import logging
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from igpt_ray import rng, storage, weights
from igpt_ray.data.token_format import Tokens
from igpt_ray.errors import SettingError
from igpt_ray.evaluate import bias, features, ieat
from igpt_ray.evaluate.bias import Stimuli
from igpt_ray.evaluate.config import AuditConfig
from igpt_ray.evaluate.features import Features
from igpt_ray.flows.actor_map import actor_map
from igpt_ray.flows.device import assigned_device
from igpt_ray.generate import completion
from igpt_ray.provenance import provenance
from igpt_ray.settings import Result

log = logging.getLogger(__name__)


class Significance(Result):
    """A test of the audit."""

    p_value: float
    p_holm: float | None = None
    """Corrected for the number of all tests (Holm)."""


class AssociationTest(Significance):
    """An iEAT test of the features of a layer."""

    test: str
    layer: int
    pictures: dict[str, int]
    """Number of images in X, Y, A and B."""
    effect_size: float
    """Between -2 and 2; positive if X goes with A and Y with B."""
    exact: bool
    """Whether the p-value counts all partitions instead of a sample."""


class Distribution(Result):
    """Classes of the completions of a group."""

    pictures: int
    completions: int
    counts: dict[str, int]
    shares: dict[str, float]


class CompletionsTest(Significance):
    """Test of whether the groups differ in the classes of their completions."""

    rows: int
    """Rows of the prompt."""
    chi_square: float
    cramers_v: float
    """Effect size: 0 for equal distributions, 1 if the group determines the class."""
    groups: dict[str, Distribution]


class AuditReport(Result):
    release: str
    out: str
    ieat: list[AssociationTest] | None = None
    completions: CompletionsTest | None = None


def run_audit(settings: AuditConfig) -> AuditReport:
    """Run iEAT, the audit of completions, or both, with p-values corrected for the number of all tests.

    Raises `SettingError` or `SourceError` before any image is read if settings, folders or counts are wrong.
    """
    config = weights.load_config(settings.release)
    tests, groups, classes = _inputs(settings, config)
    # Probes of the middle layers are the most accurate (paper, section 4.1).
    layers = features.check_layers(settings.layers or (config.model.n_layer // 2,), config.model.n_layer)
    report = AuditReport(release=settings.release, out=settings.out)
    if tests:
        report.ieat = _ieat(settings, tests, layers)
    if groups:
        report.completions = _completions(settings, groups, classes, config.model.n_px)
    results: list[Significance] = [*(report.ieat or []), *([report.completions] if report.completions else [])]
    for result, corrected in zip(results, bias.holm([result.p_value for result in results]), strict=True):
        result.p_holm = corrected
    data = json.dumps({**report.line(), "made_by": provenance(settings)}, indent=1).encode()
    storage.write(storage.join(settings.out, "audit.json"), data)
    return report


def _inputs(
    settings: AuditConfig, config: weights.ReleaseConfig
) -> tuple[list[Stimuli], dict[str, list[str]], list[str]]:
    """The iEAT tests, the groups of images, and the names of the classes."""
    if not settings.ieat and not settings.groups:
        raise SettingError("nothing to audit: set --ieat, or --groups and --classifier, or all of them")
    if bool(settings.groups) != bool(settings.classifier):
        raise SettingError("--groups and --classifier go together: set both, or neither")
    tests = bias.load_tests(settings.ieat) if settings.ieat else []
    if not settings.groups:
        return tests, {}, []
    weights.check_next(config, settings.release)
    if settings.rows is not None and settings.rows > config.model.n_px:
        raise SettingError(f"--rows {settings.rows} exceeds the {config.model.n_px} rows of an image")
    classes = bias.load_classifier(settings.classifier, config.kind, "cpu", settings.batch_size).classes
    return tests, bias.load_groups(settings.groups), classes


# ------------------------------------------------------------------------------------------------ iEAT


def _ieat(settings: AuditConfig, tests: list[Stimuli], layers: list[int]) -> list[AssociationTest]:
    """One row per test and layer. An image of several tests is embedded once."""
    uris = sorted({uri for test in tests for images in test.sets.values() for uri in images})
    batches = [uris[start : start + settings.batch_size] for start in range(0, len(uris), settings.batch_size)]
    arguments = {"release": settings.release, "layers": layers, "batch_size": settings.batch_size}
    embedded = np.concatenate(list(actor_map(batches, Embed, arguments, settings.pool)))  # (images, layers, C)
    log.info("%d images embedded", len(uris))
    indices = {uri: i for i, uri in enumerate(uris)}
    rows = []
    for test in tests:
        sets = {letter: embedded[[indices[uri] for uri in images]] for letter, images in test.sets.items()}
        sizes = {letter: len(images) for letter, images in test.sets.items()}
        exact = math.comb(2 * sizes["X"], sizes["X"]) <= ieat.MAX_PARTITIONS
        for i, layer in enumerate(layers):
            X, Y, A, B = (sets[letter][:, i] for letter in bias.SETS)
            result = ieat.association_test(X, Y, A, B, settings.seed)
            figures = {"layer": layer, "pictures": sizes, "exact": exact, **result._asdict()}
            rows.append(AssociationTest(test=test.name, **figures))
    return rows


class Embed:
    """URIs of images -> features (images, layers, C), averaged over the masks of a masked network."""

    def __init__(self, release: str, layers: list[int], batch_size: int):
        self.release = weights.load_release(release, assigned_device())
        self.layers = layers
        self.batch_size = batch_size

    def __call__(self, uris: list[str]) -> Features:
        kind, palette = self.release.config.kind, self.release.palette
        tokens = np.stack([bias.read_tokens(uri, kind, palette) for uri in uris])
        pooled = features.pooled(self.release.model, tokens, uris, self.layers, "mean", self.batch_size)
        return pooled.mean(1) if pooled.ndim == 4 else pooled


# ------------------------------------------------------------------------------------------------ completions


def _completions(settings: AuditConfig, groups: dict[str, list[str]], classes: list[str], n_px: int) -> CompletionsTest:
    """Counts of classes of the completions by group, and the test of whether the groups differ."""
    rows = n_px // 2 if settings.rows is None else settings.rows
    tasks = [(group, storage.relative_to(settings.groups, uri), uri) for group, uris in groups.items() for uri in uris]
    arguments = {"settings": settings, "prompt_length": rows * n_px}
    completions, predicted = zip(*actor_map(tasks, CompleteAndClassify, arguments, settings.pool), strict=True)
    table = pa.table(
        {
            "group": [group for group, _, _ in tasks],
            "key": [key for _, key, _ in tasks],
            "completions": pa.FixedShapeTensorArray.from_numpy_ndarray(np.stack(completions)),
            "classes": pa.FixedShapeTensorArray.from_numpy_ndarray(np.stack(predicted)),
        }
    )
    data = io.BytesIO()
    pq.write_table(table, data, compression="zstd", write_page_checksum=True)
    storage.write(storage.join(settings.out, "completions.parquet"), data.getvalue())

    by_image = [np.bincount(row, minlength=len(classes)) for row in predicted]
    counts = {
        group: np.stack([row for row, task in zip(by_image, tasks, strict=True) if task[0] == group])
        for group in groups
    }
    by_group = {group: _distribution(count, classes) for group, count in counts.items()}
    return CompletionsTest(rows=rows, groups=by_group, **bias.independence(counts, settings.seed)._asdict())


def _distribution(count: bias.Counts, classes: list[str]) -> Distribution:
    """Counts (images, classes) of a group -> its totals and fractions."""
    total = count.sum(0)
    return Distribution(
        pictures=len(count),
        completions=int(total.sum()),
        counts=dict(zip(classes, total.tolist(), strict=True)),
        shares=dict(zip(classes, (total / total.sum()).tolist(), strict=True)),
    )


class CompleteAndClassify:
    """(group, key, URI) of an image -> its n completions (n, T) uint16, and their classes (n,)."""

    def __init__(self, settings: AuditConfig, prompt_length: int):
        self.settings = settings
        self.prompt_length = prompt_length
        self.release = weights.load_release(settings.release, assigned_device())
        kind = self.release.config.kind
        self.classifier = bias.load_classifier(settings.classifier, kind, assigned_device(), settings.batch_size)

    def __call__(self, task: tuple[str, str, str]) -> tuple[Tokens, np.ndarray]:
        _, key, uri = task
        model, n = self.release.model, self.settings.n
        tokens = bias.read_tokens(uri, self.release.config.kind, self.release.palette)
        prompt = torch.from_numpy(tokens[None, : self.prompt_length].astype(np.int64)).to(model.wpe.device)
        seeds = [rng.seed_of(self.settings.seed, key, i) for i in range(n)]
        completions = (
            completion.complete(model, prompt, n, seeds, self.settings.temperature).cpu().numpy().astype(np.uint16)
        )
        return completions, self.classifier.select(completions, [f"{key} {i}" for i in range(n)])
