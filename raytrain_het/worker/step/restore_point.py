"""What a step begins from, and goes back to if it is done again."""

from __future__ import annotations

from typing import Any

from raytrain_het.membership.cursor import Cursor
from raytrain_het.worker.checks.hand_edits import HandEdits
from raytrain_het.worker.checks.unsupported import refuse
from raytrain_het.worker.state.randomness import Randomness
from raytrain_het.worker.state.replica import Replica
from raytrain_het.worker.step.rates import Rates


class RestorePoint:
    """The light part of a worker's state (buffers, registered objects, the optimizer's settings) at a step's opening.

    Parameters and the optimizer's state change in an update only, which is committed; what the loop's body does to
    parameters by hand is taken back too.

    Args:
        replica: model, optimizer and registered objects.
        randomness: whose random numbers are drawn when.
        rates: the run's schedule; None where the program sets the learning rate.
    """

    def __init__(self, replica: Replica, randomness: Randomness, rates: Rates | None) -> None:
        self.replica, self.randomness = replica, randomness
        self._rates = rates
        self._edits = HandEdits([p for _, p in replica.named_parameters()])
        self._light: dict[str, Any] | None = None
        self.is_due = False
        """Whether the next step to be opened is the one that was given up."""

    @property
    def light(self) -> dict[str, Any]:
        """What the step under way began from: see :meth:`Replica.light`.

        Raises:
            KeyError: no step was opened yet.
        """
        if self._light is None:
            raise KeyError("no step was opened yet")
        return self._light

    def begin(self, cursor: Cursor) -> bool:
        """A step opens: go back, if it is done again, and keep what it begins from.

        Returns:
            Whether it is done again.

        Raises:
            NotSupportedError: parameters were changed by hand in a failed step, and there is no copy of them.
        """
        before = self._light if self.is_due else None
        if self.is_due and not self._edits.take_back():
            raise refuse("weights changed in a failed step", f"it was step {cursor.step + 1}")
        if before is not None:
            self.replica.restore_light(before)
        if self._rates is not None:
            self._rates.set(self.replica.optimizer, cursor)
        self._light, self.is_due = before or self.replica.light(), False
        return before is not None

    def begin_passes(self, num_passes: int) -> None:
        """The step's slice is cut: so many runs of the loop's body."""
        self._edits.step_begins(num_passes)

    def between_passes(self) -> None:
        """The loop's body runs once for each pass: what it does to schedules and parameters counts once."""
        self.replica.restore_light(self.light, buffers=False)
        self._edits.take_back()

    def step_failed(self) -> None:
        """The step will be done again: what the body does from here on is taken back too."""
        self._edits.step_fails()

    def do_again(self) -> None:
        """The next step to be opened is the one that was just given up."""
        self.is_due = True

    def take_over(self, light: dict[str, Any] | None) -> None:
        """A worker that has come in the middle of an epoch: what its program has just done at the epoch's beginning (a
        scheduler's step, draws) was done before."""
        if light is not None:
            self.replica.restore_light(light, buffers="buffers" in light)
            self.randomness.load(light["random"])

    def settings(self) -> dict[str, Any]:
        """What a checkpoint in the middle of an epoch has brought: for :meth:`take_over`, after the program has done
        what it does at an epoch's beginning."""
        light = self.replica.light()
        brought = {name: light[name] for name in ("registered", "hyperparameters")}
        return brought | {"random": self.randomness.state()}

    def forget(self) -> None:
        """The worker has another state now: what a step to be done again would go back to is no longer its
        beginning."""
        self.is_due = False
