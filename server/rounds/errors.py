"""Define the errors that end a run."""

from __future__ import annotations


class RunFailed(RuntimeError):
    """The run cannot continue. The message names the sites and their reasons."""


class RunRefused(RunFailed):
    """The run could not start, for example because the settings do not fit the sites' data.

    Nothing was trained.
    """
