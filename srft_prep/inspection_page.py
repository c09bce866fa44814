"""One trajectory as a page: the paper's Figure 1 for one's own data.

Steps are coloured by label, tokens by weight; context is grey, and folded where it is long. Every
stretch says in words what its colour says. Tokens of a step are told apart while the pointer or
the keyboard is on it, or everywhere by a box that can be ticked; context stays one text, so that
32,768 tokens make some 1 MB and open at once. The page runs no script.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import orjson

from srft_prep import pages
from srft_prep.hostile_text import attribute, escaped, parsed_arguments, written_out
from srft_prep.inspection import Decode, Judgement, Shown, ShownTokens, ShownTrajectory
from srft_prep.inspection_text import message_title, summary, verdict
from srft_prep.packed_steps import Stretch
from srft_prep.types import LABELS, Message, Trajectory

FOLDED_LINES: Final = 12
FOLDED_CHARACTERS: Final = 1500
"""Context with more lines or characters is folded."""
SHOWN_CHARACTERS: Final = 100
"""Characters of a folded text that are shown, its lines joined."""

_KINDS: Final = {
    "trained": "trained",
    "partly": "trained with a part of the weight",
    "harmful": "harmful, weight 0",
    "unnecessary": "unnecessary, weight 0",
    "good": "good, weight 0",
    "unlabelled": "no label, weight 0",
}
"""What is said of each class of stretches of tokens."""

_STYLE: Final = """
dl.facts { display: grid; grid-template-columns: max-content 1fr; gap: 0 1rem; margin: 0.5rem 0; }
dl.facts dt { color: var(--context); }
dl.facts dd { margin: 0; overflow-wrap: anywhere; }
.legend span { padding: 0 0.4rem; margin-right: 0.5rem; border-left: 4px solid var(--border); }
.map { display: flex; height: 1.5rem; margin: 0.75rem 0; background: var(--raised); gap: 1px; }
.map > * { flex: 1 1 0; min-width: 2px; }
.map > a.trained, .map > a.good { background: var(--good); }
.map > a.unnecessary { background: var(--unnecessary); }
.map > a.harmful { background: repeating-linear-gradient(
  135deg, var(--harmful) 0 3px, var(--background) 3px 5px); }
.map > a.unlabelled { background: var(--context); }
.map > a:focus-visible, .map > a:hover { outline: 2px solid var(--accent); z-index: 1; }
.shown { border-left: 4px solid var(--border); margin: 0.5rem 0; padding: 0.25rem 0.75rem;
  content-visibility: auto; contain-intrinsic-size: auto 6rem; scroll-margin-top: 1rem; }
.shown:target { outline: 2px solid var(--accent); }
.shown h3 { margin: 0; font-size: 0.875rem; font-weight: 600; overflow-wrap: anywhere; }
.shown h3 small { font-weight: 400; color: var(--context); }
.shown p { margin: 0; font-size: 0.875rem; }
.shown.trained, .shown.good, .legend .trained, .legend .good {
  border-color: var(--good); background: var(--good-fill); }
.shown.unnecessary, .legend .unnecessary {
  border-color: var(--unnecessary); background: var(--unnecessary-fill); }
.shown.harmful, .legend .harmful { border-color: var(--harmful); background: var(--harmful-fill); }
.shown.harmful, .legend .harmful { border-left-style: double; }
.legend span { color: var(--text); }
.shown.partly, .legend .partly { border-color: var(--unnecessary); background: color-mix(
  in srgb, var(--good-fill) calc(var(--weight) * 100%), var(--unnecessary-fill)); }
.map > a.partly { background: color-mix(
  in srgb, var(--good) calc(var(--weight) * 100%), var(--unnecessary)); }
.shown.outside, .shown.outside summary { color: var(--context); }
.shown h3, .shown .part-name { color: var(--text); }
.part-name { display: block; margin-top: 0.25rem; font-size: 0.75rem; letter-spacing: 0.04em;
  text-decoration: underline; }
