"""Answers that were cut off for want of output tokens: when a run of nothing else ends."""

from typing import Final

from srft_prep.errors import BackendError

CUT_TWICE: Final = 10
"""Requests whose both answers were cut off, with nothing else before, that end a run: 20 answers
paid for nothing."""


class OnlyCutAnswers(BackendError):
    """A run's answers were all cut off; another engine with the same model would do no better."""


class CutAnswers:
    """What became of a run's requests so far, as far as it matters."""

    def __init__(self, model: str) -> None:
        """Begin with the first request; the model's name is for the error."""
        self._model = model
        self._num_twice: int | None = 0
        """None once something else came of a request."""

    def note(self, *, is_twice: bool) -> OnlyCutAnswers | None:
        """Note what came of a request; return the error that the run is to end with.

        Args:
            is_twice: whether its answer was cut off, and so was the one with twice the room.
        """
        if not is_twice:
            self._num_twice = None
        if self._num_twice is None:
            return None
        self._num_twice += 1
        if self._num_twice < CUT_TWICE:
            return None
        return OnlyCutAnswers(
            f"{self._model}: expected labels, got only answers that were cut off, of {CUT_TWICE} "
            "requests also with twice the room, so the rest were not sent (the model thinks before "
            "it answers, or does not stop: give --reasoning low or another model; what is labelled "
            "is kept)"
        )
