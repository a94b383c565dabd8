"""Work on all cores: in order, with the errors of the work, and one thread for each item."""

from __future__ import annotations

import pytest
import torch

from fedalloy_adapters.bank.cores import MOST_BYTES, on_all_cores


@pytest.mark.parametrize("bytes_each", [0, MOST_BYTES])
def test_results_are_in_order_whoever_was_first(bytes_each: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        found = on_all_cores(lambda item: (item, torch.get_num_threads()), list(range(20)), bytes_each)
        assert found == [(item, 1) for item in range(20)]
        assert torch.get_num_threads() == 3
        with pytest.raises(ZeroDivisionError):
            on_all_cores(lambda item: 1 // item, [1, 0])
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert on_all_cores(lambda item: item, []) == []
