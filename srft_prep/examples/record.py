"""Record the example runs: really execute every scripted attempt and write mini-swe-agent files.

Thoughts and commands are scripted; every observation, patch and verdict is what happened. An
attempt is resolved when the hidden test and the visible tests, restored, pass on a fresh copy
with its submission applied, as in SWE-bench. Recording twice writes the same bytes. It takes
4 seconds on two cores.

    python -m srft_prep.examples.record -o DIR
"""

import json
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import click

from srft_prep.errors import FormatError
from srft_prep.examples.sandbox import TIMEOUT_SECONDS, WORK_PATH, Sandbox, open_sandbox
from srft_prep.examples.scenario import Scenario, load_scenarios

RUNS_DIR: Final = Path(__file__).parent / "runs"
STEP_LIMIT: Final = 14
"""Replies after which an attempt without a submission ends as `LimitsExceeded`."""

_PROMPT_DIR = Path(__file__).parent / "prompts"
_ACTION = re.compile(r"```bash\s*\n(.*?)\n```", re.DOTALL)
_SUBMIT_LINE = "COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """One executed attempt."""

    instance_id: str
    """Which scenario."""
    attempt: int
    """Which attempt at it, from 1."""
    messages: tuple[dict[str, str], ...]
    """The conversation as mini-swe-agent 1 keeps it: role and content only."""
    submission: str
    """The patch that was submitted; empty where the attempt ran out of replies."""
    exit_status: str
    """`Submitted` or `LimitsExceeded`."""
    resolved: bool
    """Whether the hidden test and the visible tests pass with the submission applied."""


def record_all(scenarios: Iterable[Scenario]) -> Iterator[Recording]:
    """Yield a recording of each attempt, by scenario and then by number."""
    jobs = [(scenario, number) for scenario in scenarios for number in sorted(scenario.attempts)]
    with ThreadPoolExecutor() as pool:
        yield from pool.map(lambda job: record_attempt(*job), jobs)


def record_attempt(scenario: Scenario, attempt: int) -> Recording:
    """Execute one attempt in a fresh working copy and return what happened.

    Raises:
        FormatError: a command ran too long, replies follow the submission, or the attempt
            neither submits nor uses all `STEP_LIMIT` replies.
    """
    replies = scenario.attempts[attempt]
    messages = [
        {"role": "system", "content": _read_prompt("system")},
        {"role": "user", "content": _read_prompt("instance").replace("{{task}}", scenario.task)},
    ]
    submission: str | None = None
    with open_sandbox(scenario.repository) as sandbox:
        for number, reply in enumerate(replies):
            if submission is not None:
                raise _script_error(scenario, attempt, f"reply {number} follows the submission")
            messages.append({"role": "assistant", "content": reply})
            answer, submission = _answer_reply(reply, sandbox)
            messages.append({"role": "user", "content": answer})
    if submission is None:
        if len(replies) != STEP_LIMIT:
            raise _script_error(scenario, attempt, f"expected a submission or {STEP_LIMIT} replies")
        messages.append({"role": "user", "content": ""})
    return Recording(
        instance_id=scenario.instance_id,
        attempt=attempt,
        messages=tuple(messages),
        submission=submission or "",
        exit_status="LimitsExceeded" if submission is None else "Submitted",
        resolved=bool(submission) and passes_hidden_tests(scenario, submission or ""),
    )


def passes_hidden_tests(scenario: Scenario, patch: str) -> bool:
    """Return whether all tests, visible and hidden, pass on a fresh copy with `patch` applied.

    Files under `tests/` are put back first: a patch cannot pass by changing what it is judged by.
    """
    visible_tests = {
        name: text for name, text in scenario.repository.items() if name.startswith("tests/")
    }
    with open_sandbox(scenario.repository) as sandbox:
        if patch:
            (sandbox.work_dir / "submission.patch").write_text(patch, encoding="utf-8")
            if sandbox.run("git apply submission.patch").returncode:
                return False
        sandbox.write_files(visible_tests | scenario.hidden_tests)
        return sandbox.run("python -m unittest").returncode == 0


def write_recordings(recordings: Iterable[Recording], folder: Path) -> dict[str, int]:
    """Write trajectories and one run summary an attempt number, and return the counts.

    Args:
        recordings: What to write; held in memory, as the whole set is under a megabyte.
        folder: Gets `attempt-K/INSTANCE/INSTANCE.traj.json` and `attempt-K/example.attempt-K.json`.
    """
    by_attempt: dict[int, list[Recording]] = {}
    for recording in recordings:
        by_attempt.setdefault(recording.attempt, []).append(recording)
        name = recording.instance_id
        path = folder / f"attempt-{recording.attempt}" / name / f"{name}.traj.json"
        _write_json(path, format_trajectory(recording))
    for attempt, group in by_attempt.items():
        path = folder / f"attempt-{attempt}" / f"example.attempt-{attempt}.json"
        _write_json(path, summarize_run(group))
    everything = [recording for group in by_attempt.values() for recording in group]
    return {
        "attempts": len(everything),
        "resolved": sum(recording.resolved for recording in everything),
        "unresolved": sum(not recording.resolved for recording in everything),
    }


def format_trajectory(recording: Recording) -> dict[str, Any]:
    """Return a recording as the document that mini-swe-agent 1.15 saves."""
    num_calls = sum(message["role"] == "assistant" for message in recording.messages)
    config = {
        "agent": {
            "system_template": _read_prompt("system"),
            "instance_template": _read_prompt("instance"),
            "format_error_template": _read_prompt("format_error"),
            "step_limit": STEP_LIMIT,
            "cost_limit": 0.0,
        },
        "model": {"model_name": "scripted", "model_kwargs": {}},
        "environment": {"cwd": WORK_PATH, "env": {}, "timeout": TIMEOUT_SECONDS},
        "agent_type": "srft_prep.examples.record",
        "model_type": "srft_prep.examples.scenario",
        "environment_type": "srft_prep.examples.sandbox.Sandbox",
    }
    return {
        "info": {
            "exit_status": recording.exit_status,
            "submission": recording.submission,
            "model_stats": {"instance_cost": 0.0, "api_calls": num_calls},
            "mini_version": "1.15.0",
            "config": config,
        },
        "messages": list(recording.messages),
        "trajectory_format": "mini-swe-agent-1",
        "instance_id": recording.instance_id,
    }


def summarize_run(recordings: list[Recording]) -> dict[str, Any]:
    """Return a run summary as SWE-bench's harness writes it (schema version 2)."""
    names = sorted(recording.instance_id for recording in recordings)
    empty = sorted(recording.instance_id for recording in recordings if not recording.submission)
    resolved = sorted(recording.instance_id for recording in recordings if recording.resolved)
    completed = [name for name in names if name not in empty]
    unresolved = [name for name in completed if name not in resolved]
    return {
        "total_instances": len(names),
        "submitted_instances": len(names),
        "completed_instances": len(completed),
        "resolved_instances": len(resolved),
        "unresolved_instances": len(unresolved),
        "empty_patch_instances": len(empty),
        "error_instances": 0,
        "completed_ids": completed,
        "incomplete_ids": [],
        "empty_patch_ids": empty,
        "submitted_ids": names,
        "resolved_ids": resolved,
        "unresolved_ids": unresolved,
        "error_ids": [],
        "schema_version": 2,
    }


