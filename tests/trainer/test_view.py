"""What a run shows of itself."""

from __future__ import annotations

import pytest

from jaxserve.trainer.view import TerminalView

METRICS = {"step": 0, "loss": 2.5, "lr": 1e-3, "seconds": 2.0, "num_tokens": 1000}


def test_utilization_is_shown_when_the_peak_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    with TerminalView(1, flops_per_token=6_000_000, peak_flops=12e9) as view:
        view.step(METRICS)  # 500 tokens/s of 6 million operations: 3 of 12 GFLOP/s.
    said = capsys.readouterr().err
    assert "loss 2.5000" in said
    assert "500 tokens/s  MFU 25.0%" in " ".join(said.split("\n"))


def test_utilization_is_not_guessed(capsys: pytest.CaptureFixture[str]) -> None:
    with TerminalView(1) as view:
        view.step(METRICS)
    assert "MFU" not in capsys.readouterr().err
