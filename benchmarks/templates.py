"""Every shared chat template against the oracle, over all shared trajectories: docs/TEMPLATES.md.

    .venv/bin/python benchmarks/templates.py TRAJECTORIES -o docs/TEMPLATES.md [--workers 2]

TRAJECTORIES is what `srft-prep ingest` made of the shared runs. The oracle
(`tests/template_oracle`) uses nothing of srft-prep. Ids are compared for every trajectory that the
template renders; spans at every step of short ones and at 16 steps of long ones; `--history
per-step` on short ones. The script ends with status 1 if anything differs.
"""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from copy import copy
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from srft_prep.chat import LoadedTokenizer, TokenizerSpec  # noqa: E402 - run as a script
from srft_prep.errors import ConfigError, FormatError  # noqa: E402
from srft_prep.history import Renderer  # noqa: E402
from srft_prep.render import ChatTemplate  # noqa: E402
from srft_prep.trajectories import trajectory_of  # noqa: E402
from srft_prep.types import Trajectory  # noqa: E402
from tests import template_oracle as oracle  # noqa: E402

MAX_STEPS = 16
"""Steps of a trajectory whose prefixes are compared."""
PER_STEP_STEPS = 12
"""`per-step` is compared on trajectories of at most so many steps."""


@dataclass(slots=True)
class Verdict:
    """What came of one template."""

    name: str
    oracle: str = "prefixes"
    error: str | None = None
    counts: Counter[str] = field(default_factory=Counter)
    findings: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    @property
    def num_mismatches(self) -> int:
        """Comparisons that failed."""
        return sum(n for name, n in self.counts.items() if name.startswith("bad_"))

    def compare(self, what: str, ours: object, theirs: object, where: str) -> None:
        """Count one comparison."""
        self.counts[what] += 1
        if ours != theirs:
            self.counts[f"bad_{what}"] += 1
            if len(self.examples) < 5:
                self.examples.append(f"{what} at {where}: {str(ours)[:300]} != {str(theirs)[:300]}")


def judge(name: str, rows: Iterable[dict[str, Any]], *, fast: bool = False) -> Verdict:
    """Compare one template with the oracle on some trajectories."""
    verdict = Verdict(name=name)
    reference = oracle.Reference(name)
    if reference.twin is not None:
        verdict.oracle = "prefixes, marks" + (" of twin" if reference.twin != name else "")
    try:
        loaded = load(reference, fast=fast)
    except ConfigError as error:
        verdict.error = str(error)
        for row in rows:
            verdict.counts["refused" if text_of(reference, row) is None else "bad_refused"] += 1
        return verdict
    for row in rows:
        compare_row(verdict, reference, loaded, row)
    return verdict


def load(reference: oracle.Reference, *, fast: bool) -> LoadedTokenizer:
    """Return ours with the oracle's tokenizer, which is loaded once for all templates."""
    base = _tokenizer(reference.family.tokenizer, fast)
    loaded = copy(base)
    loaded.spec = replace(base.spec, source=reference.name, template=reference.source)
    loaded.template = ChatTemplate(
        reference.source,
        variables=loaded.spec.variables,
        control_tokens=loaded.spec.control_tokens,
    )
    loaded.renderer = Renderer(loaded.template)
    loaded.header = loaded.renderer.header
    return loaded


@cache
def _tokenizer(family: str, fast: bool) -> LoadedTokenizer:
    tokenizer = oracle.tokenizer_for(family)
    added = tokenizer.added_tokens_decoder.values()
    spec = TokenizerSpec(
        source=family,
        backend=tokenizer.backend_tokenizer.to_str(),
        template="{% for m in messages %}{{ m.content }}{% endfor %}",
        variables={key: str(value) for key, value in tokenizer.special_tokens_map.items()},
        control_tokens=tuple(sorted(token.content for token in added if token.special)),
    )
    try:
        return spec.load(fast=fast)
    except (ConfigError, FormatError):  # no byte-level vocabulary: the reference alone
        return spec.load()


def text_of(reference: oracle.Reference, row: dict[str, Any]) -> str | None:
    """Return a trajectory's text by the oracle, None where the template refuses it."""
    try:
        return reference.text(oracle.chat_of(row))
    except oracle.REFUSALS:
        return None


