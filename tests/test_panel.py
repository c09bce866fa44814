"""Laws of panels: what several critics' answers make, whatever they say."""

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import orjson
import polars as pl
from hypothesis import given, settings
from hypothesis import strategies as st

from srft_prep.calibration import Calibration, FittedOn
from srft_prep.config import LabelConfig
from srft_prep.critic.scripted import ScriptedCritic
from srft_prep.labeling import label_together
from srft_prep.panel import Panel, config_of, is_audited, is_sure
from srft_prep.types import LABELS
from srft_prep.verification import verify
from tests.stages import trajectory, write_trajectories

RUNS = [trajectory("one", num_steps=3), trajectory("two", num_steps=1), trajectory("three")]
STEPS = [(run.trajectory_id, step) for run in RUNS for step in range(run.num_steps)]
TOPS = st.sampled_from([None, 0.4, 0.6, 0.8, 0.95])
SAID = st.lists(
    st.tuples(st.sampled_from(LABELS), TOPS), min_size=len(STEPS), max_size=len(STEPS)
)  # fmt: skip
Said = list[tuple[str, float | None]]


def chances(label: str, top: float | None) -> dict[str, float | None]:
    rest = None if top is None else (1 - top) / 2
    return {f"p_{name}": top if name == label else rest for name in LABELS}


def opened(
    folder: Path, critics: list[Said], failing: set[tuple[int, str]]
) -> list[ScriptedCritic]:
    found = []
    for number, said in enumerate(critics):
        path = folder / f"critic-{number}.jsonl"
        rows = [
            {"trajectory_id": name, "step_index": step, "label": label, **chances(label, top)}
            | {"rationale": f"critic {number}"}
            for (name, step), (label, top) in zip(STEPS, said, strict=True)
            if (number, name) not in failing
        ]
        path.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows) or b"\n")
        found.append(ScriptedCritic(model=path))
    return found


def run(folder: Path, critics: list[ScriptedCritic], together: Any, **values: Any) -> Any:
    members = [
        LabelConfig(
            critic="scripted", critic_id=each.critic_id, prompt_hash=each.prompt_hash, only="all"
        )
        for each in critics
    ]
    config = config_of(together, members, **values)
    panel = Panel(config=config, members=tuple(members), calibrations=(None,) * len(members))
    source = folder / "runs"
    if not source.exists():
        write_trajectories(source, RUNS)
    output = folder / "labels"
    manifest = label_together(source, output, critics, panel, overwrite=True)
    assert verify(output).problems == ()
    rows = pl.read_parquet(output / "labels.parquet").to_dicts()
    return manifest, {(row["trajectory_id"], row["step_index"]): row for row in rows}


@settings(max_examples=25)
@given(
    critics=st.lists(SAID, min_size=2, max_size=3),
    sure=st.sampled_from([0.5, 0.7, 0.8, 0.95]),
    failing=st.sets(st.tuples(st.integers(0, 2), st.sampled_from(["one", "two"])), max_size=2),
)
def test_a_label_is_that_of_the_first_critic_that_is_sure_or_of_the_last(
    critics: list[Said], sure: float, failing: set[tuple[int, str]]
) -> None:
    with TemporaryDirectory() as place:
        folder = Path(place)
        names = opened(folder, critics, failing)
        if len({each.critic_id for each in names}) < len(names):
            return
        manifest, found = run(folder, names, "cascade", sure=sure, audit=0.0)
        settled = [0] * len(critics)
        for index, (name, step) in enumerate(STEPS):
            owner = None
            for number, said in enumerate(critics):
                _, top = said[index]
                # 0.4 of three is 0.4, 0.3, 0.3: the likeliest is the label's own
                is_sure = top is None or max(top, (1 - top) / 2) >= sure - 1e-9
                if (number, name) not in failing and (number == len(critics) - 1 or is_sure):
                    owner = number
                    break
            row = found.pop((name, step), None)
            if owner is None:
                assert row is None
                continue
            settled[owner] += 1
            assert row is not None
            assert (row["label"], row["rationale"]) == (
                critics[owner][index][0],
                f"critic {owner}",
            )
            assert row["critic_id"] == names[owner].critic_id
        assert not found
        told = manifest.data["cascade"]["stages"]
        assert [stage["settled"] for stage in told] == settled
        assert [stage["left"] for stage in told[:-1]] == [stage["steps"] for stage in told[1:]]
        asked = manifest.run["members"]
        assert sum(each["usage"]["requests"] for each in asked) == manifest.run.get("asked", 0)


@settings(max_examples=8)
@given(critics=st.lists(SAID, min_size=2, max_size=2), audit=st.sampled_from([0.0, 0.5, 1.0]))
def test_a_threshold_or_an_audit_changes_what_is_asked_and_never_an_answer(
    critics: list[Said], audit: float
) -> None:
    with TemporaryDirectory() as place:
        folder = Path(place)
        names = opened(folder, critics, set())
        if names[0].critic_id == names[1].critic_id:
            return
        num_settled = []
        for sure in (0.5, 0.7, 0.9):
            manifest, found = run(folder, names, "cascade", sure=sure, audit=audit)
            assert len(found) == len(STEPS)
            first, last = manifest.data["cascade"]["stages"]
            num_settled.append(first["settled"])
            assert first["settled"] + last["settled"] == len(STEPS)
        assert num_settled == sorted(num_settled, reverse=True)
        lines = [
            orjson.loads(line)
            for file in (folder / "labels").glob("ledger-*.jsonl")
            for line in file.read_bytes().splitlines()
        ]
        keys = [(line["content_hash"], line["critic_id"], line["part"]) for line in lines]
        assert len(set(keys)) == len(keys), "nothing is asked twice"


def test_an_audit_draws_its_share_by_content_and_a_larger_one_holds_a_smaller_one() -> None:
    hashes = [trajectory(f"run-{number}").content_hash for number in range(4000)]
    drawn = {
        share: {each for each in hashes if is_audited(each, share)} for share in (0, 0.05, 0.5, 1)
    }
    assert (len(drawn[0]), len(drawn[1])) == (0, 4000)
    assert abs(len(drawn[0.05]) / 4000 - 0.05) < 0.015
    assert drawn[0.05] < drawn[0.5]


def test_a_calibrated_critic_is_as_sure_of_no_harm_as_of_harm() -> None:
    """P(harmful) of one vote in five is 0.2, which is to be sure from 0.8 on."""
    fitted_on = FittedOn(gold=(), trajectories=0, steps=0, harmful=0)
    kept = Calibration(
        kind="threshold", members=(), threshold=0.5, fitted_on=fitted_on, package_version="0"
    )
    member = LabelConfig(critic="openai", critic_id="m@openai", prompt_hash="q", only="all")
    other = replace(member, critic_id="n@openai")
    for percent in range(50, 100):
        sure = percent / 100
        config = config_of("cascade", [member, other], sure=sure, audit=0.0)
        panel = Panel(config=config, members=(member, other), calibrations=(kept, None))
        said = pl.DataFrame(
            {"p_harmful": [sure, 1 - sure, sure - 1e-6]},
            schema_overrides={"p_harmful": pl.Float32},
        )
        assert is_sure(panel, 0, said).tolist() == [True, True, percent == 50], sure
