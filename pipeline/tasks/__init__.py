"""What a model is compressed for: a table of tasks, each with its reader, features, losses and metric."""

from __future__ import annotations

from collections.abc import Mapping

from tilewright.errors import InvalidInput
from tilewright.pipeline.tasks import embedding, question_answering, sequence_classification, token_classification
from tilewright.pipeline.tasks.base import Task

TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (question_answering.TASK, sequence_classification.TASK, token_classification.TASK, embedding.TASK)
}

ALIASES = {"squad": "question_answering", "tokens": "token_classification", "classification": "sequence_classification"}


def find_task(name: str) -> Task:
    """The task called `name`, or by one of its short names; raises InvalidInput."""
    try:
        return TASKS[ALIASES.get(name, name)]
    except KeyError:
        raise InvalidInput(f"task {name} is unknown; choose one of {', '.join((*TASKS, *ALIASES))}") from None
