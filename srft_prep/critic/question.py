"""A trajectory -> the questions that a model is asked about it.

A trajectory that fits is asked about whole, in one request, as the paper does. One that does not:

1. the middle of long observations is left out, as little of it as makes the rest fit;
2. where that does not suffice, windows of steps are asked about one by one, each with a digest of
   the steps before and after it, a line a step; a step that fills a window by itself is clipped.

What was left out is said in its place, counted in `clipped_tokens` and named by the request's part.
Every step is in exactly one window. The text that requests of a trajectory share comes first, for
prefix caches. Cost: one pass of the tokenizer over the text, two or three where it does not fit.

A limit leaves room beside the prompt's own words. Of that the task takes a quarter at most, what is
told beside the trajectory an eighth, either digest a tenth, and the steps the rest.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

import orjson

from srft_prep.config import OUTCOMES, Context
from srft_prep.critic import CriticRequest, Question
from srft_prep.critic.clipping import LEAST_PIECE_TOKENS, Cutter, Shown, Sized
from srft_prep.critic.encoding import Encoder
from srft_prep.critic.parts import Part, context_hash
from srft_prep.critic.prompt import RATIONALE_CHARS, Prompt, answer_form
from srft_prep.critic.view import StepView, digest_line, joined, steps_of, task_of
from srft_prep.errors import ConfigError
from srft_prep.types import Trajectory

Reasoning = Literal["none", "low", "medium", "high"]

REASONING_TOKENS: Final[dict[str, int]] = {"none": 0, "low": 2048, "medium": 8192, "high": 24576}
"""Tokens that a model may think before it answers."""
VOTE_TEMPERATURE: Final = 1.0
"""Temperature where one question is asked several times; once, it is 0."""

RENDERING: Final = 1
"""Version of how a trajectory is shown; a part of the prompt's hash."""
OBSERVATION_LIMITS: Final = (8192, 4096, 2048, 1024, 512, 256)
"""Tokens left of an observation, tried in this order."""
WINDOW_OBSERVATION_TOKENS: Final = 1024
"""Tokens left of an observation where a trajectory is asked about in windows."""
SPARSE_CHARS_PER_TOKEN: Final = 5
"""Texts with more characters for a token are rare: what has so many hardly fits."""
LEAST_TASK_TOKENS: Final = 256
LEAST_STEP_TOKENS: Final = 512
"""What must fit beside the prompt's own words."""
OTHER_PROPERTY_TOKENS: Final = 512
"""What a property of the prompt's schema beside `labels` may take."""
_DIGEST_NOTE_TOKENS: Final = 16
_TRIES: Final = 12

