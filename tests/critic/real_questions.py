"""Questions about the real runs in the shared data."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from srft_prep.critic import CriticRequest
from srft_prep.critic.prompt import load_prompt
from srft_prep.critic.question import QuestionSettings
from srft_prep.readers import reader_of
from srft_prep.records import discover, records
from srft_prep.types import Trajectory

PROMPT = Path(__file__).resolve().parents[2] / "prompts" / "step_critic.md"


def settings_of(*, max_input_tokens: int | None = 2000, **fields: object) -> QuestionSettings:
    """Return settings with the package's prompt; short prompts, so that a CPU answers many."""
    prompt = load_prompt(PROMPT)
    return QuestionSettings(prompt=prompt, max_input_tokens=max_input_tokens, **fields)


def with_room(request: CriticRequest, num_tokens: int, **changes: Any) -> CriticRequest:
    """Return a request whose answer may have so many tokens, with other changes of its question."""
    assert request.question is not None
    question = replace(request.question, max_output_tokens=num_tokens, **changes)
    return replace(request, question=question)


def real_trajectories(shared_data: Path, *, source: str = "gruckion") -> Iterator[Trajectory]:
    """Yield the trajectories of the sources whose name begins so."""
    for folder in sorted((shared_data / "trajectories").glob(f"{source}*")):
        for path in discover([str(folder)]):
            for record in records(path):
                if record.error is None and path.name.endswith(".traj.json"):
                    yield reader_of(record.value).read(record.value, origin=record.origin)
