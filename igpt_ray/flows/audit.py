"""The bias audit on a cluster: embeddings of pictures for iEAT, and completions of pictures by group.

<out>/audit.json             effect sizes, p-values as they are and corrected, counts of classes by group
<out>/completions.parquet    group, key, and the tokens and classes of every completion of a picture
"""

import io
import json
import logging
import math
import time
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from igpt_ray import rng, storage, weights
from igpt_ray.data.token_store import Tokens
from igpt_ray.errors import SettingError
from igpt_ray.evaluate import bias, features, ieat
from igpt_ray.evaluate.bias import Stimuli
from igpt_ray.evaluate.config import AuditConfig
from igpt_ray.evaluate.features import Features
from igpt_ray.flows.actor_map import actor_map
from igpt_ray.flows.evaluate import device
from igpt_ray.generate import sampler
from igpt_ray.provenance import provenance

log = logging.getLogger(__name__)

Report = dict[str, Any]


def run_audit(settings: AuditConfig) -> Report:
    """What was asked for of the two, with p-values corrected for the number of all tests. What can be refused by names
    and counts is refused before the first picture is read."""
    started = time.perf_counter()
    about = weights.load_config(settings.release)
    tests, groups, classes = _asked(settings, about)
    layers = _layers(settings, about)
    report: Report = {"release": settings.release, "out": settings.out}
    if tests:
        report["ieat"] = _associations(settings, tests, layers)
    if groups:
        report["completions"] = _finished(settings, groups, classes, about.model.n_px)
    found = [*report.get("ieat", []), *([report["completions"]] if groups else [])]
    for one, corrected in zip(found, bias.holm([one["p_value"] for one in found]), strict=True):
        one["p_holm"] = corrected
    said = {**report, "made_by": provenance(settings)}
    storage.write(storage.join(settings.out, "audit.json"), json.dumps(said, indent=1).encode())
    return {**report, "seconds": round(time.perf_counter() - started, 2)}


def _asked(
    settings: AuditConfig, about: weights.ReleaseConfig
) -> tuple[list[Stimuli], dict[str, list[str]], list[str]]:
    """The tests, the groups, and the names of the classes."""
    if not settings.ieat and not settings.groups:
        raise SettingError("nothing to audit: name --ieat, --groups and --classifier, or all of them")
    if bool(settings.groups) != bool(settings.classifier):
        raise SettingError("--groups and --classifier go together: pictures to complete, and who names what comes out")
    tests = bias.tests_of(settings.ieat) if settings.ieat else []
    if not settings.groups:
        return tests, {}, []
    weights.check_next(about, settings.release)
    if settings.rows is not None and settings.rows > about.model.n_px:
        raise SettingError(f"{settings.rows} rows are given; a picture has {about.model.n_px}")
    classes = bias.classifier(settings.classifier, about.kind, "cpu", settings.batch_size).classes
    return tests, bias.groups_of(settings.groups), classes


