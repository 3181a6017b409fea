"""What a run is expected to cost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.stage_run import Run


def test_without_dropout_a_step_is_expected_to_read_a_labelled_row_once(tiny_task: Callable[..., Path]) -> None:
    run = Run(tiny_task(labelled=6))

    def flops(dropout: float) -> float:
        return run.plan("training.batch_size=16", f"training.dropout={dropout}").find("fit")[0].flops

    assert flops(0.0) == pytest.approx(flops(0.1) * 6 / 16)
