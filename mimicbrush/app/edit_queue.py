"""The queue of edits: one runs, the others wait, and each tab follows the progress of its edit.

Everything here runs in the event loop; only the edit itself has a thread.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from mimicbrush.app.bodies import RefusedRequestError
from mimicbrush.app.editing_service import EditingService, EditRequest
from mimicbrush.errors import MimicBrushError

#: A stream says something at least this often, so that a connection that broke is noticed.
_PING_S = 15.0
#: Edits that have ended and that nobody listens to: a tab that is being loaded again asks for its own soon.
_MAX_ENDED, _MAX_ENDED_OF_ONE = 100, 2
_log = logging.getLogger(__name__)


@dataclass(eq=False)
class Job:
    """An edit that a visitor requested.

    Attributes:
        visitor: whose it is.
        state: what the page shows: ``{"waiting": edits before it}``, what `EditingService.edit` tells while it runs,
            and at the end ``{"result": ...}``, ``{"error": ...}`` or ``{"cancelled": True}``.
        phase: "waiting", "running" or "ended".
        is_cancelled: ends it at its next step.
        num_listeners: streams that are open.
        since_s: when the last stream closed, or the edit was asked for.
    """

    visitor: str
    since_s: float
    state: dict[str, Any] = field(default_factory=dict)
    phase: str = "waiting"
    is_cancelled: bool = False
    num_listeners: int = 0
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None

    def show(self, state: dict[str, Any]) -> None:
        """Send the state to all listeners."""
        self.state = state
        self.changed.set()
        self.changed = asyncio.Event()


class EditQueue:
    """Queue of edits, first come, first served.

    Args:
        service: edits.
        clock: seconds that only grow; other ones in tests.
    """

    #: A tab that asked for an edit listens soon. A connection may break, and a page be loaded again.
    grace_s = 10.0

    def __init__(self, service: EditingService, clock: Callable[[], float] = time.monotonic) -> None:
        self._service, self._clock = service, clock
        self._jobs: dict[str, Job] = {}  # oldest first
        self._turn = asyncio.Lock()

    def add(self, visitor: str, request: EditRequest) -> str:
        """Add an edit to the queue, and return its name, which nobody can guess.

        Raises:
            RefusedRequestError: too many wait, of all visitors or of this one.
        """
        limits, waiting = self._service.limits, self._waiting()
        if len(waiting) >= limits.waiting:
            raise RefusedRequestError(429, f"{limits.waiting} edits are already waiting; try again in a minute")
        mine = sum(job.visitor == visitor for job in waiting)
        if mine >= limits.waiting_of_one:
            raise RefusedRequestError(429, f"{mine} of your edits are already waiting; wait until one of them is done")
        name, job = secrets.token_urlsafe(18), Job(visitor, self._clock())
        self._jobs[name] = job
        self._forget_old(visitor)
        job.task = asyncio.get_running_loop().create_task(self._run(job, request))
        self._tell_places()
        return name

    def find(self, visitor: str, name: str) -> Job:
        """Find an edit.

        Raises:
            RefusedRequestError: there is none of this name, or it is another visitor's: the error is the same.
        """
        job = self._jobs.get(name)
        if job is None or job.visitor != visitor:
            raise RefusedRequestError(404, "this edit does not exist, or not any longer")
        return job

    def cancel(self, visitor: str, name: str) -> None:
        """Cancel a visitor's edit. A waiting edit ends at once, a running one at its next step."""
        with suppress(RefusedRequestError):  # it never came, or it is another's
            job = self.find(visitor, name)
            job.is_cancelled = True
            if job.phase == "waiting" and job.task is not None:
                job.task.cancel()

    async def listen(self, job: Job) -> AsyncIterator[dict[str, Any] | None]:
        """Yield the state of an edit whenever it changes, until it ends; None if nothing changed for a while."""
        job.num_listeners += 1
        try:
            while True:
                changed, is_last = job.changed, job.phase == "ended"
                yield job.state
                if is_last:
                    return
                while not changed.is_set():
                    try:
                        await asyncio.wait_for(changed.wait(), _PING_S)
                    except TimeoutError:
                        yield None
        finally:
            job.num_listeners -= 1
            job.since_s = self._clock()

    def has_left(self, job: Job) -> bool:
        """Whether nobody listens to this edit any more."""
        return not job.num_listeners and self._clock() - job.since_s > self.grace_s

    async def _run(self, job: Job, request: EditRequest) -> None:
        end: dict[str, Any] = {"cancelled": True}
        loop = asyncio.get_running_loop()
        try:
            async with self._turn:
                job.phase = "running"
                self._tell_places()
                result = await asyncio.to_thread(
                    self._service.edit,
                    job.visitor,
                    request,
                    lambda state: loop.call_soon_threadsafe(job.show, state),
                    lambda: job.is_cancelled or self.has_left(job),
                )
            if result is not None:
                end = {"result": result}
        except asyncio.CancelledError:  # while it waited, or the server ends
            pass
        except MimicBrushError as error:
            end = {"error": str(error)}
        except Exception:  # noqa: BLE001 - the next edit must have its turn
            _log.exception("an edit failed")
            end = {"error": "an unexpected error occurred; the output of the server says more"}
        finally:
            job.phase = "ended"
            job.show(end)
            self._tell_places()

    def _waiting(self) -> list[Job]:
        return [job for job in self._jobs.values() if job.phase == "waiting"]

    def _tell_places(self) -> None:
        is_busy = any(job.phase == "running" for job in self._jobs.values())
        for before, job in enumerate(self._waiting()):
            if job.state != (state := {"waiting": before + is_busy}):
                job.show(state)

    def _forget_old(self, visitor: str) -> None:
        ended = [(name, job) for name, job in self._jobs.items() if job.phase == "ended" and not job.num_listeners]
        mine = [name for name, job in ended if job.visitor == visitor]
        for name in {*mine[:-_MAX_ENDED_OF_ONE], *(name for name, _ in ended[:-_MAX_ENDED])}:
            del self._jobs[name]