def _layers(settings: AuditConfig, about: weights.ReleaseConfig) -> list[int]:
    """The paper's probes find the middle layers best."""
    return features.check_layers(settings.layers or (about.model.n_layer // 2,), about.model.n_layer)


# ------------------------------------------------------------------------------------------------ iEAT


def _associations(settings: AuditConfig, tests: list[Stimuli], layers: list[int]) -> list[Report]:
    """One row for each test and layer; a picture that is in several tests is looked at once."""
    uris = sorted({uri for test in tests for pictures in test.sets.values() for uri in pictures})
    batches = [uris[start : start + settings.batch_size] for start in range(0, len(uris), settings.batch_size)]
    given = {"release": settings.release, "layers": layers, "batch_size": settings.batch_size}
    embedded = np.concatenate(list(actor_map(batches, Embed, given, settings.pool)))  # (pictures, layers, C)
    log.info("%d pictures embedded", len(uris))
    at = {uri: i for i, uri in enumerate(uris)}
    rows = []
    for test in tests:
        chosen = {letter: embedded[[at[uri] for uri in pictures]] for letter, pictures in test.sets.items()}
        n = len(test.sets["X"])
        for i, layer in enumerate(layers):
            X, Y, A, B = (chosen[letter][:, i] for letter in bias.SETS)
            found = ieat.association_test(X, Y, A, B, settings.seed)
            exact = math.comb(2 * n, n) <= ieat.MAX_PARTITIONS
            sizes = {letter: len(pictures) for letter, pictures in test.sets.items()}
            rows.append({"test": test.name, "layer": layer, "pictures": sizes, **found._asdict(), "exact": exact})
    return rows


class Embed:
    """URIs of pictures -> their features (pictures, layers, C), of a masked network the mean over its masks."""

    def __init__(self, release: str, layers: list[int], batch_size: int):
        self.release = weights.load_release(release, device())
        self.layers = layers
        self.batch_size = batch_size

    def __call__(self, uris: list[str]) -> Features:
        kind, palette = self.release.config.kind, self.release.palette
        tokens = np.stack([bias.read(uri, kind, palette) for uri in uris])
        found = features.pooled(self.release.model, tokens, uris, self.layers, "mean", self.batch_size)
        return found.mean(1) if found.ndim == 4 else found


# ------------------------------------------------------------------------------------------------ completions


def _finished(settings: AuditConfig, groups: dict[str, list[str]], classes: list[str], n_px: int) -> Report:
    """Classes of completions by group, with counts, and whether groups differ by more than chance."""
    rows = n_px // 2 if settings.rows is None else settings.rows
    tasks = [(group, storage.relative_to(settings.groups, uri), uri) for group, uris in groups.items() for uri in uris]
    given = {"settings": settings, "given": rows * n_px}
    completions, chosen = zip(*actor_map(tasks, Finish, given, settings.pool), strict=True)
    table = pa.table(
        {
            "group": [group for group, _, _ in tasks],
            "key": [key for _, key, _ in tasks],
            "completions": pa.FixedShapeTensorArray.from_numpy_ndarray(np.stack(completions)),
            "classes": pa.FixedShapeTensorArray.from_numpy_ndarray(np.stack(chosen)),
        }
    )
    data = io.BytesIO()
    pq.write_table(table, data, compression="zstd", write_page_checksum=True)
    storage.write(storage.join(settings.out, "completions.parquet"), data.getvalue())

    of = [np.bincount(c, minlength=len(classes)) for c in chosen]
    counts = {group: np.stack([of[i] for i, task in enumerate(tasks) if task[0] == group]) for group in groups}
    by_group = {group: _distribution(count, classes) for group, count in counts.items()}
    return {"rows": rows, **bias.independence(counts, settings.seed)._asdict(), "groups": by_group}


def _distribution(count: bias.Counts, classes: list[str]) -> Report:
    """(pictures, classes) -> what is said of a group."""
    total = count.sum(0)
    return {
        "pictures": len(count),
        "completions": int(total.sum()),
        "counts": dict(zip(classes, total.tolist(), strict=True)),
        "shares": dict(zip(classes, (total / total.sum()).tolist(), strict=True)),
    }


class Finish:
    """(group, key, URI) of a picture -> its n completions (n, T) uint16, and their classes (n,)."""

    def __init__(self, settings: AuditConfig, given: int):
        self.settings = settings
        self.given = given
        self.release = weights.load_release(settings.release, device())
        kind = self.release.config.kind
        self.classifier = bias.classifier(settings.classifier, kind, device(), settings.batch_size)

    def __call__(self, task: tuple[str, str, str]) -> tuple[Tokens, np.ndarray]:
        _, key, uri = task
        model, n = self.release.model, self.settings.n
        tokens = bias.read(uri, self.release.config.kind, self.release.palette)
        given = torch.from_numpy(tokens[None, : self.given].astype(np.int64)).to(model.wpe.device)
        seeds = [rng.seed_of(self.settings.seed, key, i) for i in range(n)]
        done = sampler.complete(model, given, n, seeds, self.settings.temperature).cpu().numpy().astype(np.uint16)
        return done, self.classifier.select(done, [f"{key} {i}" for i in range(n)])