def compare_row(
    verdict: Verdict, reference: oracle.Reference, loaded: LoadedTokenizer, row: dict[str, Any]
) -> None:
    """Compare ids, spans and history of one trajectory."""
    chat, trajectory = oracle.chat_of(row), trajectory_of(row)
    text = text_of(reference, row)
    try:
        (whole,) = loaded.conversations(trajectory, history="full")
    except FormatError as error:
        verdict.counts["refused" if text is None else "refused_by_us"] += 1
        verdict.reasons[" ".join(str(error).split())] += 1
        return
    if text is None:
        verdict.compare("refusals", "rendered", "refused", chat.name)
        return
    verdict.counts["rendered"] += 1
    verdict.findings.update(loaded.renderer.findings(trajectory, [whole]))
    verdict.counts["steps"] += len(whole.spans)
    compare_ids(verdict, reference, loaded, chat, whole)
    compare_places(verdict, chat, whole)
    compare_marks(verdict, reference, chat, whole)
    compare_prefixes(verdict, reference, loaded, chat, trajectory, whole)


def compare_ids(
    verdict: Verdict,
    reference: oracle.Reference,
    loaded: LoadedTokenizer,
    chat: oracle.Chat,
    whole: Any,
) -> None:
    """Laws 1 and 3."""
    (tokens,) = loaded.encode([whole])
    forged = bool(whole.rendering.forged)
    try:
        theirs = reference.ids(chat, forged=forged)
    except oracle.REFUSALS:  # sanitizing may break what a template takes apart
        verdict.counts["ids_skipped"] += 1
        return
    kind = "ids_sanitized" if forged else "ids"
    same = tokens.ids.tolist() == theirs
    verdict.compare(kind, same, True, chat.name)
    verdict.counts["tokens"] += len(tokens.ids)


def compare_places(verdict: Verdict, chat: oracle.Chat, whole: Any) -> None:
    """Parts cover spans; fields are what the messages say."""
    spans = {step: (start, end) for step, start, end in whole.spans}
    covered: dict[int, list[int]] = {}
    for step, _, start, end in whole.parts:
        covered.setdefault(step, []).extend((start, end))
    for step, edges in covered.items():
        inner = edges[1:-1]
        ok = (edges[0], edges[-1]) == spans[step] and inner[::2] == inner[1::2]
        verdict.compare("parts", ok, True, f"{chat.name} step {step}")
    for step, name, start, end, skipped in whole.fields:
        begun = spans[step][0]
        found = whole.rendering.text[begun + start : begun + end]
        said = chat.messages[chat.actions[step]][name]
        ok = said[skipped : skipped + len(found)] == found
        ok = ok and not said[:skipped].strip() and not said[skipped + len(found) :].strip()
        verdict.compare("fields", ok, True, f"{chat.name} step {step} {name}")


def compare_marks(
    verdict: Verdict, reference: oracle.Reference, chat: oracle.Chat, whole: Any
) -> None:
    """Law 2 by the marks of TRL's templates, where they write the same text."""
    marked = reference.marked(chat)
    if marked is None or marked[0] != whole.rendering.text:
        return
    text, blocks = marked
    assistants = [i for i, each in enumerate(chat.messages) if each["role"] == "assistant"]
    if len(blocks) > len(assistants):  # Phi-3 marks the end of text behind all turns, too
        blocks = blocks[: len(assistants)]
    if len(blocks) != len(assistants):
        verdict.counts["marks_skipped"] += 1
        return
    of_message = dict(zip(assistants, blocks, strict=True))
    for step, start, end in whole.spans:
        begin, stop = of_message[chat.actions[step]]
        position = chat.actions[step]
        given = reference.text(chat, position, prompt=True) if position and begin < start else ""
        behind = text[end:stop].strip()
        if text[stop:end] == oracle.UNMARKED_END:
            stop = end
        ok = begin <= start < end <= stop
        ok = ok and behind in ("", reference.tokenizer.eos_token)  # Phi-3's stands behind all turns
        ok = ok and (
            begin == start or given.endswith(text[begin:start]) or is_role(reference, text[:start])
        )
        verdict.compare(
            "marks", ok, True, f"{chat.name} step {step} {(start, end)} {(begin, stop)}"
        )


def is_role(reference: oracle.Reference, text: str) -> bool:
    """Return whether a text ends in the family's header: the prompt's end is not kept."""
    return bool(reference.family.role) and text.endswith(reference.family.role)


