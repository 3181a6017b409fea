"""Number formats and kernels: what training computes in."""

from __future__ import annotations

import pytest
import torch

from pipeline.precision import attention_for, training_numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_multiplies_in_the_profiles_numbers_and_leaves_the_weights_in_fp32(dtype: torch.dtype) -> None:
    layer = torch.nn.Linear(4, 2)
    with training_numbers(torch.device("cpu"), dtype):
        assert layer(torch.ones(3, 4)).dtype == dtype
    assert layer.weight.dtype == torch.float32


def test_a_model_on_cuda_never_takes_the_attention_that_is_planned_anew_for_each_shape() -> None:
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        attention_for(torch.device("cpu"))
        assert torch.backends.cuda.cudnn_sdp_enabled()
        attention_for(torch.device("cuda"))
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
