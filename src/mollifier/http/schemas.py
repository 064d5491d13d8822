"""Request bodies as the documentation shows them. Parsing is by hand (`request.py`, `fields.py`); tests hold the two together."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from mollifier.batch_request import ITEMS_MAX, RUN_COUNT_MAX
from mollifier.http.raw_path import ID_LENGTH_MAX
from mollifier.model import MAX_TAGS
from mollifier.request import (
    ATTEMPTS,
    DEBOUNCE_KEY_LENGTH_MAX,
    FORMATS,
    INT32,
    KEY_LENGTH_MAX,
    MAX_DURATION_S,
    NAME_LENGTH_MAX,
    TAG_LENGTH_MAX,
    TASK_ID_LENGTH_MAX,
)

RUN_IDS_MAX = 1000

Duration = Annotated[str, Meta(description="A duration: units w, d, h, m, s in this order", examples=["1h30m"])]
Delay = Annotated[str, Meta(description="A duration, or a date (ISO 8601)", examples=["10m", "2030-01-31T12:00:00Z"])]
Text = Annotated[str, Meta(min_length=1, max_length=NAME_LENGTH_MAX)]
Key = Annotated[str, Meta(min_length=1, max_length=KEY_LENGTH_MAX)]
Tag = Annotated[str, Meta(min_length=1, max_length=TAG_LENGTH_MAX)]
Tags = Tag | Annotated[list[Tag], Meta(description=f"At most {MAX_TAGS} different ones")]
Format = Annotated[str, Meta(description="One of " + ", ".join(FORMATS), examples=[FORMATS[0]])]
RunId = Annotated[str, Meta(min_length=1, max_length=ID_LENGTH_MAX)]
Json = Annotated[Any, Meta(description="Any JSON, kept byte for byte")]


class IdempotencyKeyOptions(msgspec.Struct, rename="camel"):
    """How a key is scoped. Beside `idempotencyKey`, which then is the bound key, it only says what to show."""

    key: Key
    scope: Literal["run", "attempt", "global"] | None = "global"
    attempt: Annotated[int, Meta(ge=1, description="Of the parent run, for the scope `attempt`")] | None = None


class DebounceOptions(msgspec.Struct, rename="camel"):
    """Triggers with one key share one delayed run. Its `delay` counts, not the option of that name."""

    key: Annotated[str, Meta(min_length=1, max_length=DEBOUNCE_KEY_LENGTH_MAX)]
    delay: Duration
    mode: Literal["leading", "trailing"] | None = "leading"
    max_delay: (
        Annotated[str, Meta(description="Counted from the run's creation; the longer of 1h and `delay` by default")]
        | None
    ) = None


class QueueOption(msgspec.Struct):
    """A queue, by its name."""

    name: Text


class TriggerOptions(msgspec.Struct, rename="camel"):
    """How a run is made and executed. Null counts as absent; what is not listed here is ignored."""

    idempotency_key: Key | None = None
    idempotency_key_ttl: Annotated[Duration | None, Meta(description="30 days by default")] = msgspec.field(
        name="idempotencyKeyTTL", default=None
    )
    idempotency_key_options: IdempotencyKeyOptions | None = None
    tags: Tags | None = None
    delay: Delay | None = None
    ttl: Annotated[int, Meta(ge=0, description="Seconds")] | Duration | None = None
    debounce: DebounceOptions | None = None
    metadata: Json = None
    metadata_type: Format | None = None
    payload_type: Format | None = None
    queue: QueueOption | None = None
    concurrency_key: Text | float | None = None
    priority: Annotated[int, Meta(ge=INT32[0], le=INT32[1])] | None = 0
    machine: Text | None = None
    region: Text | None = None
    max_attempts: Annotated[int, Meta(ge=ATTEMPTS[0], le=ATTEMPTS[1])] | None = None
    max_duration: Annotated[int, Meta(ge=MAX_DURATION_S[0], le=MAX_DURATION_S[1], description="Seconds")] | None = None
    test: bool | None = False
    lock_to_version: Text | None = None
    external_deployment_id: Text | None = None
    bulk_action_id: Text | None = None
    parent_run_id: Text | None = None
    resume_parent_on_completion: bool | None = False
    parent_batch: Text | None = None


class TriggerBody(msgspec.Struct, rename="camel"):
    """What to run a task with. Where `options.payloadType` is given, `payload` is a string in that format."""

    payload: Json = None
    context: Json = None
    options: TriggerOptions | None = None


class BatchItemBody(TriggerBody, kw_only=True, rename="camel"):
    """One trigger of a batch."""

    task: Annotated[str, Meta(min_length=1, max_length=TASK_ID_LENGTH_MAX)]


class BatchBody(msgspec.Struct, rename="camel"):
    """A whole batch. What is said beside the items holds for each of them."""

    items: Annotated[list[BatchItemBody], Meta(min_length=1, max_length=ITEMS_MAX)]
    parent_run_id: Text | None = None
    resume_parent_on_completion: bool | None = False


class AnnouncementBody(msgspec.Struct, rename="camel"):
    """A batch whose items come later. Its key is the environment's, whatever the tasks of the items."""

    run_count: Annotated[int, Meta(ge=1, le=RUN_COUNT_MAX)]
    idempotency_key: Key | None = None
    idempotency_key_options: IdempotencyKeyOptions | None = None
    parent_run_id: Text | None = None
    resume_parent_on_completion: bool | None = False


class BatchLineBody(BatchItemBody, kw_only=True, rename="camel"):
    """One line of a stream of items, each of which is an object like this one."""

    index: Annotated[int, Meta(ge=0, description="Its place in the batch, below `runCount`")]


class TagsBody(msgspec.Struct):
    """Tags to add."""

    tags: Tags


class RescheduleBody(msgspec.Struct):
    """When the run is to be queued."""

    delay: Delay


class MetadataOperationBody(msgspec.Struct):
    """One change. `update` replaces the whole; `set`, `append`, `remove`, `delete` and `increment` name a key."""

    type: Literal["update", "set", "append", "remove", "delete", "increment"]
    key: str | None = None
    value: Json = None


class MetadataBody(msgspec.Struct, rename="camel"):
    """What to change: the whole of it first, then the operations in order."""

    metadata: dict[str, Any] | None = None
    operations: list[MetadataOperationBody] | None = []
    parent_operations: list[MetadataOperationBody] | None = []
    root_operations: list[MetadataOperationBody] | None = []


class ResetBody(msgspec.Struct, rename="camel"):
    """Whose key it is."""

    task_identifier: Text


class RunIdsBody(msgspec.Struct, rename="camel"):
    """Which dead letters, by their runs."""

    run_ids: RunId | Annotated[list[RunId], Meta(min_length=1, description=f"At most {RUN_IDS_MAX} different ones")]


class NameBody(msgspec.Struct):
    """What to call it."""

    name: str


class OptionalNameBody(msgspec.Struct):
    """What to call it; `prod` where nothing is said."""

    name: str | None = "prod"


class RotationBody(msgspec.Struct):
    """How long the replaced key goes on working: at most 90 days, `0s` for not at all."""

    overlap: Duration | None = "1d"


class FlagsBody(msgspec.Struct):
    """Values by the names of flags."""
