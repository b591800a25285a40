"""Many runs at once: one process per core, one progress for all, and Ctrl-C loses nothing."""

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Event
from queue import Empty

from interrupts import interrupts_ignored
from jobs import Job, Progress, Tell, run

_messages: "Queue[Progress]"  # set once in each worker process, when it starts
_stop: Event


def run_all(jobs: Sequence[Job], processes: int, tell: Tell) -> None:
    """Make the runs, in this process if one is enough, else in several.

    Ctrl-C lets the runs end their epoch and keep what they have recorded.
    """
    if min(processes, len(jobs)) <= 1:
        for job in jobs:
            run(job, tell)
        return
    context = multiprocessing.get_context("spawn")
    messages: Queue[Progress] = context.Queue()
    stop = context.Event()
    pool = ProcessPoolExecutor(processes, context, _start_worker, (messages, stop))
    with pool:
        with interrupts_ignored():  # inherited: only this process hears Ctrl-C
            futures = [pool.submit(_run_in_worker, job) for job in jobs]
        try:
            _follow(futures, messages, tell)
        except BaseException:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _follow(futures: Sequence["Future[bool]"], messages: "Queue[Progress]", tell: Tell) -> None:
    pending = set(futures)
    while pending:
        done, pending = wait(pending, timeout=0.2)
        while message := _next(messages):
            tell(message)
        for future in done:
            future.result()  # raises what the run raised


def _next(messages: "Queue[Progress]") -> Progress | None:
    try:
        return messages.get_nowait()
    except Empty:
        return None


def _start_worker(messages: "Queue[Progress]", stop: Event) -> None:
    global _messages, _stop
    _messages, _stop = messages, stop


def _run_in_worker(job: Job) -> bool:
    return not _stop.is_set() and run(job, _messages.put, _stop.is_set)
