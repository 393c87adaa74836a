"""The exceptions Tilewright raises for input it cannot accept.

Each message is one line: what was asked, what was found, what would work.
"""


class TilewrightError(Exception):
    """Base of every error a user can cause; the CLI prints its message on one line and exits with `exit_code`."""

    exit_code = 2


class InvalidModel(TilewrightError):
    """A checkpoint is truncated, inconsistent, or holds NaN, missing or extra tensors."""


class UnsupportedModel(TilewrightError):
    """A checkpoint is well formed but uses an architecture, operator or opset that is not supported."""

    exit_code = 3


class InvalidInput(TilewrightError):
    """Arguments of a run (token ids, masks, lengths, options) are out of range, of a wrong dtype or a wrong rank."""


class ScheduleMismatch(TilewrightError):
    """A workload does not satisfy a schedule's or an intrinsic's declared preconditions."""

    exit_code = 3


class InvalidArtifact(TilewrightError):
    """An artifact is incomplete, was tampered with, or has another schema version."""

    exit_code = 4


class ArtifactTargetMismatch(TilewrightError):
    """An artifact needs CPU features this machine lacks."""

    exit_code = 4
