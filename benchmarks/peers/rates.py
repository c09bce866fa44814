"""How fast is `tokenize`, beside bare `tokenizers`, TRL and axolotl?

    python benchmarks/tokenize.py [--rounds 5] [--copies 8] [--peer-rows 80] [--cores 1 --cores 2]

All start from the same real trajectories (or the package's examples where those are not there) and
take turns within one run, each in a process of its own that is bound to the cores in question:

    srft-prep           trajectory Parquet -> token Parquet; the trajectories --copies times over
    srft-prep once      the same, each trajectory once: no text is met again
    encode_batch        tokenizers on the finished texts, in memory: no rendering, masks, files
    encode_batch_fast   the same without offsets, from which no mask can be made
    trl                 dataset preparation with assistant_only_loss, chats in memory
    axolotl             dataset preparation with a mask a step, chats in memory

Start-up is not counted. The peers get --peer-rows of the trajectories, evenly spread, since they
are slow; rates are per token. Before any time is believed, the ids of all tools are compared with
ours, and TRL's and axolotl's masks with those that our token parts hold for them: a difference is
printed and the exit status is 1. A peer that cannot be installed is named in the table. `best` is
the highest rate of a round, `±` half the distance from the lowest to the highest.
The last line of stdout is one JSON document.
"""

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import click
from data import (
    SHARED,
    comparable,
    real_trajectories,
    spread_out,
    write_chats,
    write_repeated,
)
from environments import UnavailableError, python_of
from memory import measure_memory

from srft_prep.chat import load_spec
from srft_prep.render import ChatTemplate

HERE: Final = Path(__file__).resolve().parent
OURS: Final = "srft-prep"
ONCE: Final = "srft-prep once"
PEERS: Final = ("trl", "axolotl")
RAW: Final = ("encode_batch", "encode_batch_fast")

Rows = dict[str, dict[str, Any]]


