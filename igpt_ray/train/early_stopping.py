"""Early stopping on held-out accuracy, for fine-tuning.

The state is two values that change only at an evaluation, so the check that the training loop makes at every step does
not depend on how many lines of metrics a run has.
"""

from collections.abc import Iterable

from igpt_ray.train.metrics import Line


class EarlyStopping:
    """Tracks the best held-out accuracy; ties keep the earlier evaluation, whose weights are the release.

    `patience` is the number of evaluations without a new best after which training should stop; None disables early
    stopping, as in pretraining. `lines` are the metrics of a run that is resumed. Every rank holds the same state.
    """

    def __init__(self, patience: int | None, lines: Iterable[Line] = ()):
        self.patience = patience
        self.best: Line | None = None
        self.evaluations_since_best = 0
        for line in lines:
            self.observe(line)

    def observe(self, line: Line) -> bool:
        """Record a line of metrics. Returns whether it is an evaluation with a new best `val_accuracy`."""
        if self.patience is None or "val_accuracy" not in line:
            return False
        if self.best is None or line["val_accuracy"] > self.best["val_accuracy"]:
            self.best, self.evaluations_since_best = line, 0
            return True
        self.evaluations_since_best += 1
        return False

    @property
    def should_stop(self) -> bool:
        return self.patience is not None and self.best is not None and self.evaluations_since_best >= self.patience
