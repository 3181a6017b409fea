"""Number formats: what training computes in."""

from __future__ import annotations

import pytest
import torch

from pipeline.precision import training_numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_multiplies_in_the_profiles_numbers_and_leaves_the_weights_in_fp32(dtype: torch.dtype) -> None:
    layer = torch.nn.Linear(4, 2)
    with training_numbers(torch.device("cpu"), dtype):
        assert layer(torch.ones(3, 4)).dtype == dtype
    assert layer.weight.dtype == torch.float32