_EMPTY: Final = Shown("", "", (), 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuestionSettings:
    """How steps are asked about, whatever the backend."""

    prompt: Prompt
    rationale: bool = False
    """Ask for a sentence on every step before its label."""
    context: Context = "none"
    """What is told beside the trajectory: nothing, the outcome, or the outcome and the patch."""
    votes: int = 1
    """How often every question is asked; the labels' probabilities are the mean of the answers."""
    reasoning: Reasoning = "none"
    """How much a reasoning model may think before it answers."""
    max_input_tokens: int | None = None
    """Longest prompt; None for what the model takes."""

    @property
    def temperature(self) -> float:
        """0 for one answer, 1 where there are votes."""
        return 0.0 if self.votes == 1 else VOTE_TEMPERATURE

    @property
    def prompt_hash(self) -> str:
        """Hash of all that shapes the labels beside the model and what was left out."""
        shaping = [
            RENDERING,
            self.prompt.prompt_hash,
            self.rationale,
            self.context,
            self.reasoning,
            self.temperature,
        ]
        return hashlib.blake2b(orjson.dumps(shaping), digest_size=8).hexdigest()


class Planner:
    """Turns trajectories into requests; a pure function of its settings and the trajectory."""

    def __init__(
        self,
        settings: QuestionSettings,
        encoder: Encoder,
        *,
        max_input_tokens: int,
        context_tokens: int | None = None,
    ) -> None:
        """Measure what the prompt itself takes.

        Args:
            settings: how to ask.
            encoder: counts tokens as the model does.
            max_input_tokens: longest prompt.
            context_tokens: longest prompt and answer together; None for no limit of its own.

        Raises:
            ConfigError: the prompt and one step do not fit, or the prompt has no place for the
                context asked for.
        """
        self.settings = settings
        self.prompt_hash = settings.prompt_hash
        self.max_input_tokens = max_input_tokens
        self.context_tokens = context_tokens
        self._encoder = encoder
        prompt = settings.prompt
        if settings.context != "none" and not prompt.takes_context:
            raise ConfigError(
                f"--context {settings.context}: expected {{context}} in the user part of the "
                f"prompt {prompt.name}, got none (write it before {{steps}})"
            )
        self._cutter = Cutter(encoder)
        shared, rest = self._fill(_EMPTY, (9998, 9999), _with_digests("-", "-", "-"))
        self._own_tokens, _ = encoder.prompt(prompt.system, shared + rest)
        sizes = encoder.count(
            [
                "<step 9999>\n</step>\n",
                "<observation>\n\n</observation>\n",
                '"9999":"unnecessary",',
                '"99":"good",',
            ]
        )
        self._step_tokens, self._piece_tokens, self._label_tokens, self._usual_label_tokens = sizes
        # A request's part names this limit, so it says what the model's context leaves, too.
        self.max_input_tokens = self._room((0,))
        self._spare = self.max_input_tokens - self._own_tokens
        self._refuse_small_context()

    def plan(self, trajectory: Trajectory, *, scale: float = 1.0) -> list[CriticRequest]:
        """Return the requests that together ask for every step of a trajectory, once.

        With a `scale` below 1 they fit that part of the limit: for a model that found those of a
        larger one over-long.

        Raises:
            ConfigError: the prompt and one step do not fit that part of the limit.
        """
        if scale != 1.0:
            return self._scaled(scale).plan(trajectory)
        views = steps_of(trajectory)
        if not views:
            return []
        context, left_out = self._context(trajectory)
        everything = Shown(task_of(trajectory), context, views, left_out)
        steps = tuple(range(len(views)))
        sized = self._sized_if_too_long(everything, steps)
        question = None if sized else self._question(everything, steps)
        if question is None or not self._fits(question, steps):
            planned = list(self._limited(sized or Sized(everything, self._cutter)))
        elif left_out:
            planned = [(self._part(steps), steps, question, left_out)]
        else:
            planned = [(Part(), steps, question, 0)]
        told = context_hash(self.settings.context, trajectory.resolved, trajectory.patch)
        return [
            CriticRequest.of(
                trajectory,
                part=str(replace(part, context=told, vote=vote)),
                steps=asked,
                clipped_tokens=left_out,
                question=question,
            )
            for part, asked, question, left_out in planned
            for vote in range(self.settings.votes)
        ]

    def _scaled(self, scale: float) -> "Planner":
        return Planner(
            self.settings,
            self._encoder,
            max_input_tokens=int(self.max_input_tokens * scale),
            context_tokens=self.context_tokens,
        )

    def _sized_if_too_long(self, everything: Shown, steps: Sequence[int]) -> Sized | None:
        """Return the sizes of a trajectory that cannot fit; None where it must be tried.

        Spares what does not fit by far a pass of the tokenizer over the whole of it.
        """
        texts = (piece.text for view in everything.steps for piece in view.pieces)
        num_chars = len(everything.task) + len(everything.context) + sum(map(len, texts))
        room = self._room(steps)
        if num_chars < SPARSE_CHARS_PER_TOKEN * room:
            return None
        sized = Sized(everything, self._cutter)
        given = self._own_tokens + sized.context_tokens + sized.task_tokens(num_chars)
        given += sum(map(self._overhead, everything.steps))
        return sized if given + sized.total(num_chars) > 1.05 * room else None

    def _limited(self, sized: Sized) -> Iterator[tuple[Part, tuple[int, ...], Question, int]]:
        """Yield the requests about a trajectory that does not fit."""
        everything = sized.shown
        task_limit = self._spare // 4
        steps = tuple(range(len(everything.steps)))
        given = self._own_tokens + sized.context_tokens + sized.task_tokens(task_limit)
        given += sum(map(self._overhead, everything.steps))
        for limit in OBSERVATION_LIMITS:
            if given + sized.total(limit) > self._room(steps):
                continue
            shown = sized.clipped(steps, limit, task_limit=task_limit)
            question = self._question(shown, steps)
            if self._fits(question, steps):
                yield self._part(steps), steps, question, shown.left_out
                return
        lines = _Digest(everything.steps, self._encoder, limit=self._spare // 10)
        pieces = max(self._step_room(sized, task_limit) // self._least_piece_tokens, 2)
        sized = sized.with_fewer_pieces(pieces)
        for window in self._windows(sized, task_limit):
            shown, question = self._window(sized, window, task_limit, lines)
            yield self._part(window), window, question, shown.left_out

    def _part(self, steps: Sequence[int]) -> Part:
        return Part(first=steps[0], last=steps[-1], limit=self.max_input_tokens)

    def _step_room(self, sized: Sized, task_limit: int, num_steps: int = 1) -> int:
        """Return what is left for the steps of a window."""
        given = self._own_tokens + sized.context_tokens + sized.task_tokens(task_limit)
        return self._room(range(num_steps)) - given - 2 * (self._spare // 10)

    @property
    def _least_piece_tokens(self) -> int:
        return self._piece_tokens + self._cutter.note_tokens + LEAST_PIECE_TOKENS

    def _windows(self, sized: Sized, task_limit: int) -> Iterator[tuple[int, ...]]:
        """Yield the steps of each window: as many as fit, in order."""
        window: list[int] = []
        taken = 0
        for step, view in enumerate(sized.shown.steps):
            tokens = sized.step(step, WINDOW_OBSERVATION_TOKENS) + self._overhead(view)
            room = self._step_room(sized, task_limit, len(window) + 1)
            if window and taken + tokens > room:
                yield tuple(window)
                window, taken = [], 0
            window.append(step)
            taken += tokens
        yield tuple(window)

    def _window(
        self, sized: Sized, window: tuple[int, ...], task_limit: int, lines: "_Digest"
    ) -> tuple[Shown, Question]:
        """Return a window's question, its texts cut until it fits."""
        before, after = lines.around(window)
        room = self._step_room(sized, task_limit, len(window))
        room -= sum(self._overhead(sized.shown.steps[step]) for step in window)
        limit = WINDOW_OBSERVATION_TOKENS
        action_limit: int | None = None
        if len(window) == 1:
            limit = action_limit = sized.limit_for(window, room, most=self.max_input_tokens)
        for _ in range(_TRIES):
            shown = sized.clipped(window, limit, task_limit=task_limit, action_limit=action_limit)
            question = self._question(shown, window, before=before, after=after)
            if self._fits(question, window):
                break
            shown_tokens = sum(
                sized.step(step, limit, action_limit=action_limit) for step in window
            )
            room = min(room, shown_tokens) - (question.prompt_tokens - self._room(window))
            action_limit = sized.limit_for(window, room, most=self.max_input_tokens)
            limit = min(limit, action_limit)
        return shown, question

    def _question(
        self, shown: Shown, steps: tuple[int, ...], *, before: str = "", after: str = ""
    ) -> Question:
        text = _with_digests(joined(shown.steps), before, after)
        shared, rest = self._fill(shown, steps, text)
        system = self.settings.prompt.system
        num_tokens, ids = self._encoder.prompt(system, shared + rest)
        return Question(
            system=system,
            shared=shared,
            rest=rest,
            schema=self.settings.prompt.schema_for(steps, rationale=self.settings.rationale),
            prompt_tokens=num_tokens,
            output_tokens=self._usual_tokens(len(steps)),
            max_output_tokens=self._output_tokens(len(steps)),
            prompt_ids=ids,
        )

    def _fill(self, shown: Shown, steps: tuple[int, ...], text: str) -> tuple[str, str]:
        return self.settings.prompt.fill(
            task=shown.task,
            context=shown.context,
            steps=text,
            first_step=steps[0],
            last_step=steps[-1],
            answer=answer_form(steps, rationale=self.settings.rationale),
        )

    def _context(self, trajectory: Trajectory) -> tuple[str, int]:
        """Return what is told beside the trajectory, and how many tokens of it are left out."""
        if self.settings.context == "none":
            return "", 0
        outcome = OUTCOMES[trajectory.resolved]
        text, left_out = f"\nWhat came of the run: {outcome}.\n", 0
        if self.settings.context == "patch" and trajectory.patch:
            (num_tokens,) = self._encoder.count([trajectory.patch])
            patch, left_out = self._cutter.cut(trajectory.patch, num_tokens, self._spare // 8)
            text += f"The change that it left behind:\n\n<patch>\n{patch}\n</patch>\n"
        return text, left_out

    def _output_tokens(self, num_steps: int) -> int:
        """Return the bound of an answer: the longest one, half as much again, and the thoughts."""
        each = self._label_tokens + (RATIONALE_CHARS // 2 if self.settings.rationale else 0)
        others = len(self.settings.prompt.output_schema["properties"]) - 1
        thoughts = REASONING_TOKENS[self.settings.reasoning]
        return 64 + num_steps * each * 3 // 2 + others * OTHER_PROPERTY_TOKENS + thoughts

    def _usual_tokens(self, num_steps: int) -> int:
        """Return what an answer takes that says good of most steps, about."""
        each = self._usual_label_tokens + (RATIONALE_CHARS // 8 if self.settings.rationale else 0)
        return 6 + num_steps * each + REASONING_TOKENS[self.settings.reasoning] // 4

    def _room(self, steps: Sequence[int]) -> int:
        """Return how long the prompt about some steps may be."""
        if self.context_tokens is None:
            return self.max_input_tokens
        return min(self.max_input_tokens, self.context_tokens - self._output_tokens(len(steps)))

    def _fits(self, question: Question, steps: Sequence[int]) -> bool:
        return question.prompt_tokens <= self._room(steps)

    def _overhead(self, view: StepView) -> int:
        return self._step_tokens + len(view.pieces) * self._piece_tokens

    def _refuse_small_context(self) -> None:
        least = self._own_tokens + LEAST_TASK_TOKENS + LEAST_STEP_TOKENS
        room = self._room((0,))
        if room < least:
            raise ConfigError(
                f"--max-input-tokens, or the model's context less the answer, leaves "
                f"{max(room, 0)} tokens for a prompt; {self.settings.prompt.name} with one step "
                f"needs {least} (raise the one that is too small, or shorten the prompt)"
            )


class _Digest:
    """Steps told in a line each, nearest first, as many as a limit allows."""

    def __init__(self, steps: Sequence[StepView], encoder: Encoder, *, limit: int) -> None:
        self._lines = [digest_line(step) for step in steps]
        self._sizes = encoder.count(self._lines)
        self._limit = limit

    def around(self, window: tuple[int, ...]) -> tuple[str, str]:
        """Return what came before and after a window."""
        before = self._nearest(range(window[0] - 1, -1, -1))
        after = self._nearest(range(window[-1] + 1, len(self._lines)))
        return "\n".join(reversed(before)), "\n".join(after)

    def _nearest(self, steps: range) -> list[str]:
        left = self._limit - _DIGEST_NOTE_TOKENS
        kept: list[str] = []
        for step in steps:
            left -= self._sizes[step] + 1
            if left < 0:
                return [*kept, f"[... {len(steps) - len(kept)} steps left out ...]"]
            kept.append(self._lines[step])
        return kept


def _with_digests(text: str, before: str, after: str) -> str:
    if before:
        text = f"<earlier steps>\n{before}\n</earlier steps>\n{text}"
    if after:
        text = f"{text}\n<later steps>\n{after}\n</later steps>"
    return text
