"""Every failure Mollifier raises, under one root; each carries its data as attributes."""

from __future__ import annotations

from typing import NamedTuple


class MollifierError(Exception):
    """The root: `except MollifierError` catches whatever this package raises on purpose."""


class FieldError(NamedTuple):
    """One thing wrong with one field: `field` is its path as the caller wrote it, for example `options.tags[0]`."""

    field: str
    detail: str


class InvalidRequestError(MollifierError):
    """The request can never succeed as it stands; `errors` names each field at fault (at least one)."""

    def __init__(self, *errors: FieldError) -> None:
        super().__init__("; ".join(f"{error.field}: {error.detail}" for error in errors))
        self.errors = errors


class MalformedBodyError(MollifierError):
    """The body is not the JSON it has to be; nothing in it was looked at."""

    def __init__(self, detail: str) -> None:
        super().__init__(detail)
        self.detail = detail


class NotFoundError(MollifierError):
    """What the request names does not exist in the caller's environment.

    `kind` is the noun ("run", "task", ...), `id` what was asked for, `field` where the request named it.
    """

    def __init__(self, kind: str, id: str, field: str, hint: str = "") -> None:  # noqa: A002 - the field's own word
        super().__init__(f"No {kind} {id!r} in this environment.{' ' + hint if hint else ''}")
        self.kind = kind
        self.id = id
        self.field = field


class ConflictError(MollifierError):
    """The thing exists but its state forbids the change; `field` names what cannot be applied."""

    def __init__(self, detail: str, field: str) -> None:
        super().__init__(detail)
        self.detail = detail
        self.field = field


class SettingsError(MollifierError):
    """A setting has a value it cannot have; `variable` is the environment variable's name."""

    def __init__(self, variable: str, detail: str) -> None:
        super().__init__(f"{variable}: {detail}")
        self.variable = variable
        self.detail = detail


class BufferUnavailableError(MollifierError):
    """The buffer's server did not answer (refused, hung past the deadline, or failed the command)."""


class BufferRefusedError(BufferUnavailableError):
    """The buffer's server is there and answered the command with an error."""


class BufferNotAskedError(BufferUnavailableError):
    """The buffer's server was not asked: it has given no answers of late, and asking it again is for later."""


class EngineUnavailableError(MollifierError):
    """The run engine's store cannot be reached: nobody's fault, worth coming back for.

    `unsent`: nothing has left for it, so what was asked for is not done; otherwise it may have been, or may yet be.
    """

    def __init__(self, detail: str, *, unsent: bool = False) -> None:
        super().__init__(detail)
        self.unsent = unsent


class EngineNotAskedError(EngineUnavailableError):
    """The run engine was not asked: it has given no answers of late, and this can be done without it."""

    def __init__(self, detail: str) -> None:
        super().__init__(detail, unsent=True)


class EngineFailingError(EngineUnavailableError):
    """The run engine fails whatever it is given, so that this was not given to it: nobody's fault, worth coming back for."""


class OverCapError(MollifierError):
    """The triggers were rejected: held, they would exceed a cap. Nothing has happened to any of them.

    `cap` is the cap's setting. There is room again once the drainer has created some runs: in seconds, as a rule. `fits` is False for
    what not even an empty buffer would take: too much at once.
    """

    def __init__(self, cap: str, *, fits: bool) -> None:
        super().__init__(f"over {cap}")
        self.cap = cap
        self.fits = fits


class NonRetryableError(MollifierError):
    """Raised by a drain handler for an entry that no retry can save."""


class MalformedEntryError(MollifierError):
    """What the buffer holds under this run id does not read as an entry; `reason` says why."""

    def __init__(self, run_id: str, reason: str) -> None:
        super().__init__(f"entry {run_id!r} does not parse: {reason}")
        self.run_id = run_id
        self.reason = reason
