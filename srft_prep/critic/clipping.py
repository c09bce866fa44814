"""What is left of a trajectory's texts where they must fit: sizes in tokens, and cuts that hold.

Every text is counted once. One that is cut is counted again until it holds what it was given, since
the tokens of a text are not spread evenly over its characters.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Final, NamedTuple

from srft_prep.critic.encoding import Encoder
from srft_prep.critic.view import Piece, StepView, clipped, note

LEAST_PIECE_TOKENS: Final = 64
"""A step whose pieces would each be cut to less than this has its observations joined into one."""


class Shown(NamedTuple):
    """A trajectory, or what is left of it."""

    task: str
    context: str
    steps: Sequence[StepView]
    left_out: int
    """Tokens left out."""


class Cutter:
    """Cuts texts to size."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        (self.note_tokens,) = encoder.count([note(9_999_999)])
        """What the note takes that says how much was left out; less than that is not cut."""

    def cut(self, text: str, num_tokens: int, limit: int) -> tuple[str, int]:
        """Return a text with at most `limit` tokens and a note left, and how many were left out."""
        limit = max(limit, 0)
        if num_tokens <= limit + self.note_tokens:
            return text, 0
        left_out = num_tokens - limit
        num_chars = len(text) * limit // num_tokens
        while True:
            shorter = clipped(text, num_chars=num_chars, left_out=left_out)
            (found,) = self.encoder.count([shorter])
            if found <= limit + self.note_tokens or not num_chars:
                return shorter, left_out
            num_chars = num_chars * limit // found


class Sized:
    """A trajectory's texts with their sizes, each counted once."""

    def __init__(self, shown: Shown, cutter: Cutter) -> None:
        self.shown = shown
        self._cutter = cutter
        pieces = [piece.text for view in shown.steps for piece in view.pieces]
        self._task, self.context_tokens, *sizes = cutter.encoder.count(
            [shown.task, shown.context, *pieces]
        )
        rest = iter(sizes)
        self._sizes = [[next(rest) for _ in view.pieces] for view in shown.steps]

    def task_tokens(self, limit: int) -> int:
        """Return the size of the task, cut."""
        return self._cut_size(self._task, limit)

    def step(self, index: int, limit: int, *, action_limit: int | None = None) -> int:
        """Return the size of a step, its observations cut, and its action where it has a limit."""
        action, *others = self._sizes[index]
        if action_limit is not None:
            action = self._cut_size(action, action_limit)
        return action + sum(self._cut_size(size, limit) for size in others)

    def total(self, limit: int) -> int:
        """Return the size of all steps, cut."""
        return sum(self.step(index, limit) for index in range(len(self._sizes)))

    def limit_for(self, steps: Sequence[int], room: int, *, most: int) -> int:
        """Return what each piece of some steps may take for all to fit `room`, 0 to `most`."""
        least = 0
        while least < most:
            middle = (least + most + 1) // 2
            if sum(self.step(index, middle, action_limit=middle) for index in steps) <= room:
                least = middle
            else:
                most = middle - 1
        return least

    def clipped(
        self,
        steps: Sequence[int],
        limit: int,
        *,
        task_limit: int,
        action_limit: int | None = None,
    ) -> Shown:
        """Return some steps with what is above the limits left out."""
        cut = self._cutter.cut
        task, left_out = cut(self.shown.task, self._task, task_limit)
        left_out += self.shown.left_out
        views: list[StepView] = []
        for index in steps:
            pieces: list[Piece] = []
            view = self.shown.steps[index]
            for piece, size in zip(view.pieces, self._sizes[index], strict=True):
                most = limit if pieces else action_limit
                if most is not None:
                    text, missing = cut(piece.text, size, most)
                    piece = replace(piece, text=text)
                    left_out += missing
                pieces.append(piece)
            views.append(replace(view, pieces=tuple(pieces)))
        return Shown(task, self.shown.context, views, left_out)

    def with_fewer_pieces(self, most: int) -> "Sized":
        """Return the same texts, the observations joined in steps of more than `most` pieces."""
        if all(len(view.pieces) <= most for view in self.shown.steps):
            return self
        steps = [
            view if len(view.pieces) <= most else _joined_observations(view)
            for view in self.shown.steps
        ]
        return Sized(self.shown._replace(steps=steps), self._cutter)

    def _cut_size(self, size: int, limit: int) -> int:
        return min(size, limit + self._cutter.note_tokens)


def _joined_observations(view: StepView) -> StepView:
    action, *others = view.pieces
    text = "".join(map(str, others)).rstrip("\n")
    return replace(view, pieces=(action, Piece(tag="observations", text=text)))
