"""The codecs as a communication hook of torch's plain ``DistributedDataParallel`` (and so of what builds on it).

One thread of the state's own completes the hook's futures. It launches all collectives in the order of the buckets, on
a process group of its own, and never waits inside of a callback. So nothing hangs, however many buckets there are.
"""

from __future__ import annotations

import functools
import math
import queue
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from raytrain_het.allreduce.codecs import State, codec_of
from raytrain_het.allreduce.error_feedback import ErrorFeedback
from raytrain_het.allreduce.header import Header
from raytrain_het.allreduce.layout import Layout, is_finite
from raytrain_het.allreduce.reducers import ReducerByEpoch, reducer_for
from raytrain_het.allreduce.step_summary import SummarySoFar
from raytrain_het.allreduce.transport.group import PeerBuffers
from raytrain_het.codec_options import one_word
from raytrain_het.membership.cursor import Cursor
from raytrain_het.membership.record import Member, Record

_WHOLE = 2**62


class CompressedState:
    """What :func:`compressed_hook` keeps from step to step; one for each model, made by all processes alike.

    ::

        ddp = DistributedDataParallel(model)
        ddp.register_comm_hook(CompressedState(model, {"topk": {"density": 0.01}}), compressed_hook)

    Args:
        model: the module that is wrapped, for the names of its parameters.
        compression: one codec, as ``HetConfig.compression``.
        process_group: a group of the same processes as the ``DistributedDataParallel``'s, used for nothing else. Left
            out, a group of all processes is made, in which all must take part: at once, or in the first
            ``backward()`` where torch's default group is made later, as frameworks do.

    Raises:
        ConfigError: ``compression`` is not valid.
    """

    def __init__(
        self,
        model: nn.Module,
        compression: str | Mapping[str, Any] = "int8",
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        self.codec = one_word(compression)
        self.weight = 1.0
        """This process's weight ``w_i`` in ``g = sum w_i g_i / sum w_i``, such as the samples of its batch. Set it
        before ``backward()`` where batches differ."""
        self.loss_scale = 1.0
        """What the loss was multiplied by (``scaler.get_scale()``): error feedback is kept without it."""
        self.epoch = 0
        """For codecs that warm up: all processes set it before each epoch's first ``backward()``."""
        codec_of(self.codec).prepare()
        self._given = process_group
        self._peers: _Peers | None = None
        self._names = {id(p): name for name, p in model.named_parameters()}
        self._buckets: dict[tuple[str, ...], _Bucket] = {}
        self._loaded: dict[str, State] = {}
        self._num_buckets_made = 0
        if process_group is not None or dist.is_initialized():
            self._connected()

    def _connected(self) -> _Peers:
        """The other processes: those of the default group at the first call."""
        if self._peers is None:
            self._peers = _Peers(self._given or dist.new_group(backend=dist.get_backend()), self.codec)
            weakref.finalize(self, self._peers.worker.stop)
        return self._peers

    @property
    def bytes_sent(self) -> int:
        """Bytes sent to other processes so far, headers included."""
        return self._peers.worker.bytes_sent if self._peers is not None else 0

    def state_dict(self) -> dict[str, State]:
        """What this process's codec remembers, by parameter. Each process keeps its own in a checkpoint."""
        found = dict(self._loaded)
        for bucket in self._buckets.values():
            found |= bucket.feedback.by_parameter()
        return found

    def load_state_dict(self, state: Mapping[str, State]) -> None:
        """The inverse of :meth:`state_dict`, also for buckets that are made later."""
        self._loaded = dict(state)
        for names, bucket in self._buckets.items():
            bucket.feedback.load({name: self._loaded.pop(name) for name in names if name in self._loaded})

    def reduce(
        self, index: int, parameters: Sequence[torch.Tensor], flat: torch.Tensor, gradients: Sequence[torch.Tensor]
    ) -> torch.futures.Future[torch.Tensor]:
        """The future of a bucket's mean, which takes the place of ``flat``.

        Raises:
            ValueError: ``weight`` or ``loss_scale`` is not valid.
        """
        if not (0 <= self.weight < math.inf and 0 < self.loss_scale < math.inf):
            raise ValueError(
                f"CompressedState.weight={self.weight!r}, loss_scale={self.loss_scale!r}: allowed is a finite weight "
                "from 0, such as the samples of this process's batch, and a finite scale above 0."
            )
        names = tuple(self._names[id(p)] for p in parameters)
        if names not in self._buckets:
            self._make_bucket(names, parameters)
        future: Any = torch.futures.Future(devices=[flat.device] if flat.is_cuda else None)
        if flat.is_cuda:
            torch.cuda.current_stream(flat.device).synchronize()
        bucket = self._buckets[names]
        work = _Work(bucket, index, flat, gradients, self.weight, self.loss_scale, self.epoch, future)
        self._connected().worker.do(work)
        return future

    def _make_bucket(self, names: tuple[str, ...], parameters: Sequence[torch.Tensor]) -> None:
        """``DistributedDataParallel`` puts the parameters into other buckets after the first step."""
        for other in [other for other in self._buckets if set(other) & set(names)]:
            self._loaded |= self._buckets.pop(other).feedback.by_parameter()
        peers = self._connected()
        bucket = _Bucket(
            list(zip(names, parameters, strict=True)),
            peers.record,
            peers.group,
            first_step=self._num_buckets_made << 40,
            small_apart=codec_of(self.codec).spares_small,
        )
        self._num_buckets_made += 1
        bucket.feedback.load({name: self._loaded.pop(name) for name in names if name in self._loaded})
        self._buckets[names] = bucket


def compressed_hook(state: CompressedState, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Communication hook: the weighted mean of all processes' gradients, encoded by ``state``'s codec.

    Args:
        state: what is kept between steps.
        bucket: what ``DistributedDataParallel`` has filled.

    Returns:
        A future of the bucket's (n,) tensor. Where any process's gradient is not finite it holds NaN, the same on all,
        for ``GradScaler`` to find, and error feedback stays as it was. Where all are zero, it stays so too.
    """
    return state.reduce(bucket.index(), bucket.parameters(), bucket.buffer(), bucket.gradients())


# DistributedDataParallel compares the annotations with these objects, and not with their names.
compressed_hook.__annotations__ |= {"bucket": dist.GradBucket, "return": torch.futures.Future[torch.Tensor]}


@dataclass
class _Work:
    bucket: _Bucket
    index: int
    flat: torch.Tensor
    gradients: Sequence[torch.Tensor]
    weight: float
    loss_scale: float
    epoch: int
    future: Any


class _Peers:
    """A process group, the record that its all-reduces go by, and the thread that calls it."""

    def __init__(self, group: Any, codec: str) -> None:
        self.group = _TorchGroup(group)
        self.record = _record(self.group.size, codec)
        self.worker = _Worker(self.group)


class _Worker:
    """The thread. It has no reference to the state that gives it work, so the state can be freed."""

    def __init__(self, group: _TorchGroup) -> None:
        self.bytes_sent = 0
        self._group = group
        self._waiting: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._total_weight = 0.0
        self._failed: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="het-ddp-hook", daemon=True)
        self._thread.start()

    def do(self, work: _Work) -> None:
        """Queue a bucket's all-reduce."""
        self._waiting.put(work)

    def stop(self) -> None:
        """End the thread once its queue is done. At the end of the process too: torch aborts it if a thread is left."""
        self._waiting.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join(10)

    def _run(self) -> None:
        torch.set_num_threads(1)  # As the communication thread's: a pool of its own would fight the training's.
        while (work := self._waiting.get()) is not None:
            try:
                if self._failed is not None:  # Do nothing more: peers would take it for another operation.
                    raise self._failed
                if work.index == 0:
                    total = torch.tensor([work.weight], dtype=torch.float64, device=self._group.device)
                    dist.all_reduce(total, group=self._group.group)
                    self._total_weight = float(total)
                self.bytes_sent += work.bucket.all_reduce(work, self._total_weight)
                if work.flat.is_cuda:
                    torch.cuda.current_stream(work.flat.device).synchronize()
                work.future.set_result(work.flat)
            except Exception as error:
                self._failed = error
                work.future.set_exception(error)
            del work  # Else the last bucket's gradients would stay in memory until the next bucket.


class _Bucket:
    """One of ``DistributedDataParallel``'s buckets, with its reducer and its state."""

    def __init__(
        self,
        named: list[tuple[str, torch.Tensor]],
        record: Record,
        group: _TorchGroup,
        *,
        first_step: int,
        small_apart: bool,
    ) -> None:
        self.layout = Layout(named, [], _WHOLE, small_apart=small_apart)
        self.feedback = ErrorFeedback(self.layout)
        make = functools.partial(reducer_for, record, group.rank, self.layout, group, self.feedback, None)
        self._reducers = ReducerByEpoch(record, make)
        self._place = {name: k for k, (name, _) in enumerate(named)}
        self._step = first_step  # Other steps in each bucket, since random numbers follow from them.

    def all_reduce(self, work: _Work, total_weight: float) -> int:
        """Write the mean into the gradients. Returns the bytes sent."""
        reducer, gradients, so_far = self._reducers.open(work.epoch), work.gradients, SummarySoFar(self._step)
        before = reducer.traffic.sent
        reducer.expect_step()
        finite = all(is_finite(g) for g in gradients)
        outs = []
        for bucket in self.layout.buckets:
            parts = [gradients[self._place[s.name]] for s in bucket.segments]
            local = torch.cat([part.reshape(-1).to(bucket.dtype) for part in parts])
            header = Header(
                step=self._step,
                generation=0,
                bucket=bucket.index,
                want=0,
                weight=work.weight,
                contributes=work.weight > 0,
                used=sum(bool(part.any()) << k for k, part in enumerate(parts)),
                nonfinite=0 if finite else 1 << reducer.rank,
            )
            outs.append(torch.empty_like(local))
            local.mul_(work.weight / work.loss_scale)
            for operation in reducer.all_reduce(bucket, header, local, outs[-1], so_far, expected_weight=total_weight):
                operation.result()
        summary = so_far.all()
        for bucket, out in zip(self.layout.buckets, outs, strict=True):
            for k, segment in enumerate(bucket.segments):
                gradient = gradients[self._place[segment.name]]
                if not summary.finite:
                    gradient.fill_(torch.nan)
                elif summary.applies and summary.used[bucket.index] >> k & 1:
                    values = out[segment.offset : segment.stop].view(segment.shape)
                    gradient.copy_(values.mul_(work.loss_scale))
                else:
                    gradient.zero_()  # No process used it, or all weights are 0.
        if summary.applies:
            self.feedback.commit(self._step, summary.total_weight, summary.used)
        self._step += 1
        return reducer.traffic.sent - before


class _DoneOperation:
    """An operation that is over."""

    done = True

    def result(self) -> None:
        """Nothing: a failure was raised when the operation was launched."""


class _TorchGroup:
    """A process group of torch as a ``Group`` (``transport/group.py``). It waits for each operation."""

    poll_s: float | None = None

    def __init__(self, group: Any) -> None:
        self.key, self.group = "ddp", group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        on_gpu = dist.get_backend(group) == "nccl"
        self.device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")

    def join(self, poller: Any) -> None:
        """Nothing to do: operations are over when they have been launched."""

    def leave(self) -> None:
        """Nothing to do: the process group belongs to torch."""

    def expect(self, out: PeerBuffers) -> None:
        """Nothing to do: torch transfers nothing before both sides have launched."""

    def sent(self) -> dict[int, tuple[int, float]]:
        """Not known."""
        return {}

    def all_to_all(
        self, out: PeerBuffers, inp: PeerBuffers, expected: Any = None, *, flush: bool = True
    ) -> _DoneOperation:
        """See :class:`raytrain_het.allreduce.transport.group.Group`."""
        dist.all_to_all_single(out.buffer, inp.in_a_row(), out.lengths, inp.lengths, group=self.group)
        return _DoneOperation()


def _record(size: int, codec: str) -> Record:
    members = tuple(Member(uid=str(k), slot=k, host="", state_port=0, device="") for k in range(size))
    ones = (1.0,) * size
    return Record(
        number=0,
        incarnation=0,
        group="ddp",
        members=members,
        shares=ones,
        gradient_weights=ones,
        normalised=True,
        table=0,
        owners=ones,
        codecs=(codec,) * size,
        cursor=Cursor(),
        source=None,
        behind=(),
        unhealed=(),
        fresh=(),
        reset=False,
        checkpoint=None,
        backend="torch",
        reason="DistributedDataParallel",
    )
