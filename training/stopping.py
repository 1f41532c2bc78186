"""Stops a training between two steps when the machine, or its user, asks for it."""

from __future__ import annotations

import signal
from typing import Any

import torch
from transformers import TrainerCallback

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopOnSignal(TrainerCallback):
    """On SIGTERM or Ctrl-C, finishes the current step, saves a checkpoint and stops; a second Ctrl-C stops at once.

    Several processes all stop after the same step, whichever of them got the signal. (transformers' own
    ``enable_jit_checkpoint`` may save in the middle of a step, and a resumed run would then differ.)

    Attributes:
        received: The signal's number; 0 as long as there was none.
    """

    def __init__(self) -> None:
        self.received = 0
        self._previous: dict[int, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Installs the signal handlers."""
        self._previous = {number: signal.signal(number, self._receive) for number in SIGNALS}

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Restores the signal handlers of before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Asks for a checkpoint and the end of training if a signal has come in."""
        if args.world_size > 1:
            received = torch.tensor(self.received, device=args.device)
            torch.distributed.all_reduce(received, torch.distributed.ReduceOp.MAX)
            self.received = int(received)
        if self.received:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def _receive(self, number: int, frame: Any) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
        print("\nstopping after this step; a checkpoint is written", flush=True)
