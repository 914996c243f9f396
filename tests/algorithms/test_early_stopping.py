"""Early stopping counts evaluations without a lower loss."""

import math

from rayrl.algorithms.early_stopping import EarlyStopping


def counted(patience, losses):
    stopping = EarlyStopping(patience)
    seen = [(stopping.improves(loss), stopping.is_over) for loss in losses]
    return [improves for improves, _ in seen], [is_over for _, is_over in seen], stopping.best_loss


def test_a_training_ends_after_patience_evaluations_in_a_row_without_a_lower_loss():
    improved, is_over, best = counted(2, [3.0, 3.5, 2.0, 2.0, 2.5])
    assert improved == [True, False, True, False, False]
    assert is_over == [False, False, False, False, True]
    assert best == 2.0


def test_a_loss_that_is_not_a_number_is_no_improvement():
    improved, is_over, best = counted(2, [math.nan, math.nan])
    assert improved == [False, False]
    assert is_over == [False, True]
    assert math.isinf(best)


def test_without_patience_a_training_never_ends_early():
    assert not any(counted(None, [1.0, 2.0, 3.0, 4.0])[1])
