"""A step that some have committed and others have not: these take it over, and nothing of it is lost on the way."""

import os
import signal
from pathlib import Path

import torch
from labs import run, wait_until
from remembering import Counting

from raytrain_het.allreduce.reducers import Reducer
from raytrain_het.testing.faults import Fault
from raytrain_het.testing.regression import Regression
from raytrain_het.worker import session as sessions

STEP = 13


class ClipsAndWaits(Regression):
    """Worker 0 stands between ``backward()`` and ``step()``, gradients clipped, until the others have gone on."""

    def _update(self, model, optimizer, scheduler):
        torch.nn.utils.clip_grad_norm_(model.parameters(), self.clip)
        session = sessions.current()
        if (
            session.slot == 0
            and session.worker.engine.opened.job.step == STEP
            and len(session.worker.agent.record.members) == 3
        ):
            wait_until(lambda: session.worker.communicator.entered.replayed is not None)
        optimizer.step()


def test_what_a_worker_has_done_to_gradients_before_it_takes_a_step_over_stays_done(tmp_path):
    done = run(ClipsAndWaits(clip=0.05), tmp_path, faults=[Fault(slot=2, step=STEP, point="updated")])
    done.check(Regression(clip=0.05))
    assert any(e["base"] == STEP for e in done.kinds("formed"))


class TakenOverAndPassedOn:
    """Worker 3 dies when worker 0 alone has the sums of a step; 1 takes it over from 0, 0 dies, 2 takes it from 1."""

    def __call__(self, directory):
        session, taken_over = sessions.current(), Path(directory, "taken_over")

        class Task(Regression):
            def _update(self, model, optimizer, scheduler):
                first = session.worker.engine.opened.job.step == STEP and not taken_over.exists()
                if session.slot == 2 and first:  # Slow between backward() and step().
                    wait_until(lambda: session.worker.agent.void > 2 or session.worker.agent.record.number > 2)
                optimizer.step()
                if session.slot == 1 and session.worker.engine.cursor.step == STEP:
                    taken_over.touch()
                if session.slot == 0 and first:
                    wait_until(taken_over.exists)
                    os.kill(os.getpid(), signal.SIGKILL)

        if session.slot in (1, 2):
            all_reduce = Reducer.all_reduce

            def stuck(reducer, bucket, header, *args, **kwargs):
                for k, operation in enumerate(all_reduce(reducer, bucket, header, *args, **kwargs)):
                    last = bucket is reducer.layout.buckets[-1] and k == 1
                    if last and (header.step, header.generation) == (STEP, 1):
                        # What worker 3 had yet to send has reached worker 0 only.
                        session.worker.communicator._waiter.until(lambda: False, 1, STEP, peers=True)
                    yield operation

            Reducer.all_reduce = stuck
        Counting.register()
        return Task(report=False)(directory) | {"counts": Counting.counts(session.worker.communicator.codec_states)}


def test_who_has_taken_a_step_over_passes_it_on_when_its_source_dies(tmp_path):
    faults = [Fault(slot=3, step=STEP, point="updated")]
    done = run(
        TakenOverAndPassedOn(), tmp_path, num_slots=4, faults=faults, refill=False, settings={"codecs": ("counting",)}
    )
    task = Regression(report=False)
    done.check(task)
    # What they had sent for that step was used, by those that committed it: so what their codecs remember of it stays.
    assert [done.results[slot]["counts"] for slot in (1, 2)] == [[task.num_steps]] * 2
    assert [e["base"] for e in done.kinds("formed")][:3] == [0, STEP, STEP]