def compare_prefixes(
    verdict: Verdict,
    reference: oracle.Reference,
    loaded: LoadedTokenizer,
    chat: oracle.Chat,
    trajectory: Trajectory,
    whole: Any,
) -> None:
    """Laws 2 and 4 by prefix differences."""
    num_steps = len(chat.actions)
    if not num_steps:
        return
    all_steps = num_steps <= PER_STEP_STEPS
    chosen = np.unique(np.linspace(0, num_steps - 1, min(num_steps, MAX_STEPS), dtype=int))
    text = whole.rendering.text
    turns: list[oracle.Written] = []
    grows = True
    try:
        for step in chosen.tolist():
            turn = reference.turn(chat, chat.actions[step])
            turns.append(turn)
            span = oracle.full_span(reference.family, text, turn)
            grows = grows and span is not None and text.startswith(turn.seen)
            if span is not None:
                ours = whole.spans[step][1:]
                verdict.compare("spans", ours, span, f"{chat.name} step {step}")
    except oracle.REFUSALS:  # a conversation that may not stop there
        verdict.counts["prefixes_refused"] += 1
        return
    verdict.counts["grows" if grows else "rewritten"] += 1
    if len(chosen) == num_steps:
        found = loaded.renderer.rewrites_history(trajectory, whole, num_cuts=num_steps)
        verdict.compare("history", found is None, grows, f"{chat.name}: {found}")
    if all_steps:
        compare_per_step(verdict, loaded, trajectory, turns, grows=grows)


def compare_per_step(
    verdict: Verdict,
    loaded: LoadedTokenizer,
    trajectory: Trajectory,
    turns: Sequence[oracle.Written],
    *,
    grows: bool,
) -> None:
    """Each step once, in exactly the context that the model saw, in as few sequences as can be."""
    where = trajectory.trajectory_id
    ours = loaded.conversations(trajectory, history="per-step")
    groups = oracle.sequences(list(turns))
    found = [[step for step, _, _ in each.spans] for each in ours]
    verdict.compare("sequences", found, groups, where)
    for conversation in ours:
        for step, start, end in conversation.spans:
            turn = turns[step]
            context = conversation.rendering.text[: turn.end if turn.whole else len(turn.context)]
            verdict.compare("contexts", context == turn.context, True, f"{where} step {step}")
            begun = turn.start if turn.whole else len(turn.seen)
            last = step == conversation.spans[-1][0]
            if last and not grows:
                stop = len(turn.context)
                verdict.compare("contexts", (start, end), (begun, stop), f"{where} step {step}")
            else:
                verdict.compare("contexts", start, begun, f"{where} step {step}")


# The table ----------------------------------------------------------------------------------------


def table_row(verdict: Verdict) -> str:
    """Return a verdict as a row of the table."""
    counts = verdict.counts
    cells = [
        f"`{verdict.name}`",
        f"{counts['rendered']} / {counts['refused']} / {counts['refused_by_us']}",
        _pair(counts, "ids", "ids_sanitized"),
        _pair(counts, "spans", "marks"),
        _pair(counts, "sequences", "contexts", "history"),
        verdict.oracle,
        _history(counts),
        _findings(verdict),
        _words(verdict),
    ]
    return "| " + " | ".join(cells) + " |"


def _pair(counts: Counter[str], *names: str) -> str:
    total = sum(counts[name] for name in names)
    return f"{total:,} / {sum(counts[f'bad_{name}'] for name in names)}"


def _history(counts: Counter[str]) -> str:
    if not counts["grows"] + counts["rewritten"]:
        return "-"
    if not counts["rewritten"]:
        return "append-only"
    return f"rewrites ({counts['rewritten']} of {counts['grows'] + counts['rewritten']})"


def _findings(verdict: Verdict) -> str:
    steps = verdict.counts["steps"]
    return ", ".join(f"{name} {n}" for name, n in sorted(verdict.findings.items())) + (
        f" (of {steps} steps)" if verdict.findings else ""
    )


def _words(verdict: Verdict) -> str:
    if verdict.error:
        return f"not usable: {_short(verdict.error)}"
    words = "exact" if not verdict.num_mismatches else f"**{verdict.num_mismatches} mismatches**"
    if verdict.reasons:
        words += "; refuses: " + "; ".join(
            f"{_short(reason)} ({n})" for reason, n in _grouped(verdict.reasons).most_common(3)
        )
    return words


def _grouped(reasons: Counter[str]) -> Counter[str]:
    grouped: Counter[str] = Counter()
    for reason, n in reasons.items():
        grouped[_short(reason)] += n
    return grouped


