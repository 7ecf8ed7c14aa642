# SPDX-License-Identifier: MIT
"""Training files that cannot be read: each reported once, by the first process."""

from ..progress import message
from .samples import Failure
from .world import World


class UnreadableFiles:
    """The files that were reported, and those that wait for the end of the epoch.

    Args:
        world: The processes. The first one reports its own failures at once, those of others in `exchange`.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.reported: set[str] = set()
        self._waiting: list[Failure] = []

    def add(self, failures: list[Failure]) -> None:
        """Note the failures of a micro-batch."""
        for file, reason in failures:
            if file not in self.reported:
                self.reported.add(file)
                if self.world.first:
                    _report(file, reason)
                else:
                    self._waiting.append((file, reason))

    def exchange(self) -> None:
        """Report what the other processes have met; to be called in all at once."""
        for file, reason in sorted({pair for part in self.world.gather(self._waiting) for pair in part}):
            if self.world.first and file not in self.reported:
                _report(file, reason)
            self.reported.add(file)
        self._waiting = []


def _report(file: str, reason: str) -> None:
    message(f"'{file}' cannot be read ({reason}); the next image takes its place")
