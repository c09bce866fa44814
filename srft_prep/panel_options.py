"""The options of `label` for several critics, and for calibrations.

    --critics rules,openai:gpt-5-mini --ensemble majority
    --cascade rules,small,large --critics-file critics.toml

A critic is a word CRITIC[:MODEL], or the name of a section of the critics file, which holds
`label`'s own options by their long names. Options on the command line are for every critic that
takes them and whose section does not say otherwise; who takes which is said, and one that none
takes is refused.
"""

import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from srft_prep.config import LabelConfig, Only, Together
from srft_prep.critic_options import (
    CRITIC_NAMES,
    MODEL_CRITICS,
    TAKES,
    ChosenCritic,
    chosen_critic,
    settled_values,
)
from srft_prep.errors import ConfigError
from srft_prep.options import FILE

if TYPE_CHECKING:
    from srft_prep.array_jobs import ArrayJob
    from srft_prep.calibration import Calibration
    from srft_prep.critic import Critic
    from srft_prep.panel import Panel

_OF_THE_RUN: Final = ("budget_usd", "dry_run")
"""Options that are not one critic's."""
_LEAST_SURE: Final = 0.5


def panel_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that let several critics work together, and calibrations."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


_OPTIONS: Final = (
    click.option(
        "--critics",
        metavar="A,B,...",
        help="Critics of an ensemble, each CRITIC[:MODEL] (rules, vllm:PATH, openai:gpt-5-mini) or "
        "a section of --critics-file. All see everything; --ensemble says what becomes of it.",
    ),
    click.option(
        "--ensemble",
        type=click.Choice(["any", "majority", "mean", "head"]),
        help="Label of a step that several critics judged: the most severe, what more than half "
        "say, the likeliest by their mean probabilities, or by a --calibration of them all.",
    ),
    click.option(
        "--cascade",
        metavar="A,B,...",
        help="Critics from cheap to dear, named as for --critics: each settles the steps that it "
        "is sure of, and the next is asked about the rest.",
    ),
    click.option(
        "--sure",
        type=click.FloatRange(_LEAST_SURE, 1),
        default=0.9,
        show_default=True,
        help="--cascade: a critic settles steps from this probability of its likeliest label, or, "
        "calibrated, of harmful or not. Rules settle what a rule flags.",
    ),
    click.option(
        "--audit",
        type=click.FloatRange(0, 1),
        default=0.0,
        show_default=True,
        metavar="SHARE",
        help="--cascade: show the last critic this share of the trajectories whatever was settled, "
        "and tell how far it agrees; labels stay as settled.",
    ),
    click.option(
        "--critics-file",
        type=FILE,
        help="TOML file whose sections name critics for --critics and --cascade: critic = "
        '"openai", model = "...", and options of label by their long names.',
    ),
    click.option(
        "--calibration",
        metavar="FILE",
        help="Calibration (critic-eval --calibrate) that the labels go through; the ledger keeps "
        "them as given.",
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChosenPanel:
    """Critics as chosen on the command line, and what becomes of their labels."""

    together: Together | None
    """None for a single critic."""
    critics: tuple[ChosenCritic, ...]
    calibrations: tuple[str | None, ...]
    """File of each critic's own calibration, or `default`."""
    head: str | None = None
    """File of the calibration that combines them."""
    sure: float | None = None
    audit: float | None = None


def chosen_panel(context: click.Context, *, output: Path) -> ChosenPanel:
    """Return the critics of a command line.

    Raises:
        click.UsageError: options are given that do not go together, or that no critic takes.
        ConfigError: a word or the critics file names no critic, or an option of one is wrong.
    """
    values = context.params
    together = _together(context)
    if together is None:
        alone = chosen_critic({**values, **settled_values(context)}, output=output)
        return ChosenPanel(together=None, critics=(alone,), calibrations=(values["calibration"],))
    given = [
        parameter
        for parameter in context.command.params
        if parameter.name in TAKES and _is_given(context, parameter.name)
    ]
    if "model" in [parameter.name for parameter in given] or _is_given(context, "critic_name"):
        raise click.UsageError(
            "--critic and --model are for one critic; with --critics and --cascade write "
            "CRITIC:MODEL, or name sections of --critics-file"
        )
    option = "--cascade" if together == "cascade" else "--critics"
    words = [word.strip() for word in values[option.strip("-")].split(",")]
    if len(words) < 2:
        raise click.UsageError(f"{option}: expected two critics or more, got {words[0]!r}")
    sections = _read_sections(values["critics_file"])
    members = [_member(context, word, sections, option=option) for word in words]
    _refuse_idle_options(given, [member["critic_name"] for member in members], option=option)
    critics: list[ChosenCritic] = []
    for number, (word, own) in enumerate(zip(words, members, strict=True), start=1):
        name = own["critic_name"]
        told = [
            parameter.name
            for parameter in given
            if parameter.name
            and name in TAKES[parameter.name]
            and parameter.name not in (*own, *_OF_THE_RUN)
        ]
        taken = {**values, **own}
        flags = ", ".join(f"--{key.replace('_', '-')}" for key in told)
        model = f" {taken['model']}" if taken["model"] else ""
        click.echo(
            f"critic {number} of {len(words)}, {word}: {name}{model}"
            + (f"; of the command line it takes {flags}" if flags else ""),
            err=True,
        )
        critics.append(chosen_critic(taken, output=output))
    own_calibrations = tuple(member.get("calibration") for member in members)
    if together != "cascade" and any(own_calibrations):
        raise ConfigError(
            f"{values['critics_file']}: calibration: a critic of an ensemble has none of its own; "
            "--ensemble head --calibration FILE calibrates all together"
        )
    return ChosenPanel(
        together=together,
        critics=tuple(critics),
        calibrations=own_calibrations,
        head=values["calibration"],
        sure=values["sure"] if together == "cascade" else None,
        audit=values["audit"] if together == "cascade" else None,
    )


def _is_given(context: click.Context, name: str | None) -> bool:
    assert name is not None
    return context.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT


def _together(context: click.Context) -> Together | None:
    """Return how critics are to work together; None for a single one."""
    values = context.params
    ensemble, cascade = values["ensemble"], values["cascade"]
    if values["critics"] is not None and cascade is not None:
        raise click.UsageError("--critics and --cascade: expected one of them, got both")
    if (values["critics"] is None) != (ensemble is None):
        raise click.UsageError("--critics and --ensemble go together: give both or neither")
    for name in ("sure", "audit"):
        if cascade is None and _is_given(context, name):
            raise click.UsageError(f"--{name}: only with --cascade")
    if ensemble is None and cascade is None:
        if values["critics_file"] is not None:
            raise click.UsageError("--critics-file: only with --critics or --cascade")
        return None
    if cascade is not None:
        if values["calibration"] is not None:
            raise click.UsageError(
                "--calibration: in a cascade it is a critic's own: write calibration = FILE into "
                "its section of --critics-file"
            )
        return "cascade"
    if (ensemble == "head") != (values["calibration"] is not None):
        raise click.UsageError(
            "--ensemble head and --calibration FILE, fitted on these critics, go together"
        )
    together: Together = ensemble
    return together


def _read_sections(path: Path | None) -> Mapping[str, Any]:
    if path is None:
        return {}
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: expected critics in TOML: {error}") from None


def _member(
    context: click.Context, word: str, sections: Mapping[str, Any], *, option: str
) -> dict[str, Any]:
    """Return what a word, or the section that it names, says of a critic."""
    path = context.params["critics_file"]
    if word in sections and word in CRITIC_NAMES:
        raise ConfigError(
            f"{path}: [{word}]: expected a name that is no critic's own ({', '.join(CRITIC_NAMES)})"
            "; rename the section"
        )
    if word in sections:
        return _of_section(context, sections[word], where=f"{path}: [{word}]")
    name, colon, model = word.partition(":")
    if name not in CRITIC_NAMES or (colon and not model):
        named = ", ".join(sections) if sections else "none"
        raise ConfigError(
            f"{option}: expected CRITIC[:MODEL] with a critic of {', '.join(CRITIC_NAMES)}, or a "
            f"section of --critics-file ({named}), got {word!r}"
        )
    if colon and name not in TAKES["model"]:
        raise ConfigError(f"{option}: {word}: the {name} critic takes no model")
    return {"critic_name": name, **({"model": model} if colon else {})}


def _of_section(context: click.Context, section: Any, *, where: str) -> dict[str, Any]:
    if not isinstance(section, dict) or section.get("critic") not in CRITIC_NAMES:
        got = section.get("critic") if isinstance(section, dict) else section
        raise ConfigError(
            f"{where}: expected critic = one of {', '.join(CRITIC_NAMES)}, got {got!r:.80}"
        )
    name = section["critic"]
    options = {
        parameter.opts[0].removeprefix("--"): parameter
        for parameter in context.command.params
        if parameter.name in TAKES and parameter.name not in _OF_THE_RUN
    }
    found: dict[str, Any] = {"critic_name": name}
    for key, value in section.items():
        if key == "critic":
            continue
        if key == "calibration" and isinstance(value, str):
            found[key] = value
            continue
        parameter = options.get(key)
        if parameter is None or parameter.name is None:
            raise ConfigError(
                f"{where}: expected critic, calibration or {', '.join(options)}, got {key!r:.80}"
            )
        if name not in TAKES[parameter.name]:
            takers = ", ".join(TAKES[parameter.name])
            raise ConfigError(
                f"{where}: {key}: the {name} critic takes none; those that do: {takers}"
            )
        if isinstance(value, list) != parameter.multiple:
            form = "a list" if parameter.multiple else "one value"
            raise ConfigError(f"{where}: {key}: expected {form}, got {value!r:.80}")
        try:
            found[parameter.name] = parameter.process_value(context, value)
        except click.UsageError as error:
            raise ConfigError(f"{where}: {key}: {error.message}") from None
    return found


def _refuse_idle_options(
    given: Sequence[click.Parameter], names: Sequence[str], *, option: str
) -> None:
    for parameter in given:
        takers = TAKES[parameter.name or ""]
        if not set(takers).intersection(names):
            raise click.UsageError(
                f"{parameter.opts[0]}: no critic of {option} takes it; those that do: "
                f"{', '.join(takers)}"
            )


def opened_panel(
    chosen: ChosenPanel,
    critics: Sequence["Critic"],
    *,
    only: Only,
    array: "ArrayJob | None" = None,
) -> "Panel":
    """Return the panel of opened critics, its calibrations read and found to be theirs.

    Raises:
        ConfigError: a calibration cannot be read, or was fitted on other critics' labels, or two
            critics are the same.
    """
    from srft_prep.calibration_files import read_calibration_of
    from srft_prep.panel import Panel, config_of

    members: list[LabelConfig] = []
    calibrations: list[Calibration | None] = []
    for choice, critic, file in zip(chosen.critics, critics, chosen.calibrations, strict=True):
        calibration, sha256 = read_calibration_of(file, _names([critic]))
        calibrations.append(calibration)
        is_model = choice.name in MODEL_CRITICS
        members.append(
            LabelConfig(
                critic=choice.name,
                critic_id=critic.critic_id,
                prompt_hash=critic.prompt_hash,
                only=only,
                votes=choice.values["votes"] if is_model else 1,
                context=choice.values["context"] if is_model else "none",
                max_input_tokens=critic.max_input_tokens,
                calibration=sha256,
                array=array,
            )
        )
    if chosen.together is None:
        return Panel.of(members[0], calibrations[0])
    head, sha256 = read_calibration_of(chosen.head, _names(critics))
    config = config_of(
        chosen.together, members, calibration=sha256, sure=chosen.sure, audit=chosen.audit
    )
    return Panel(config=config, members=tuple(members), calibrations=tuple(calibrations), head=head)


def _names(critics: Sequence["Critic"]) -> list[tuple[str, str]]:
    return [(critic.critic_id, critic.prompt_hash) for critic in critics]
