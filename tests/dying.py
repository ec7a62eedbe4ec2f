"""A process that is killed between two operations on the disk, played without a process."""

import contextlib
import errno
import os


class Killed(BaseException):
    """No Exception, so that no handler for ordinary errors sees it."""


class Disk:
    """Counts the operations of ``os`` that change the disk; from number ``dies_at`` on, all of them raise ``Killed``.

    What handlers and ``finally`` blocks try to clean up after that fails too, so the disk stays as it was at the kill.
    """

    OPERATIONS = ("replace", "rename", "unlink", "rmdir", "mkdir", "fsync")

    def __init__(self, monkeypatch, dies_at=None, full_at=None):
        self.count, self.dies_at, self.full_at = 0, dies_at, full_at
        self._quiet = False
        for name in self.OPERATIONS:
            monkeypatch.setattr(os, name, self._counting(getattr(os, name)))

    def _counting(self, operation):
        def counted(*args, **kwargs):
            if not self._quiet:
                self.count += 1
                if self.dies_at is not None and self.count >= self.dies_at:
                    raise Killed
                if self.full_at is not None and self.count == self.full_at and operation.__name__ in ("mkdir", "fsync"):
                    raise OSError(errno.ENOSPC, "No space left on device")
            return operation(*args, **kwargs)

        return counted

    @contextlib.contextmanager
    def quiet(self):
        """Inside, nothing is counted: for a library whose threads would not survive ``Killed``."""
        self._quiet = True
        try:
            yield
        finally:
            self._quiet = False

    def revive(self):
        """The next process: everything works."""
        self.dies_at = self.full_at = None
