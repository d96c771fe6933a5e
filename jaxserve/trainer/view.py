"""How a run shows itself on a terminal, or in a log."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

WINDOW_STEPS = 50
LINE_EVERY_S = 10.0


class Rate:
    """Tokens a second over the last steps."""

    def __init__(self) -> None:
        self._steps: deque[tuple[float, int]] = deque(maxlen=WINDOW_STEPS)

    def add(self, seconds: float, num_tokens: int) -> float:
        """Takes a step in; the rate now."""
        self._steps.append((seconds, num_tokens))
        elapsed_s = sum(one for one, _ in self._steps)
        return sum(tokens for _, tokens in self._steps) / elapsed_s if elapsed_s > 0 else 0.0


class TerminalView:
    """A progress bar on a terminal, a line every 10 s elsewhere; both on standard error."""

    def __init__(
        self, total_steps: int, flops_per_token: int | None = None, peak_flops: float | None = None
    ) -> None:
        """
        Args:
            total_steps: of the run.
            flops_per_token, peak_flops: for the MFU estimate; None: there is none.
        """
        self._console = Console(stderr=True)
        self._total = total_steps
        self._flops_per_token = flops_per_token
        self._peak_flops = peak_flops
        self._rate = Rate()
        self._line_s = 0.0
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("Training", total=total_steps, figures="")

    def __enter__(self) -> TerminalView:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def say(self, text: str, *, warn: bool = False) -> None:
        """One line about what happens."""
        self._console.print(text, style="yellow" if warn else None, markup=False, highlight=False)

    def step(self, metrics: Mapping[str, Any]) -> None:
        """A step is committed."""
        rate = self._rate.add(metrics["seconds"], metrics["num_tokens"])
        figures = (
            f"loss {metrics['loss']:.4f}  lr {metrics['lr']:.2e}  {rate:,.0f} tokens/s"
            f"{self._mfu(rate)}"
        )
        self._bar.update(self._task, completed=metrics["step"] + 1, figures=figures)
        now_s = time.monotonic()
        is_last = metrics["step"] + 1 == self._total
        if self._bar.disable and (is_last or now_s - self._line_s >= LINE_EVERY_S):
            self._line_s = now_s
            self.say(f"step {metrics['step'] + 1}/{self._total}  {figures}")

    def _mfu(self, tokens_per_s: float) -> str:
        if self._peak_flops is None or self._flops_per_token is None:
            return ""
        return f"  MFU {self._flops_per_token * tokens_per_s / self._peak_flops:.1%}"
