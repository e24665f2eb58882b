"""Names of one worker's reports, the same on all workers that make the same calls, and what these say of its loop."""

from __future__ import annotations

from raytrain_het.membership.message_parts import LoopProgress


class Keys:
    """``<life>.<step>.<ordinal>``: the ordinal counts the reports that were made at one step.

    A report may be made in the loop's body before its step is committed, and then that step done again: the body's
    reports have the same names the second time.
    """

    def __init__(self) -> None:
        self._last: tuple[int, int] = (0, -1)
        """Life and step of the last report."""
        self._settled = 0
        """Reports at that step that nothing makes again."""
        self._body: object = None
        self._in_body = 0
        """Those made in the body of the step that is open, before its commit."""
        self._reported: str | None = None
        self._began: tuple[int, int] | None = None
        self._step = 0

    def next(self, life: int, step: int, body: object) -> str:
        """The name of the next report; ``body`` is the step that is open and not committed, or None."""
        if self._last != (life, step):
            self._last, self._settled, self._in_body, self._body = (life, step), 0, 0, None
        if body is None:
            ordinal = self._settled + self._in_body
            self._settled, self._in_body, self._body = ordinal + 1, 0, None
        else:
            if body is not self._body:
                self._body, self._in_body = body, 0
            ordinal = self._settled + self._in_body
            self._in_body += 1
        self._reported = f"{life}.{step}.{ordinal}"
        return self._reported

    def begins(self, life: int, step: int) -> None:
        """The loop begins; reports at steps before this one were made without this worker."""
        self._began, self._step = (life, step), step

    def went_on(self, life: int, step: int) -> None:
        """The loop has committed this step."""
        if self._began is None or self._began[0] != life:
            self._began = (life, step)
        self._step = step

    def told(self, *, complete: bool = False) -> LoopProgress | None:
        """See :mod:`raytrain_het.membership.skipped_reports`. None before the loop begins."""
        began, step = self._began, self._step  # Before the last report, which another thread may be making now.
        if began is None:
            return None
        return LoopProgress(life=began[0], began=began[1], step=step, reported=self._reported, complete=complete)
