"""What a run is expected to cost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.stage_run import Run


def test_without_dropout_a_step_is_expected_to_read_a_labelled_row_once(tiny_task: Callable[..., Path]) -> None:
    run = Run(tiny_task(labelled=6))

    def flops(dropout: float, folds: int) -> float:
        overrides = ["training.batch_size=16", f"training.dropout={dropout}", f"training.folds={folds}"]
        return run.plan(*overrides).find("fit")[0].flops

    assert flops(0.0, 0) == pytest.approx(flops(0.1, 0) * 6 / 16)
    assert flops(0.0, 2) == pytest.approx(flops(0.1, 2) * (6 + 3 + 3) / (3 * 16))
