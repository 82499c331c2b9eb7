"""Requests in raw ids, as ``Run.predict`` takes them, to questions in indices."""

import difflib
from collections.abc import Sequence

import numpy as np

from ckf.data.prepared import PreparedData
from ckf.prompts import ANSWERS, Question

_FIELDS = {"task", "user", "item", "candidates", "review", "history", "time"}


class Names:
    """Raw ids to indices, with errors that name the request.

    Args:
        data: whose ids are read once, here.
        tasks: that the run knows.
    """

    def __init__(self, data: PreparedData, tasks: Sequence[str]) -> None:
        self.data, self.tasks = data, tasks
        self.users = {name: i for i, name in enumerate(data.user_ids)}
        self.items = {name: i for i, name in enumerate(data.item_ids)}

    def question(self, request: dict, where: str) -> tuple[Question, int, np.ndarray]:
        """The question, the user's index (-1: a stranger) and the history (H,), -1 before it.

        Raises ValueError that begins with ``where``.
        """
        task = self._field(request, "task", where)
        unknown = sorted(request.keys() - _FIELDS)
        if unknown:
            near = difflib.get_close_matches(str(unknown[0]), _FIELDS, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(_FIELDS))}"
            raise ValueError(f"{where} has the field {unknown[0]!r}; {hint}")
        if task not in self.tasks:
            raise ValueError(f"{where}: task is {task!r}; this run knows {', '.join(self.tasks)}")
        user = self.users.get(str(self._field(request, "user", where)), -1)
        question = Question(task, [])
        if task == "topk":
            names = self._names(request, "candidates", where)
            question.candidates = [self._item(n, where) for n in names]
            if len(set(question.candidates)) < len(names):
                raise ValueError(f"{where}: candidates {names!r} name an item twice")
            if not 2 <= len(names) <= len(ANSWERS["topk"]):
                raise ValueError(
                    f"{where}: {len(names)} candidates; expected 2 to {len(ANSWERS['topk'])}"
                )
        else:
            question.item = self._item(self._field(request, "item", where), where)
        if task == "review_rating":
            question.review = str(self._field(request, "review", where))
        asked = question.candidates if task == "topk" else [question.item]
        history = self._history(request, user, asked, where)
        question.history = [int(i) for i in history if i >= 0]
        return question, user, history

    def _history(self, request: dict, user: int, asked: list[int], where: str) -> np.ndarray:
        width = self.data.history.shape[1]
        if "history" in request:
            items = [self._item(n, where) for n in self._names(request, "history", where)]
            items = items[-width:]
        elif user < 0:
            raise ValueError(
                f'{where}: user {request["user"]!r} is not in the data; give "history", a list '
                "of item ids the user liked (it may be empty)"
            )
        else:
            ends = np.array([user, user + 1], self.data.user.dtype)  # else all would be converted
            own = slice(*np.searchsorted(self.data.user, ends))  # rows lie sorted by user, time
            liked = (self.data.label[own] == 1) & ~np.isin(self.data.item[own], asked)
            if "time" in request:
                liked &= self.data.time[own] < self._time(request["time"], where)
            items = self.data.item[own][liked][-width:].tolist()
        return np.array([-1] * (width - len(items)) + list(items), np.int64)

    def _names(self, request: dict, name: str, where: str) -> list:
        value = self._field(request, name, where)
        if not isinstance(value, list | tuple | np.ndarray):
            raise ValueError(f"{where}: {name} is {value!r}, expected a list of item ids")
        return list(value)

    @staticmethod
    def _time(value, where: str) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{where}: time is {value!r}, expected seconds as in the data")
        return value

    def _item(self, name, where: str) -> int:
        if str(name) not in self.items:
            raise ValueError(
                f"{where}: item {name!r} is not in the data; the run knows {len(self.items)} "
                f"items, such as {self.data.item_ids[0]!r}"
            )
        return self.items[str(name)]

    @staticmethod
    def _field(request: dict, name: str, where: str):
        if not isinstance(request, dict) or name not in request:
            raise ValueError(f"{where} lacks {name!r}: {request!r}")
        return request[name]
