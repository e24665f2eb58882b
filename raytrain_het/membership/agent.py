"""A member's side of membership: one connection to the hub, answered whatever the training thread does."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from raytrain_het.errors import EvictedError, HetError, ReplicaMismatchError, RunFailedError
from raytrain_het.membership.cursor import Cursor
from raytrain_het.membership.message_parts import Address, Known, LoopProgress
from raytrain_het.membership.out_of_reach import out_of_reach
from raytrain_het.membership.place import Doing
from raytrain_het.membership.points import StepPoints
from raytrain_het.membership.protocol import (
    Answer,
    Bye,
    Checkpoint,
    End,
    Evaluate,
    Evicted,
    Fail,
    Failed,
    Formed,
    Hello,
    Meet,
    Message,
    Mismatch,
    Ping,
    Pong,
    Reply,
    Suspect,
    ToMember,
    Void,
    Waiting,
    Want,
)
from raytrain_het.membership.record import Member, Record
from raytrain_het.membership.wire import Connection, connect

logger = logging.getLogger("raytrain_het")

FIRST_INQUIRY_S = 0.5


class RunOver(BaseException):
    """Unwinds the training function of a worker that is no longer needed. Not an error."""


class MemberAgent:
    """Holds what this member knows of the run, under one condition that every waiting thread shares.

    ``commit_lock`` orders two things: committing a step, and answering to a generation that is being formed. Once this
    member has answered, nothing of the old generation commits. The reader thread waits for this lock only to say hello.
    If a commit is under way when a void is read, the committing thread answers when it is done.

    Args:
        member: who this is.
        locate: says where the hub is; asked again whenever the connection is lost.
        fingerprint: of what all members must have alike.
        hang_limit_s: a member that does not reach the hub for so long goes by itself.
        points: told when this member's threads reach the points of a step.
    """

    def __init__(
        self,
        member: Member,
        locate: Callable[[], dict[str, Any]],
        *,
        fingerprint: str = "",
        hang_limit_s: float = 600.0,
        points: StepPoints | None = None,
    ) -> None:
        self._hang_limit_s = hang_limit_s
        self.member = member
        self.points = points or StepPoints()
        self.uid = member.uid
        self.condition = threading.Condition()
        self.commit_lock = threading.Lock()
        self.record: Record | None = None
        self.cursor = Cursor()
        self.healed = self.fresh = False
        self.want = 0
        """Highest generation number that this member was told of; it travels in step headers."""
        self.void = 0
        """Highest generation number for which the current one was declared void."""
        self.answered = 0
        """Highest generation number answered to: nothing older commits any more."""
        self.gone: BaseException | None = None
        """Why this member is no part of the run any more."""
        self.failing: BaseException | None = None
        self.finished = False
        self.heir: Address | None = None
        """The state server of the member that takes over this one's residual; known once this member was let go."""
        self.position: Callable[[], int] = lambda: 0
        """How far this member is in its collectives: the larger, the further."""
        self.doing = Doing()
        self.loop_progress: Callable[[], LoopProgress | None] = lambda: None
        """How far the training loop is, and what it has reported. It shows the hub who leaves a report out."""
        self.batch: Callable[[], list[int] | None] = lambda: None
        """``[epoch, first sample, samples]`` of the step that is open."""
        self.checkpoint: str | None = None
        """The newest that the hub knows of. Every member does, so that a new hub learns of it from any of them."""
        self.checkpoint_cursor: Cursor | None = None
        self.known: Known | None = None
        """This worker's profile, and the global batch size it is meant for; None where speeds do not matter."""
        self.on_token: Callable[[str], None] = lambda token: None
        """Told the run's token, each time that the hub was found."""
        self.on_reconnect: list[Callable[[], None]] = []
        self.on_change: Callable[[], None] = lambda: None
        """Called after anything here has changed, for a thread that waits elsewhere."""
        self.on_message: dict[type[Message], Callable[[Any], None]] = {}
        self._fingerprint = fingerprint
        self._locate = locate
        self._connection: Connection | None = None
        self._closing = False
        self._replies: dict[int, Reply | None] = {}
        """By request that somebody waits for; a reply that comes later is dropped."""
        self._next_id = 0
        self._failed = (0, "")
        self._thread = threading.Thread(target=self._read, name="het-member", daemon=True)
        self._training = 0
        """Id of the thread that runs the training function."""
        self._waits = False

    # ---------------------------------------------------------------- what the other threads ask

    def join(self) -> None:
        """Connect and say hello. The calling thread is the one that trains."""
        self._training = threading.get_ident()
        self._thread.start()

    def check(self) -> None:
        """Raise if this member is no part of the run any more."""
        if self.gone is not None:
            raise self.gone

    def is_current(self, generation: int) -> bool:
        """Whether that generation is in force and may still commit."""
        record = self.record
        return record is not None and record.number == generation and self.answered <= generation >= self.void

    def wait_for(self, predicate: Callable[[], Any], timeout: float | None = None) -> bool:
        """Wait on the shared condition until the predicate holds. Raises if this member is out."""
        trains = threading.get_ident() == self._training
        with self.condition:
            self._waits = self._waits or trains
            try:
                self.condition.wait_for(lambda: self.gone is not None or predicate(), timeout)
            finally:
                self._waits = self._waits and not trains
            self.check()
            return bool(predicate())

    @contextlib.contextmanager
    def committing(self, generation: int) -> Iterator[bool]:
        """Hold the right to commit a step of that generation; yields whether it is still there."""
        with self.commit_lock:
            yield self.is_current(generation)
        with self.condition:  # The cursor has moved: somebody may wait for that.
            self.condition.notify_all()
        self._answer_if_void()

    def wait_for_peers(self, predicate: Callable[[], Any]) -> None:
        """Wait for what other members do outside of a collective, where nobody else would notice a silent one."""
        impatience = Impatience(self)
        while not self.wait_for(predicate, timeout=FIRST_INQUIRY_S):
            impatience.tell()

    def advance(self, cursor: Cursor, *, healed: bool | None = None, fresh: bool | None = None) -> None:
        """Record a commit (or a load). The caller holds ``commit_lock``."""
        self.cursor = cursor
        self.healed = self.healed if healed is None else healed
        self.fresh = self.fresh if fresh is None else fresh

    def answer_want(self, number: int) -> None:
        """Answer to a wanted generation: a step's headers show that all members will, and the step is committed."""
        with self.commit_lock:
            self._answer(number)
        self._answer_if_void()

    def failed(self, generation: int, reason: str) -> None:
        """Tell the hub that a collective of that generation has failed."""
        if generation > self._failed[0]:
            self._failed = (generation, reason)
            self._send(Failed(generation=generation, reason=reason))

    def suspect(self, generation: int, step: int) -> None:
        """Tell the hub that a collective takes longer than it should."""
        self._send(Suspect(generation=generation, step=step))

    def tell(self, message: Message) -> None:
        """Send a message that needs no reply; a lost connection drops it."""
        self._send(message)

    def request(self, question: Evaluate) -> Reply | None:
        """Send a message and wait for its reply; None if the connection was lost meanwhile."""
        with self.condition:
            self._next_id += 1
            number = self._next_id
            self._replies[number] = None
            connection = self._connection
        try:
            if not self._send(msgspec.structs.replace(question, id=number)):
                self.wait_for(lambda: self._connection is not connection, 1.0)
                return None
            self.wait_for_peers(lambda: self._replies[number] is not None or self._connection is not connection)
        finally:
            reply = self._replies.pop(number)
        return reply

    def close(self) -> None:
        """End the connection for good."""
        self._closing = True
        if self._connection is not None:
            self._connection.close()

    # ---------------------------------------------------------------- the reader thread

    def _read(self) -> None:
        try:
            self._stay_connected()
        except Exception as error:
            logger.exception("the thread that listens to the membership actor has failed")
            gone = RunFailedError(
                f"worker {self.member.slot} does not hear the membership actor any more: its listening thread has "
                f"failed with {type(error).__name__}: {error}"
            )
            gone.__cause__ = error
            self._leave_with(gone)
        finally:
            # Nobody answers pings from here on. The hub must take this member for dead, and not for silent.
            if self._connection is not None:
                self._connection.close()

    def _stay_connected(self) -> None:
        since = time.monotonic()
        while not self._closing:
            try:
                # The hub listens on every address; each try asks anew where it is, since it may have been restarted.
                where = self._locate()
                connection = connect(where["host"], where["port"], where["token"])
                self.on_token(where["token"])
                self._greet(connection)
            except Exception as error:
                logger.debug("the hub is not reached", exc_info=True)
                if (gone := out_of_reach(self, time.monotonic() - since, self._hang_limit_s, error)) is not None:
                    self._leave_with(gone)
                    return
                time.sleep(0.05)
                continue
            if self.record is not None and self._failed[0] == self.record.number:
                # This message may have been lost with the last connection. Nobody tries that generation's group again.
                self._send(Failed(generation=self._failed[0], reason=self._failed[1]))
            for tell in self.on_reconnect:
                tell()
            for message in connection.messages():
                self._handle(message)
            since = time.monotonic()
            with self.condition:
                self._connection = None
                self.condition.notify_all()
            if self.gone is not None:
                return

    def _greet(self, connection: Connection) -> None:
        """Say hello, and speak through this connection from now on.

        One lock is held meanwhile: so every change is either in the hello or is told after it.
        """
        with self.commit_lock:
            try:
                connection.send(self._hello())
            except OSError:
                connection.close()
                raise
            with self.condition:
                self._connection = connection
                self.condition.notify_all()

    def _hello(self) -> Hello:
        return Hello(
            member=self.member,
            cursor=self.cursor,
            healed=self.healed,
            fresh=self.fresh,
            record=self.record,
            answered=self.answered,
            want=self.want,
            fingerprint=self._fingerprint,
            checkpoint=self.checkpoint,
            checkpoint_cursor=self.checkpoint_cursor,
            known=self.known,
        )

    def _handle(self, message: ToMember | Meet) -> None:
        if isinstance(message, Ping):
            self._send(Pong(position=self.position(), place=self.doing.place(self._waits), told=self.loop_progress()))
            return
        if type(message) in self.on_message:
            self.on_message[type(message)](message)
            return
        with self.condition:
            self._apply(message)
            self.condition.notify_all()
        self.on_change()
        if isinstance(message, Void):
            self._answer_if_void()

    def _apply(self, message: ToMember | Meet) -> None:
        match message:
            case Want(number=number):
                self.want = max(self.want, number)
            case Void(number=number):
                self.want, self.void = max(self.want, number), max(self.void, number)
            case Formed(record=record):
                if self.record is None or record.number > self.record.number:
                    self.record = record
                    self.want = max(self.want, record.number)
            case Checkpoint(path=path, cursor=cursor):
                self.checkpoint, self.checkpoint_cursor = path, cursor
            case Reply(id=number):
                if number in self._replies:
                    self._replies[number] = message
            case Evicted(reason=reason):
                self.gone = EvictedError(f"worker {self.member.slot} was dropped from the run: {reason}")
            case Mismatch(message=text):
                self.gone = ReplicaMismatchError(text)
            case Fail(message=text, poison=poison):
                self.failing = self.gone = RunFailedError(text, msgspec.structs.asdict(poison) if poison else None)
            case Bye(heir=heir):
                self.heir, self.finished, self.gone = heir, True, RunOver()
            case End():
                self.finished, self.gone = True, RunOver()

    def _answer_if_void(self) -> None:
        """Answer to a void, unless a commit is under way: then the committing thread comes here when it is done."""
        while self.void > self.answered and self.commit_lock.acquire(blocking=False):
            try:
                self._answer(self.void)
            finally:
                self.commit_lock.release()

    def _answer(self, number: int) -> None:
        if number <= self.answered:
            return
        with self.condition:
            self.answered = number
            self.condition.notify_all()
        self.on_change()
        self._send(Answer(number=number, cursor=self.cursor, healed=self.healed, fresh=self.fresh, batch=self.batch()))

    def _send(self, message: Message) -> bool:
        connection = self._connection
        if connection is None:
            return False
        try:
            connection.send(message)
        except OSError:
            return False
        return True

    def _leave_with(self, error: HetError) -> None:
        with self.condition:
            self.gone = self.gone or error
            self.condition.notify_all()
        self.on_change()


class Impatience:
    """Asks the hub now and again, while a wait lasts, whether all members still answer."""

    def __init__(self, agent: MemberAgent) -> None:
        self._agent = agent
        self._pause = FIRST_INQUIRY_S
        self._next = time.monotonic() + self._pause

    def tell(self) -> None:
        """Call this while waiting, as often as you like."""
        if time.monotonic() >= self._next:
            self._agent.tell(Waiting())
            self._pause = min(2 * self._pause, 30.0)
            self._next = time.monotonic() + self._pause
