"""Batches that the model reads: sequences one behind the other, with the places that predict their responses."""

import torch

from rayrl.data.collate import collate, sequence_batch


def test_sequences_stand_one_behind_the_other():
    batch = collate([[5, 6, 7], [8]], [[1], [2, 3]])
    assert batch.input_ids.tolist() == [5, 6, 7, 1, 8, 2, 3]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert (batch.lengths, batch.num_tokens) == ((4, 3), 7)


def test_response_tokens_are_predicted_by_the_token_before():
    batch = collate([[5, 6, 7], [8]], [[1], [2, 3]])
    assert batch.response_ids.tolist() == [[1, 0], [2, 3]]
    assert batch.response_mask.tolist() == [[True, False], [True, True]]
    assert batch.input_ids[batch.predicting].tolist() == [7, 8, 2]
    assert batch.input_ids[batch.predicting + 1].equal(batch.response_ids[batch.response_mask])


def test_a_token_with_the_padding_id_is_no_padding():
    batch = collate([[0, 0]], [[0]])
    assert batch.lengths == (3,)
    assert batch.response_mask.all()


def test_whole_sequences_have_no_response():
    batch = sequence_batch([[5, 6], [7]])
    assert (batch.lengths, batch.response_ids.shape, len(batch.predicting)) == ((2, 1), (2, 0), 0)


def test_all_tensors_move_together():
    moved = collate([[1]], [[2]]).to(torch.device("meta"))
    assert {value.device.type for value in vars(moved).values() if isinstance(value, torch.Tensor)} == {"meta"}
