"""What a calibration was held against, in words and tables, for a terminal."""

from srft_prep.evaluate.critic import Contrast
from srft_prep.evaluate.critic_report import binary_table, difference_line
from srft_prep.evaluate.fitting import CALIBRATED, FEW_STEPS, Fitting


def fitting_lines(found: Fitting) -> list[str]:
    """Return a fitted calibration as lines of text."""
    text = [
        f"Calibration: out-of-fold scores, by folds of {found.folds}; "
        f"{CALIBRATED!r} chooses among the candidates anew in every fold"
    ]
    text += binary_table(found.rows)
    text.append("")
    for each in found.contrasts:
        text.append(difference_line(each, f"{each.row} - {each.other}"))
        text.append(f"    {_verdict(each)}")
    fitted = found.calibration
    text.append(
        f"chosen: {found.chosen}; harmful where P(harmful) >= {fitted.threshold:.3f}; fitted on "
        f"{fitted.fitted_on.steps:,} steps of {fitted.fitted_on.trajectories:,} trajectories"
    )
    text += _warnings(found)
    return [line.rstrip() for line in text]


def _warnings(found: Fitting) -> list[str]:
    text = []
    no_critic, fitted = found.contrasts[0], found.calibration.fitted_on
    if not no_critic.flags_better:
        worse = no_critic.f1.high < 0
        text.append(
            f"warning: by F1 it is {'worse than' if worse else 'not told apart from'} no critic"
        )
        if found.position_does_it:
            text.append(
                "warning: what it knows of position and outcome does it: without these, what the "
                "critic says does not beat no critic"
            )
    if not found.as_it_is.flags_better:
        text.append(
            f"warning: by F1 it is not better than {found.as_it_is.other} as it is: keep that"
        )
    if (fewest := min(fitted.harmful, fitted.steps - fitted.harmful)) < FEW_STEPS:
        which = "harmful" if fewest == fitted.harmful else "not harmful"
        text.append(
            f"warning: {fewest:,} gold steps are {which}: below {FEW_STEPS}, much of what was "
            "fitted is chance"
        )
    return text


def _verdict(found: Contrast) -> str:
    if found.flags_better:
        return "better by F1"
    return "worse by F1" if found.f1.high < 0 else "not told apart by F1"
