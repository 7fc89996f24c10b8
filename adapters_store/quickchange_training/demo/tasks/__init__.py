"""The demo tasks by name."""

from __future__ import annotations

from quickchange_training.demo.tasks.docstring import Docstring
from quickchange_training.demo.tasks.order_json import OrderJson
from quickchange_training.demo.tasks.sql import Sql
from quickchange_training.demo.tasks.task import Split, Task, TaskExample

TASKS: dict[str, Task] = {task.name: task for task in (OrderJson(), Sql(), Docstring())}

__all__ = ["TASKS", "Split", "Task", "TaskExample"]