def _answer_reply(reply: str, sandbox: Sandbox) -> tuple[str, str | None]:
    """Return the user message that answers a reply, and the submission if it was one."""
    actions = _ACTION.findall(reply)
    if len(actions) != 1:
        return _read_prompt("format_error").replace("{{actions|length}}", str(len(actions))), None
    result = sandbox.run(actions[0].strip())
    first_line, _, rest = result.output.lstrip().partition("\n")
    if first_line == _SUBMIT_LINE:
        return rest, rest
    return (
        f"<returncode>{result.returncode}</returncode>\n<output>\n{result.output}</output>",
        None,
    )


def _read_prompt(name: str) -> str:
    return (_PROMPT_DIR / f"{name}.md").read_text(encoding="utf-8").strip()


def _script_error(scenario: Scenario, attempt: int, problem: str) -> FormatError:
    return FormatError(f"{scenario.instance_id}.txtar: attempt-{attempt}.md: {problem}")


def _write_json(path: Path, document: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


@click.command()
@click.option(
    "-o",
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=RUNS_DIR,
    show_default="the package's own runs/",
    help="Folder for the recorded runs.",
)
def main(output: Path) -> None:
    """Execute all scripted attempts and write them as mini-swe-agent runs."""
    counts = write_recordings(record_all(load_scenarios()), output)
    click.echo(f"{output}: " + ", ".join(f"{count} {name}" for name, count in counts.items()))


if __name__ == "__main__":
    main()
