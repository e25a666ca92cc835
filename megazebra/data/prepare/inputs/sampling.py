"""A spread of the training text, to learn a tokenizer from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from megazebra.data.prepare.inputs.files import content_hash, name_bytes
from megazebra.data.prepare.inputs.records import RecordOptions, read_items
from megazebra.data.prepare.inputs.tasks import Task, TextDocument, TextTask

# Files opened for their first records; more of them would cost more than they tell.
MOST_RECORD_TASKS = 512


def sample_texts(tasks: Sequence[Task], options: RecordOptions, limit_bytes: int) -> Iterator[str]:
    """Training texts of about `limit_bytes` in all, the same for the same tasks.

    Text files and records get a share by their size: text files as a choice of whole documents by hash of their
    names, records as the first of every task. Bad records are left out here; encoding complains of them.
    """
    total_bytes = max(1, sum(task.bytes for task in tasks))
    texts = [document for task in tasks if isinstance(task, TextTask) for document in task.documents]
    text_bytes = sum(document.bytes for document in texts)
    text_limit = limit_bytes * text_bytes // total_bytes
    chosen = _spread([document for document in texts if not document.validation], text_limit)
    skipping = replace(options, skip_bad_records=True)
    for item in read_items(TextTask(tuple(chosen)), skipping):
        if item.record is not None:
            yield item.record
    yield from _first_records(
        [task for task in tasks if not isinstance(task, TextTask)], skipping, limit_bytes - text_limit
    )


def _spread(documents: Sequence[TextDocument], limit_bytes: int) -> list[TextDocument]:
    chosen: list[TextDocument] = []
    chosen_bytes = 0
    for document in sorted(documents, key=lambda document: content_hash(name_bytes(document.name))):
        if chosen and chosen_bytes + document.bytes > limit_bytes:
            continue
        chosen.append(document)
        chosen_bytes += document.bytes
    return sorted(chosen, key=lambda document: document.name)


def _first_records(tasks: Sequence[Task], options: RecordOptions, limit_bytes: int) -> Iterator[str]:
    stride = -(-len(tasks) // MOST_RECORD_TASKS) or 1
    # What a small task leaves of its share goes to the larger ones.
    chosen = sorted(tasks[::stride], key=lambda task: task.bytes)
    for tasks_before, task in enumerate(chosen):
        share = limit_bytes // (len(chosen) - tasks_before)
        for item in read_items(task, options):
            if share <= 0:
                break
            if item.record is not None and not item.validation:
                yield item.record
                share -= item.bytes
                limit_bytes -= item.bytes
