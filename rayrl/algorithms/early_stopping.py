"""Early stopping of a training by its loss on held-out rows (Prechelt 1998, doi 10.1007/3-540-49430-8_3)."""

import math
from dataclasses import dataclass


@dataclass
class EarlyStopping:
    """The lowest loss so far, and how many evaluations in a row have not come below it."""

    patience: int | None
    """Evaluations in a row without a lower loss that end the training; None does not end it."""
    best_loss: float = math.inf
    num_worse: int = 0

    def improves(self, loss: float) -> bool:
        """Count an evaluation, and return whether its loss is the lowest so far; one that is not a number never is."""
        is_best = loss < self.best_loss
        if is_best:
            self.best_loss = loss
        self.num_worse = 0 if is_best else self.num_worse + 1
        return is_best

    @property
    def is_over(self) -> bool:
        """True once so many evaluations in a row were no better that the training has to stop."""
        return self.patience is not None and self.num_worse >= self.patience