def _short(reason: str) -> str:
    reason = reason.replace("the chat template refuses the conversation: ", "")
    reason = reason.replace("the chat template cannot be used: ", "").replace("|", "\\|")
    words = " ".join("N" if word.strip(":,").isdigit() else word for word in reason.split())
    return words if len(words) <= 110 else words[:107] + "..."


HEAD = """# Chat templates

Made by `benchmarks/templates.py`; do not edit. Every template of `../shared/data/templates` against
an oracle that uses nothing of srft-prep (`tests/template_oracle.py`), over {num} trajectories: all
shared runs and {made} made-up ones (reasoning, parallel calls, empty texts, forged control tokens).

- **shown / refused / ours**: what we render; what the template refuses, as
  `apply_chat_template` does; and what it renders and we refuse, since a step has no exact span.
- **ids, spans, steps**: comparisons / mismatches. Ids against
  `apply_chat_template(tokenize=True)`; spans against prefix differences and, where there are
  generation marks, against those; steps: the append-only test, and the sequences, contexts and
  spans of `--history per-step`.
- **history**: `append-only` if no trajectory's past is changed by what comes later, else how many
  are.
- **findings**: what `tokenize` reports: fields that the template drops or changes, turns without an
  end.

Tokenizers: the family's where the shared data has it, else Qwen2.5's with the template's control
tokens added. {when}: {templates} templates, {exact} exact.

| template | shown / refused / ours | ids | spans | steps | oracle | history | findings | verdict |
|---|--:|--:|--:|--:|---|---|---|---|
"""


def main() -> int:
    """Run the comparison and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trajectories", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=REPOSITORY / "docs" / "TEMPLATES.md")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument(
        "--only", default="", help="templates whose name holds this; the rest of the table stays"
    )
    parser.add_argument("--limit", type=int, default=None, help="real trajectories, at most")
    options = parser.parse_args()
    started = time.monotonic()
    names = [name for name in oracle.template_names() if options.only in name]
    with ProcessPoolExecutor(options.workers) as pool:
        first: dict[Any, str] = {}  # of templates that are copies of one another, one is enough
        for name in names:
            first.setdefault((oracle.source_of(name), oracle.family_of(name)), name)
        jobs = {
            name: pool.submit(_judge_all, name, options.trajectories, options.limit)
            for name in first.values()
        }
        verdicts = []
        for name in names:
            same = first[oracle.source_of(name), oracle.family_of(name)]
            verdict = replace(jobs[same].result(), name=name)
            verdicts.append(verdict)
            print(table_row(verdict), flush=True)
            print(*verdict.examples, sep="\n", end="\n" if verdict.examples else "", flush=True)
    made = len(list(oracle.synthetic_rows()))
    rows = {verdict.name: table_row(verdict) for verdict in verdicts}
    kept = _kept_rows(options.output) if options.only else {}
    rows = dict(sorted({**kept, **rows}.items()))
    options.output.write_text(
        HEAD.format(
            num=len(_rows(options.trajectories, options.limit)),
            made=made,
            when=datetime.now().strftime("%Y-%m-%d"),
            templates=len(rows),
            exact=sum("| exact" in row for row in rows.values()),
        )
        + "\n".join(rows.values())
        + "\n",
        encoding="utf-8",
    )
    mismatches = sum(verdict.num_mismatches for verdict in verdicts)
    tokens = sum(verdict.counts["tokens"] for verdict in verdicts)
    seconds = time.monotonic() - started
    print(f"{len(rows)} templates, {tokens:,} tokens, {seconds:.0f} s, {mismatches} mismatches")
    return 1 if mismatches else 0


def _kept_rows(path: Path) -> dict[str, str]:
    """Return the rows of a table by template, none where there is no table yet."""
    if not path.is_file():
        return {}
    lines = path.read_text(encoding="utf-8").splitlines()
    return {line.split("`")[1]: line for line in lines if line.startswith("| `")}


def _rows(folder: Path, limit: int | None) -> list[dict[str, Any]]:
    frame = pl.concat([pl.read_parquet(part) for part in sorted(folder.glob("part-*.parquet"))])
    return [*oracle.synthetic_rows(), *frame.head(limit or len(frame)).iter_rows(named=True)]


def _judge_all(name: str, folder: Path, limit: int | None) -> Verdict:
    return judge(name, _rows(folder, limit), fast=True)


if __name__ == "__main__":
    sys.exit(main())
