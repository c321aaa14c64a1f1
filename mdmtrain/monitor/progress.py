"""The progress of training: one updated line on a terminal, plain lines elsewhere."""

import sys
import time

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from mdmtrain.monitor.logs import log


class TrainingProgress:
    """Prints the progress of a run, on rank 0.

    It shows the step, percentage, loss, bits/byte (if the loss estimates them), tokens/s, MFU (if the GPU is known),
    the largest peak memory of any rank, the share of the time spent waiting for data, and the remaining time.
    """

    def __init__(self, first_step: int, steps: int, bits_per_nat: float | None, visible: bool):
        """visible: print anything at all.

        bits_per_nat: converts nats per eligible token to bits per byte. None: the training loss is neither the NELBO
        nor the next-token loss, so its bits per byte would be no bound.
        """
        self._first = first_step
        self._steps = steps
        self._bits_per_nat = bits_per_nat
        self._visible = visible
        self._bar: Progress | None = None

    def start(self) -> None:
        """Call when the steps begin. The remaining time is computed from here on."""
        self._start = time.monotonic()
        if self._visible and sys.stdout.isatty():
            done = TextColumn("step {task.completed}/{task.total}")
            numbers = TextColumn("{task.fields[numbers]}")
            self._bar = Progress(done, BarColumn(), TaskProgressColumn(), numbers)
            self._bar.start()
            self._task = self._bar.add_task("train", total=self._steps, completed=self._first, numbers="starting")

    def update(self, record: dict) -> None:
        """Show the newest training record."""
        if not self._visible:
            return
        step = record["step"]
        loss = "not finite"
        if record["loss"] is not None:
            loss = f"{record['loss']:.4f}"
            if self._bits_per_nat is not None:
                loss += f"  bits/byte {record['nelbo'] * self._bits_per_nat:.3f}"
        seconds_per_step = (time.monotonic() - self._start) / (step - self._first)
        left = round(seconds_per_step * (self._steps - step))
        numbers = f"loss {loss}  {record['tokens_per_second']:,.0f} tokens/s"
        if record["mfu"] is not None:
            numbers += f"  MFU {record['mfu']:.1%}"
        numbers += f"  memory {record['memory_gib']:.1f} GiB  data wait {record['data_wait']:.1%}"
        numbers += f"  ETA {left // 60}:{left % 60:02d}"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, numbers=numbers)
            return
        print(f"step {step}/{self._steps}  {step / self._steps:.0%}  {numbers}", flush=True)

    def note(self, text: str) -> None:
        """Print a permanent line, and write it to the log."""
        if not self._visible:
            return
        log.info("%s", text)
        if self._bar is not None:
            self._bar.console.print(text, highlight=False)
        else:
            print(text, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
