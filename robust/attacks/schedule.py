"""Schedules the runs of all images: which starts next, and when an image is finished.

Plain Python, no tensors.
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Ended:
    """The consequence of a finished run for its image."""

    finished: bool  # the image needs no further run
    drop_later_runs: bool  # its later runs, started in parallel, are no longer needed


class Schedule:
    """The order of the runs of `images` images, up to `max_runs` each.

    The runs of an image are tried in turn until one fools the model. With `allow_parallel_runs`,
    when no image is waiting, later runs of an image start before the earlier ones have failed. The
    successful run with the lowest number still decides, so the result is the same.
    """

    def __init__(self, images: int, *, max_runs: int, allow_parallel_runs: bool = False) -> None:
        self.max_runs = max_runs
        self._allow_parallel_runs = allow_parallel_runs
        self._waiting = deque(range(images))  # images whose next run may start
        self._next_run = [0] * images
        self._running: list[set[int]] = [set() for _ in range(images)]
        self._parallelizable: set[int] = (
            set()
        )  # images with a run in progress that may start another
        self._fooled: set[int] = set()

    def start_runs(self, room: int) -> list[tuple[int, int]]:
        """The next runs, at most `room` of them, as (image, run); they count as started."""
        images: list[int] = []
        while len(images) < room and self._waiting:
            images.append(self._waiting.popleft())
        started = [(image, self._start(image)) for image in images]
        for image in self._parallel_runs(room - len(images)):
            started.append((image, self._start(image)))
        return started

    def end_run(self, image: int, run: int, *, fooled: bool) -> Ended | None:
        """Record the end of a run; returns None if the run had been dropped."""
        running = self._running[image]
        if run not in running:
            return None
        running.discard(run)
        later: set[int] = set()
        if fooled:
            self._fooled.add(image)
            self._parallelizable.discard(image)
            later = {other for other in running if other > run}
            running -= later
        # A run with a lower number that is still going may succeed too; then it decides.
        finished = not running and (image in self._fooled or self._next_run[image] == self.max_runs)
        if not running and not finished:
            self._waiting.append(image)
        return Ended(finished=finished, drop_later_runs=bool(later))

    def cancel(self, image: int) -> None:
        """Start no further run of `image`."""
        self._next_run[image] = self.max_runs
        self._parallelizable.discard(image)

    def _start(self, image: int) -> int:
        run = self._next_run[image]
        self._next_run[image] += 1
        self._running[image].add(run)
        if self._allow_parallel_runs and run + 1 < self.max_runs:
            self._parallelizable.add(image)
        else:
            self._parallelizable.discard(image)
        return run

    def _parallel_runs(self, room: int) -> list[int]:
        """Images for up to `room` more parallel runs, those with the fewest started runs first."""
        if room <= 0 or not self._parallelizable:
            return []
        heap = [(self._next_run[image], image) for image in self._parallelizable]
        heapq.heapify(heap)
        chosen: list[int] = []
        while heap and len(chosen) < room:
            run, image = heapq.heappop(heap)
            chosen.append(image)
            if run + 1 < self.max_runs:
                heapq.heappush(heap, (run + 1, image))
        return chosen