@dataclass(kw_only=True)
class Contestant:
    """One tool in its process."""

    name: str
    process: "subprocess.Popen[str]"
    about: dict[str, Any]
    """What it said of itself."""
    passes: list[dict[str, Any]] = field(default_factory=list)
    """What it said of each measured pass."""

    @classmethod
    def start(cls, name: str, command: list[str], *, cores: int) -> "Contestant":
        """Start a process on the first so many of our cores, and wait until it has loaded."""
        chosen = sorted(os.sched_getaffinity(0))[:cores]
        environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1])}
        environment |= {"RAYON_NUM_THREADS": str(cores), "OMP_NUM_THREADS": str(cores)}
        environment |= {"TOKENIZERS_PARALLELISM": "true" if cores > 1 else "false"}
        with (Path(tempfile.gettempdir()) / f"{name}.log".replace(" ", "-")).open("w") as log:
            process = subprocess.Popen(
                ["taskset", "--cpu-list", ",".join(map(str, chosen)), *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
            )
        contestant = cls(name=name, process=process, about={})
        contestant.about = contestant._read()
        return contestant

    def run(self, target: Path | None = None) -> dict[str, Any]:
        """Make one pass; write what it gave where wished."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{target or ''}\n")
        self.process.stdin.flush()
        said = self._read()
        if "output" in said:
            shutil.rmtree(said.pop("output"))
        return said

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            log = f"{tempfile.gettempdir()}/{self.name.replace(' ', '-')}.log"
            raise click.ClickException(f"{self.name} stopped with {self.process.wait()}; see {log}")
        said: dict[str, Any] = json.loads(line)
        return said

    def stop(self) -> None:
        """Let the process end."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def rates(self) -> list[float]:
        """Return millions of tokens in a second, of each measured pass."""
        return [each["tokens"] / each["seconds"] / 1e6 for each in self.passes]


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What all contestants are given."""

    tokenizer: str
    template: Path
    once: Path
    """A trajectory directory with each trajectory once."""
    repeated: Path
    chats: Path
    """Chats for the peers."""
    pythons: dict[str, Path]
    """The peers that can be had."""

    def command(self, name: str, cores: int) -> list[str]:
        """Return how a contestant is started."""
        given = [self.tokenizer, str(self.template), str(cores)]
        if name in PEERS:
            script = [str(self.pythons[name]), str(HERE / "prepare.py"), name, str(self.chats)]
        else:
            source = self.repeated if name == OURS else self.once
            what = OURS if name == ONCE else name
            script = [sys.executable, str(HERE / "ours.py"), what, str(source)]
        return [*script, *given]


def differences(folder: Path, names: list[str]) -> list[str]:
    """Compare what the warm-up passes gave; return what differs, in words."""
    ours = _load(folder / f"{ONCE}.jsonl")
    found = []
    for name in names:
        if name == ONCE:
            continue
        theirs = _load(folder / f"{name}.jsonl")
        for row in theirs.values():
            row["mine"] = ours[row["id"].rpartition("#")[0] + "#0"]
        wrong = [row["id"] for row in theirs.values() if row["ids"] != row["mine"]["ids"]]
        if wrong:
            found.append(f"{name}: other ids in {len(wrong)} of {len(theirs)}, first {wrong[0]}")
        if name in PEERS:
            wrong = [row["id"] for row in theirs.values() if row["trained"] != row["mine"][name]]
            if wrong:
                found.append(f"{name}: another mask in {len(wrong)} of {len(theirs)}: {wrong[0]}")
    return found


def _load(path: Path) -> Rows:
    with path.open(encoding="utf-8") as lines:
        return {row["id"]: row for row in map(json.loads, lines)}


def compete(setup: Setup, names: list[str], cores: int, rounds: int) -> list[dict[str, Any]]:
    """Let all tools make their passes in turns, and return a row for each.

    Raises:
        ClickException: ids or masks differ.
    """
    contestants = [
        Contestant.start(name, setup.command(name, cores), cores=cores) for name in names
    ]
    try:
        with tempfile.TemporaryDirectory(dir=setup.once.parent) as folder:
            for each in contestants:
                each.run(Path(folder) / f"{each.name}.jsonl")
            if found := differences(Path(folder), names):
                raise click.ClickException("; ".join(found))
        for _ in range(rounds):
            for each in contestants:
                each.passes.append(each.run())
    finally:
        for each in contestants:
            each.stop()
    reference = next(each for each in contestants if each.name == RAW[0])
    return [_row(each, statistics.median(reference.rates()), cores) for each in contestants]


def _row(contestant: Contestant, reference: float, cores: int) -> dict[str, Any]:
    rates = contestant.rates()
    startup = [each["startup_seconds"] for each in contestant.passes if "startup_seconds" in each]
    return {
        "tool": contestant.name,
        "cores": cores,
        "tokens": contestant.passes[0]["tokens"],
        "mtok_per_second": statistics.median(rates),
        "lowest": min(rates),
        "highest": max(rates),
        "times_encode_batch": statistics.median(rates) / reference,
        "startup_seconds": statistics.median(startup) if startup else None,
        "engine": (contestant.passes[0].get("certificate") or {}).get("engine"),
        "versions": contestant.about["versions"],
    }


def print_table(rows: list[dict[str, Any]], missing: dict[str, str], rounds: int) -> None:
    """Print the rates of all tools, and how often each goes into ours."""
    print(f"median of {rounds} rounds; ids and masks equal in all; millions of tokens in a second")
    print(f"{'tool':20}{'cores':>6}{'tokens':>14}{'Mtok/s':>10}{'±':>8}{'best':>9}{'ours is':>10}")
    ours = {row["cores"]: row["mtok_per_second"] for row in rows if row["tool"] == OURS}
    for row in rows:
        print(
            f"{row['tool']:20}{row['cores']:>6}{row['tokens']:>14,}{row['mtok_per_second']:>10.3f}"
            f"{(row['highest'] - row['lowest']) / 2:>8.3f}{row['highest']:>9.3f}"
            f"{ours[row['cores']] / row['mtok_per_second']:>9.1f}x"
        )
    for name, reason in missing.items():
        print(f"{name:20}{reason}")


@click.command()
@click.option("--rounds", default=5, show_default=True, help="Measured rounds after one warm-up.")
@click.option("--copies", default=8, show_default=True, help="Of the trajectories, for ours.")
@click.option("--peer-rows", default=80, show_default=True, help="Trajectories for the peers.")
@click.option("--cores", type=int, multiple=True, default=(1, 2), show_default=True)
@click.option("--skip", type=click.Choice(PEERS), multiple=True, help="A peer to leave out.")
@click.option("--trajectories", type=click.Path(exists=True, path_type=Path), help="From `ingest`.")
@click.option("--memory", type=int, help="Measure peak memory on so many trajectories instead.")
@click.option("--scratch", type=click.Path(path_type=Path), help="Folder for all files.")
def main(
    rounds: int,
    copies: int,
    peer_rows: int,
    cores: tuple[int, ...],
    skip: tuple[str, ...],
    trajectories: Path | None,
    memory: int | None,
    scratch: Path | None,
) -> None:
    """Measure `tokenize` beside its peers and print a table."""
    shared = SHARED.is_dir()
    tokenizer = str(SHARED / "tokenizers" / "qwen2.5-coder-instruct") if shared else "example"
    template = HERE.parents[1] / "tests" / "golden" / "conventions" / "example_training.jinja"
    if shared:
        template = SHARED / "templates" / "trl" / "qwen2_5_training.jinja"
    spec = load_spec(tokenizer, template)
    chat = ChatTemplate(spec.template, variables=spec.variables, control_tokens=spec.control_tokens)
    machine = {"python": platform.python_version(), "machine": platform.machine()}
    document: dict[str, Any] = {"benchmark": "tokenize", "rounds": rounds, **machine}
    with tempfile.TemporaryDirectory(dir=scratch) as name:
        folder = Path(name)
        real = real_trajectories(folder, trajectories)
        chosen = comparable(real, chat)
        print(f"{len(chosen)} trajectories of {len(real)} (with a turn, no control token as text)")
        if memory is not None:
            rows = measure_memory(folder, chosen, number=memory, spec=spec, template=template)
            print(json.dumps({**document, "memory": rows}))
            return
        missing, pythons = {}, {}
        for peer in PEERS:
            try:
                if peer in skip:
                    raise UnavailableError(f"{peer} was to be left out")
                pythons[peer] = python_of(peer)
            except UnavailableError as error:
                missing[peer] = str(error)
        setup = Setup(
            tokenizer=tokenizer,
            template=template,
            once=write_repeated(folder / "once", chosen, number=len(chosen)),
            repeated=write_repeated(folder / "repeated", chosen, number=copies * len(chosen)),
            chats=write_chats(folder / "chats.jsonl", spread_out(chosen, peer_rows)),
            pythons=pythons,
        )
        names = [OURS, ONCE, *RAW, *pythons]
        rows = [row for each in cores for row in compete(setup, names, each, rounds)]
    print_table(rows, missing, rounds)
    print(json.dumps({**document, "rows": rows, "missing": missing}))
