import torch

from ppo_engine.generation import position_ids


def test_positions_count_real_tokens_only() -> None:
    # Models with rotary positions would not notice a shift of a whole row; others would.
    attention_mask = torch.tensor([[0, 0, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1]])

    found = position_ids(attention_mask.bool())

    assert found.dtype == torch.int64
    assert found[0, 2:5].tolist() == [0, 1, 2]
    assert found[1].tolist() == [0, 1, 2, 3, 4, 5]
    assert found[2, 5].item() == 0
    assert (found >= 0).all()
