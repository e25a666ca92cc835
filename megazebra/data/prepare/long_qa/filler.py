"""The texts that facts are planted in."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from megazebra.data.errors import CorpusError
from megazebra.data.prepare.encoders.encoded import is_unicode
from megazebra.data.prepare.inputs.files import gather_files
from megazebra.data.prepare.inputs.records import RecordOptions, read_items
from megazebra.data.prepare.inputs.tasks import Task, plan_tasks, text_documents, with_nearest_held_out

TASK_BYTES = 2**20


class Filler:
    """Documents of a corpus end to end, in an order of the seed's, as often as needed.

    inputs, globs, text_key: as tools/preprocess_data.py has them. validation: read the documents that are held out
    (by hash, `share` of them); those for training where the corpus is too small to have any.
    """

    def __init__(
        self,
        inputs: Sequence[str],
        globs: Sequence[str] = (),
        *,
        text_key: str = "text",
        share: float,
        validation: bool,
        seed: int,
    ) -> None:
        files = gather_files(inputs, globs)
        plain = [file for file in files if not file.holds_records]
        records = [file for file in files if file.holds_records]
        texts = text_documents(plain, "file", share)
        if not records:
            texts = with_nearest_held_out(texts)
        self._tasks = plan_tasks(texts, records, (text_key,), TASK_BYTES)
        random.Random(seed).shuffle(self._tasks)
        self._options = RecordOptions(text_key=text_key, skip_bad_records=True, validation_share=share)
        self._validation = validation
        self._documents = self._endless()
        self._rest = ""

    def take(self, characters: int) -> str:
        """The next text of at least that many characters; whole lines, where lines are short."""
        parts, size = [self._rest], len(self._rest)
        while size < characters:
            parts.append(next(self._documents))
            size += len(parts[-1])
        text = "".join(parts)
        end = text.find("\n", characters) + 1 or len(text)
        self._rest = text[end:]
        return text[:end]

    def _endless(self) -> Iterator[str]:
        wanted = self._validation and any(self._texts(self._tasks, True))
        while True:
            found = False
            for text in self._texts(self._tasks, wanted):
                found = True
                yield text
            if not found:
                raise CorpusError("the input holds no text to plant facts in; give other files, or another --text-key")

    def _texts(self, tasks: Sequence[Task], validation: bool) -> Iterator[str]:
        for task in tasks:
            for item in read_items(task, self._options):
                text = item.record
                if item.validation == validation and text is not None and text.strip() and is_unicode(text):
                    yield text if text.endswith("\n") else text + "\n"