summary { cursor: pointer; font-size: 0.875rem; overflow-wrap: anywhere; }
pre i, pre b { font: inherit; }
pre:hover i, pre:focus i, body:has(#bounds:checked) pre i { box-shadow: inset 1px 0 var(--accent); }
pre i:hover { background: var(--accent); color: var(--background); }
dl.call { margin: 0.25rem 0; font-size: 0.8125rem; }
dl.call dd { margin: 0 0 0 1rem; }
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    """A piece of the bar that shows a whole trajectory."""

    length: int = 1
    """How wide it is, beside others."""
    target: str = ""
    """Id of the element that it leads to; empty for context."""
    kind: str = ""
    """Its class."""
    title: str = ""
    style: str = ""


def page(shown: Shown) -> str:
    """Return the page of what `find` found."""
    if isinstance(shown, ShownTrajectory):
        name, body = shown.trajectory.trajectory_id, _trajectory_body(shown)
    else:
        name, body = shown[0].facts[0][1], _tokens_body(shown)
    text = "\n".join([f"<main>\n<h1>{escaped(name)}</h1>", *body, "</main>"])
    return pages.document(name, text, style=_STYLE)


def _facts(facts: Sequence[tuple[str, str]]) -> str:
    rows = "".join(f"<dt>{escaped(name)}</dt><dd>{escaped(value)}</dd>" for name, value in facts)
    return f'<dl class="facts">{rows}</dl>'


def _trajectory_body(shown: ShownTrajectory) -> Iterator[str]:
    trajectory, judged = shown.trajectory, shown.judgements
    yield _facts(list(summary(shown))[1:])
    if judged is not None:
        yield _legend({label: label for label in LABELS})
    titles = [_step_title(step, trajectory, judged) for step in range(trajectory.num_steps)]
    classes = [_label_class(step, judged) for step in range(trajectory.num_steps)]
    yield _map(
        _Entry(target=f"s{step}", kind=kind, title=title)
        for step, (kind, title) in enumerate(zip(classes, titles, strict=True))
    )
    step = -1
    for message in trajectory.messages:
        if message.kind == "action":
            step += 1
            reason = judged[step].rationale if judged and step in judged else None
            yield f'<section class="shown {attribute(classes[step])}" id="s{step}">'
            yield f"<h3>{escaped(titles[step])}</h3>"
            if reason:
                yield f"<p>{escaped(reason)}</p>"
            yield from _action(message)
            yield "</section>"
        else:
            yield '<section class="shown outside">'
            yield _folded(message_title(message), _message_text(message))
            yield "</section>"
    if trajectory.patch:
        yield '<section class="shown outside">'
        yield _folded("final patch", trajectory.patch)
        yield "</section>"


def _step_title(step: int, trajectory: Trajectory, judged: dict[int, Judgement] | None) -> str:
    if judged is None:
        return f"step {step}"
    return f"step {step} | {verdict(judged.get(step), trajectory)}"


def _label_class(step: int, judged: dict[int, Judgement] | None) -> str:
    judgement = (judged or {}).get(step)
    return judgement.label if judgement else "unlabelled"


def _action(message: Message) -> Iterator[str]:
    if message.reasoning_content:
        yield f'<span class="part-name">reasoning</span>{_pre(message.reasoning_content)}'
    if message.content:
        yield _pre(message.content)
    for call in orjson.loads(message.tool_calls or "[]"):
        yield _call(call)


def _message_text(message: Message) -> str:
    """Return all that a message of context says; an assistant's that is no step may hold calls."""
    texts = (message.reasoning_content, message.content, message.tool_calls)
    return "\n".join(text for text in texts if text)


def _call(call: Any) -> str:
    """Return a tool call with each argument as the text that it is."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        return _pre(written_out(call))
    arguments = parsed_arguments(function.get("arguments", ""))
    name = f'<span class="part-name">tool call {escaped(str(function.get("name")))}</span>'
    if not isinstance(arguments, dict):
        return name + _pre(written_out(arguments))
    pairs = "".join(
        f"<dt>{escaped(key)}</dt><dd>{_pre(written_out(value))}</dd>"
        for key, value in arguments.items()
    )
    return f'{name}<dl class="call">{pairs}</dl>'


def _tokens_body(documents: Sequence[ShownTokens]) -> Iterator[str]:
    found = {_look(each)[0] for document in documents for each in document.stretches}
    words = {kind: words for kind, words in _KINDS.items() if kind in found}
    if all(each.weight is None for document in documents for each in document.stretches):
        words = {"trained": "the agent's"}  # not packed yet
    yield _legend(words)
    yield (
        '<p><label><input type="checkbox" id="bounds"> show where tokens begin</label> '
        '<span class="note">(or point at a step; a token\'s place and id are its title)</span></p>'
    )
    for number, document in enumerate(documents):
        if len(documents) > 1:
            yield f"<h2>document {number + 1} of {len(documents)}</h2>"
        yield _facts(document.facts[1:])
        yield _map(_map_entries(document, number))
        yield from _document(document, number)


def _map_entries(document: ShownTokens, number: int) -> Iterator[_Entry]:
    for start, end, stretch in _covered(document):
        if stretch is None:
            yield _Entry(length=end - start)
        else:
            kind, style = _look(stretch)
            yield _Entry(
                length=end - start,
                target=f"d{number}t{start}",
                kind=kind,
                title=f"{stretch.title} | {end - start} tokens",
                style=style,
            )


def _covered(document: ShownTokens) -> Iterator[tuple[int, int, Stretch | None]]:
    """Yield the ranges that make up a document: stretches, and None for what lies between."""
    position = 0
    for stretch in document.stretches:
        if stretch.start > position:
            yield position, stretch.start, None
        yield stretch.start, stretch.end, stretch
        position = stretch.end
    if position < len(document.ids):
        yield position, len(document.ids), None


def _document(document: ShownTokens, number: int) -> Iterator[str]:
    for start, end, stretch in _covered(document):
        where = f"tokens {start}-{end}"
        if stretch is None:
            yield '<section class="shown outside">'
            yield _folded(f"{where} | {document.context}", document.decode(document.ids[start:end]))
            yield "</section>"
            continue
        kind, style = _look(stretch)
        yield f'<section class="shown {attribute(kind)}" id="d{number}t{start}" style="{style}">'
        yield f"<h3>{escaped(stretch.title)} <small>{where}</small></h3>"
        for part, first, last in stretch.parts or (("", start, end),):
            if part:
                yield f'<span class="part-name">{escaped(part)}</span>'
            yield f'<pre tabindex="0">{_tokens(document, first, last)}</pre>'
        yield "</section>"


def _look(stretch: Stretch) -> tuple[str, str]:
    """Return the class of a stretch and, where it has a part of its weight, its style."""
    if stretch.weight is None or stretch.weight >= 1:
        return "trained", ""
    if stretch.weight > 0:
        return "partly", f"--weight: {stretch.weight:.4g}"
    return stretch.label or "unlabelled", ""


def _tokens(document: ShownTokens, start: int, end: int) -> str:
    """Return the tokens of a stretch as HTML, each an element with its place and id as title."""
    pieces = []
    ids = document.ids[start:end]
    for first, last, text in token_texts(ids, document.decode):
        named = " ".join(map(str, ids[first:last]))
        place = f"{start + first}" if last - first == 1 else f"{start + first}-{start + last}"
        pieces.append(f'<i title="token {place}: {named}">{escaped(text)}</i>')
    return "".join(pieces)


def token_texts(ids: Sequence[int], decode: Decode) -> list[tuple[int, int, str]]:
    """Return the text of each token as (first, last + 1, text); the texts joined are `decode(ids)`.

    Tokens that are a character only together are one entry. Where a decoder does not go from left
    to right, all tokens are one.
    """
    found: list[tuple[int, int, str]] = []
    before = first = 0  # decoding goes on from the last entry: what a token is depends on it
    for end in range(1, len(ids) + 1):
        known, text = decode(ids[before:first]), decode(ids[before:end])
        if text.endswith("\ufffd") and end < len(ids):
            continue  # perhaps the first bytes of a character
        found.append((first, end, text[len(known) :]))
        before, first = first, end
    whole = decode(ids)
    if "".join(text for _, _, text in found) != whole:
        return [(0, len(ids), whole)]
    return found


def _legend(words: Mapping[str, str]) -> str:
    """Return what each class of stretches means."""
    keys = "".join(f'<span class="{kind}">{said}</span>' for kind, said in words.items())
    return f'<p class="legend">{keys}<span>context</span></p>'


def _map(entries: Iterable[_Entry]) -> str:
    """Return a bar of links to what follows, each as wide as it is long."""
    pieces = []
    for entry in entries:
        style = f'style="flex-grow: {entry.length}; {entry.style}"'
        if not entry.target:
            pieces.append(f"<span {style}></span>")
            continue
        title = attribute(entry.title)
        pieces.append(
            f'<a href="#{entry.target}" class="{attribute(entry.kind)}" {style} title="{title}" '
            f'aria-label="{title}"></a>'
        )
    return f'<nav class="map" aria-label="Steps">{"".join(pieces)}</nav>'


def _folded(title: str, text: str) -> str:
    """Return context with its title, folded where it is long."""
    lines = text.count("\n") + 1
    if lines <= FOLDED_LINES and len(text) <= FOLDED_CHARACTERS:
        return f"<h3>{escaped(title)}</h3>{_pre(text)}" if text else f"<h3>{escaped(title)}</h3>"
    start = " ".join(text[: 2 * SHOWN_CHARACTERS].split())[:SHOWN_CHARACTERS]
    size = f"{lines:,} lines" if lines > 1 else f"{len(text):,} characters"
    return (
        f"<details><summary>{escaped(title)} | {size}: <code>{escaped(start)}</code></summary>"
        f"{_pre(text)}</details>"
    )


def _pre(text: str) -> str:
    return f"<pre>{escaped(text)}</pre>"
