"""From the names of tasks to what is scored. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from megazebra.data.corpus.indexed_corpus import Corpus
from megazebra.errors import UserError
from megazebra.evaluate.cell import Cell
from megazebra.evaluate.positions import context_cells, position_cells
from megazebra.evaluate.recall.answers import AnswerCell, Task
from megazebra.evaluate.recall.filler import Filler
from megazebra.evaluate.recall.text_tasks import depth_tasks, ruler_tasks
from megazebra.evaluate.recall.texts import Encoder
from megazebra.evaluate.recall.token_tasks import token_tasks

TEXT_TASKS = ("positions", "contexts")
DEPTH_TASKS = ("passkey", "kv", "copy")
TASKS = (*TEXT_TASKS, *DEPTH_TASKS, "ruler")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to evaluate; the same plan gives the same questions on every machine.

    tasks: of TASKS. lengths: of sequences, in tokens. depths: of answers, 0 to 1. samples: of each cell. contexts:
    tokens before the last `final` ones, in the task `contexts`; None: `lengths`. buckets: equal ones of positions;
    None: octaves.
    corpus: held-out text for positions and contexts. encoder: of the tasks in words; None: passkey, kv and copy are
    made of bare tokens of `vocab_size`.
    """

    tasks: Sequence[str]
    lengths: Sequence[int]
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0)
    samples: int = 20
    contexts: Sequence[int] | None = None
    final: int = 128
    buckets: int | None = None
    seed: int = 1234
    vocab_size: int
    corpus: Corpus | None = None
    encoder: Encoder | None = None
    filler: Filler = field(default_factory=Filler)

    def __post_init__(self) -> None:
        if unknown := [task for task in self.tasks if task not in TASKS]:
            raise UserError(f"there is no task {unknown[0]!r}; the tasks are {', '.join(TASKS)}")
        if not self.tasks or not self.lengths or min(self.lengths) < 1 or self.samples < 1:
            raise UserError(f"nothing to evaluate: tasks {self.tasks}, lengths {self.lengths}, {self.samples} samples")
        if wrong := [depth for depth in self.depths if not 0 <= depth <= 1]:
            raise UserError(f"depth {wrong[0]:.0%} is outside of the text; depths go from 0 to 100 percent")

    def cells(self) -> list[Cell]:
        """Raises UserError when a task lacks the corpus or tokenizer it needs, no document is long enough, or its
        question does not fit the shortest length.
        """
        cells: list[Cell] = []
        for task in self.tasks:
            if task == "positions":
                corpus = self._needed_corpus(task)
                cells += position_cells(corpus, self.lengths, self.samples, self.seed, self.buckets)
            elif task == "contexts":
                contexts = self.lengths if self.contexts is None else self.contexts
                cells += context_cells(self._needed_corpus(task), contexts, self.final, self.samples, self.seed)
            elif task == "ruler":
                cells += self._answers(self._ruler_tasks(), (None,))
            else:
                cells += self._answers({task: self._depth_tasks()[task]}, self.depths)
        return cells

    def _answers(self, tasks: Mapping[str, Task], depths: Sequence[float | None]) -> list[AnswerCell]:
        cells = [
            AnswerCell(name, task, self.samples, length, depth, self.seed)
            for name, task in tasks.items()
            for length in self.lengths
            for depth in depths
        ]
        for cell in cells:
            if cell.length == min(self.lengths):
                cell.question(0)  # what doesn't fit shows now, and not after hours
        return cells

    def _depth_tasks(self) -> Mapping[str, Task]:
        return token_tasks(self.vocab_size) if self.encoder is None else depth_tasks(self.encoder, self.filler)

    def _ruler_tasks(self) -> Mapping[str, Task]:
        if self.encoder is None:
            raise UserError("the task ruler is made of words and needs a tokenizer; give --tokenizer")
        return ruler_tasks(self.encoder, self.filler)

    def _needed_corpus(self, task: str) -> Corpus:
        if self.corpus is None:
            raise UserError(f"the task {task} needs a held-out corpus; give its prefix with --data")
        return self.corpus
