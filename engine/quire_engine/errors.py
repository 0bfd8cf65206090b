"""The one error family of Quire: what happened, what to do, and details for the log.

Knows nothing of how an error is shown; each face (command line, terminal application) has one place for that.
"""


class QuireError(Exception):
    """Something a person can understand and act on.

    message: what happened and what it means.  hint: what to do next.  details: for the log, may be long.
    """

    def __init__(self, message: str, hint: str = "", details: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.details = details


class Aborted(Exception):
    """The caller asked to stop, and the work stopped; nothing went wrong."""


class ModelError(QuireError):
    """The model file is missing, damaged, or of a kind that cannot be run."""


class ContextOverflow(QuireError):
    """The prompt does not fit the model's context."""


class MissingChunk(QuireError):
    """No chunk is stored under this key; its tokens have to be computed."""


class UnwritableStore(QuireError):
    """A chunk could not be stored: the disk is full, or may not be written to."""


class DamagedChunk(QuireError):
    """A stored chunk is missing bytes or fails its checksum; its tokens have to be computed again."""
