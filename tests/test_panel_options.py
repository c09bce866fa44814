"""Options of `label` for several critics: what is refused, and who takes what."""

from pathlib import Path

import pytest

from tests.stages import srft_prep, trajectory, write_trajectories

RUNS = (trajectory("one"), trajectory("two"))


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return write_trajectories(tmp_path / "runs", RUNS)


@pytest.fixture
def said(tmp_path: Path) -> Path:
    path = tmp_path / "said.csv"
    lines = [f"{run.trajectory_id},{step},good" for run in RUNS for step in range(3)]
    path.write_text("\n".join(["trajectory_id,step_index,label", *lines]))
    return path


def refused(runs: Path, *words: object) -> str:
    """Return what `label` says where it refuses, having written nothing."""
    output = runs.parent / "labels"
    done = srft_prep("label", runs, "-o", output, *words)
    assert done.status == 2, (done.stdout, done.stderr)
    assert not output.exists()
    assert "Traceback" not in done.stderr
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    return error


ENSEMBLE = ("--critics", "rules,scripted:x", "--ensemble", "any")
CASCADE = ("--cascade", "rules,scripted:x")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((*CASCADE, *ENSEMBLE), "--critics and --cascade: expected one of them, got both"),
        (ENSEMBLE[:2], "--critics and --ensemble go together"),
        (ENSEMBLE[2:], "--critics and --ensemble go together"),
        (("--sure", "0.8"), "--sure: only with --cascade"),
        ((*ENSEMBLE, "--audit", "0.1"), "--audit: only with --cascade"),
        ((*CASCADE, "--sure", "0.4"), "Invalid value for '--sure'"),
        (("--critics-file", __file__), "--critics-file: only with --critics or --cascade"),
        ((*CASCADE, "--calibration", "default"), "it is a critic's own"),
        ((*ENSEMBLE, "--calibration", "default"), "--ensemble head and --calibration FILE"),
        ((*ENSEMBLE[:3], "head"), "--ensemble head and --calibration FILE"),
        ((*CASCADE, "--critic", "rules"), "--critic and --model are for one critic"),
        ((*ENSEMBLE, "--model", "m"), "--critic and --model are for one critic"),
        (("--cascade", "rules"), "--cascade: expected two critics or more, got 'rules'"),
        (("--cascade", "rules,tools"), "got 'tools'"),
        (("--cascade", "rules,openai:"), "got 'openai:'"),
        (("--cascade", "rules:x,rules"), "rules:x: the rules critic takes no model"),
        (("--cascade", "rules,scripted"), "--critic scripted: give the file of labels"),
        ((*CASCADE, "--votes", "2"), "--votes: no critic of --cascade takes it"),
        ((*ENSEMBLE, "--gpus", "1"), "--gpus: no critic of --critics takes it"),
        ((*CASCADE, "--critics-file", __file__), "expected critics in TOML"),
    ],
)
def test_what_makes_no_sense_together_is_refused(
    runs: Path, words: tuple[str, ...], message: str
) -> None:
    assert message in refused(runs, *words)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ('critic = "tools"', "expected critic = one of rules, "),
        ('model = "m"', "expected critic = one of rules, "),
        ('critic = "rules"\nvotes = 3', "[a]: votes: the rules critic takes none; those that do: "),
        ('critic = "openai"\nbudget-usd = 3', "expected critic, calibration or model, prompt, "),
        ('critic = "openai"\nvotes = 0', "[a]: votes: 0 is not in the range 1<=x<=100"),
        ('critic = "openai"\nvotes = "many"', "[a]: votes: 'many' is not a valid integer"),
        ('critic = "openai"\nbase-url = "http://h"', "[a]: base-url: expected a list, got"),
        ('critic = "openai"\nmodel = ["m"]', "[a]: model: expected one value, got"),
        ('critic = "openai"\ncontext = "all"', "[a]: context: 'all' is not one of"),
        ('critic = "rules"\ncalibration = "none.json"', "none.json: there is no such calibration"),
    ],
)
def test_a_wrong_section_is_refused_with_its_name(
    runs: Path, tmp_path: Path, section: str, message: str
) -> None:
    critics = tmp_path / "critics.toml"
    critics.write_text(f"[a]\n{section}\n")
    error = refused(runs, "--cascade", "a,rules", "--critics-file", critics)
    assert message in error


def test_a_section_with_the_name_of_a_critic_is_refused(runs: Path, tmp_path: Path) -> None:
    critics = tmp_path / "critics.toml"
    critics.write_text('[rules]\ncritic = "openai"\nmodel = "m"\n')
    error = refused(runs, "--cascade", "rules,scripted:x", "--critics-file", critics)
    assert "[rules]: expected a name that is no critic's own" in error


def test_the_same_critic_twice_is_refused(runs: Path) -> None:
    error = refused(runs, "--critics", "rules,rules", "--ensemble", "any")
    assert "rules@1" in error
    assert "expected critics that differ" in error


def test_a_critic_of_an_ensemble_has_no_calibration_of_its_own(runs: Path, tmp_path: Path) -> None:
    critics = tmp_path / "critics.toml"
    critics.write_text('[a]\ncritic = "rules"\ncalibration = "x.json"\n')
    words = ("--critics", "a,scripted:x", "--ensemble", "any", "--critics-file", critics)
    assert "a critic of an ensemble has none of its own" in refused(runs, *words)


def test_it_is_said_which_critic_takes_an_option_of_the_command_line(
    runs: Path, said: Path, tmp_path: Path
) -> None:
    critics = tmp_path / "critics.toml"
    critics.write_text('[told]\ncritic = "rules"\n[plain]\ncritic = "rules"\ncontext = "none"\n')
    words = ("--critics", f"told,plain,scripted:{said}", "--ensemble", "any")
    more = ("--critics-file", critics, "--context", "outcome")
    done = srft_prep("label", runs, "-o", tmp_path / "labels", *words, *more)
    assert done.status == 0, done.stderr
    assert done.stderr.splitlines()[:3] == [
        "critic 1 of 3, told: rules; of the command line it takes --context",
        "critic 2 of 3, plain: rules",
        f"critic 3 of 3, scripted:{said}: scripted {said}",
    ]
