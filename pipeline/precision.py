"""Numbers and kernels: fp32 master weights, and what is faster to score in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import transformers
from torch import nn


@contextmanager
def scoring(model: nn.Module, encoder: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Inference with the encoder's weights in a number format; its own weights are back at the end.

    Under autocast every batch would cast the weights anew, and all between the matrix products would stay fp32. The
    head stays fp32, since it decides and costs nothing beside the encoder (`exact_outputs`). Buffers stay as they
    are: rotary embeddings must be computed in fp32.

    Args:
        model: in evaluation mode for as long as the block lasts.
        encoder: the part of it that is most of the work.
        dtype: of the encoder's weights; those that have it already are left alone.
    """
    training = model.training
    own = [(parameter, parameter.data) for parameter in encoder.parameters() if parameter.dtype != dtype]
    model.eval()
    try:
        for parameter, data in own:
            parameter.data = data.to(dtype)
        with torch.inference_mode():
            yield
    finally:
        for parameter, data in own:
            parameter.data = data
        model.train(training)


def training_numbers(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Autocast to bf16 where the profile asks for it, for passes that are trained through; master weights stay fp32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)


def exact_outputs(encoder: nn.Module) -> None:
    """Let an encoder hand fp32 to the head, whatever it computes in."""

    def to_float(module: nn.Module, inputs: Any, output: Any) -> Any:
        for name in ("last_hidden_state", "pooler_output"):
            if output.get(name) is not None:
                output[name] = output[name].float()
        return output

    encoder.register_forward_hook(to_float)


def attention_for(device: torch.device) -> dict[str, str]:
    """The choice of attention kernel, for `from_pretrained`; where nothing is chosen the library knows best.

    On a CPU eager attention's backward pass beats scaled-dot-product attention's at these lengths. On CUDA that of
    cuDNN, which torch prefers on Hopper and its kin, is switched off for the process: it builds a plan for each shape,
    and nearly every batch has one of its own (docs/benchmarks.md, "On a GPU").
    """
    if device.type == "cpu":
        return {"attn_implementation": "eager"}
    torch.backends.cuda.enable_cudnn_sdp(False)
    return {}


@contextmanager
def silent_loading() -> Iterator[None]:
    """Keep transformers' report of weights, and its bar, from the screen: what is missing is ours to tell."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
