"""Batches that the model reads: prompts end and responses begin in one column, and padding is masked."""

import torch

from rayrl.data.collate import collate


def test_prompts_are_padded_left_and_responses_right():
    batch = collate([[5, 6, 7], [8]], [[1], [2, 3]])
    assert batch.input_ids.tolist() == [[5, 6, 7, 1, 0], [0, 0, 8, 2, 3]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 0], [0, 0, 1, 1, 1]]
    assert batch.response_ids.tolist() == [[1, 0], [2, 3]]
    assert batch.response_mask.tolist() == [[True, False], [True, True]]


def test_positions_count_real_tokens_only():
    batch = collate([[5, 6, 7], [8]], [[1], [2, 3]])
    real = [row[mask.bool()].tolist() for row, mask in zip(batch.position_ids, batch.attention_mask, strict=True)]
    assert real == [[0, 1, 2, 3], [0, 1, 2]]
    assert int(batch.position_ids.min()) == 0


def test_a_token_with_the_padding_id_is_no_padding():
    batch = collate([[0, 0]], [[0]])
    assert batch.attention_mask.tolist() == [[1, 1, 1]]
    assert batch.response_mask.all()


def test_all_tensors_move_together():
    moved = collate([[1]], [[2]]).to(torch.device("meta"))
    assert {tensor.device.type for tensor in vars(moved).values()} == {"meta"}
