"""Which tokens TRL and axolotl would train, exactly, from what a rendering and its tokens say.

Both tools find a range of characters for each assistant turn and train every token that shares a
character with it. That differs from our own rule (a token belongs where its first character does)
where a token straddles an edge: a newline that the agent wrote first and that merges with the
header's newline is trained by both. They differ from each other in the range, and both train every
assistant turn: demonstrations and text that no model wrote, too.

- **TRL** 1.16.0 (transformers 5.24.0, `apply_chat_template(return_assistant_tokens_mask=True)` in
  `tokenization_utils_base.py`; `SFTTrainer._prepare_dataset` turns its mask into labels). The range
  is what the template put between `{% generation %}` and `{% endgeneration %}`.
- **axolotl** 0.19.0 (`prompt_strategies/chat_template.py`: `find_turn`, `_tokenize_single_prompt`;
  `roles_to_train: [assistant]`, `train_on_eos: turn`, its defaults). The range is where the
  rendering differs from one in which the turn is a placeholder without reasoning and tool calls: a
  *frame* that the placeholder shares with the turn is not trained. Then the first end-of-text token
  at the range's end or behind it is trained as well, by its id, if it comes within four tokens;
  other tokens in between are not. A turn that equals its frame (empty content, no call) trains
  nothing, not even its end. `message_field_training` chooses among the turns and moves no edge.

Known limits. A tokenizer whose post-processor trims offsets (`trim_offsets`, Llama-3's) makes
axolotl lose blanks that a turn ends in. axolotl drops tool calls where it does not find the name of
a template's loop variable (GLM-4.5), and both tools make control tokens of a message's text: their
ids are then others than ours.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from srft_prep.errors import FormatError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from srft_prep.render import Rendering

    Render = Callable[[list[dict[str, Any]], list[dict[str, Any]] | None], Rendering]

    Turn = tuple[int, int, int]
    """(step, start, end): a half-open range of one assistant turn; step -1 for no step."""

PLACEHOLDERS: Final = ("[[placeholder]]", "zzplaceholderzz")
"""Stand for a turn's content. They begin and end differently: what a turn shares by chance with one
of them it does not share with the other; axolotl takes the wider range of its two, too."""

EOS_REACH: Final = 3
"""How many tokens axolotl lets lie between a turn and its end-of-text token."""


def token_ends(begun: "NDArray[np.int32]", *, length: int) -> "NDArray[np.int32]":
    """Return where each token ends, behind the last character that it has a byte of, [T].

    Args:
        begun: first character that begins in each token or behind it, [T].
        length: characters of the text.
    """
    return np.append(begun[1:], np.int32(length)) if len(begun) else begun


def convention_spans(
    conventions: "Sequence[tuple[str, int, int, int]]",
    *,
    starts: "NDArray[np.int32]",
    ends: "NDArray[np.int32]",
    ids: "NDArray[np.int32]",
    eos: int | None,
) -> "tuple[tuple[str, int, int, int], ...]":
    """Return (convention, step, start, end) in tokens from the same in characters, each tool's way.

    The arguments are those of `trl_spans` and `axolotl_spans`.
    """
    blocks = [each[1:] for each in conventions if each[0] == "trl"]
    written = [each[1:] for each in conventions if each[0] == "axolotl"]
    by_trl = trl_spans(blocks, starts=starts, ends=ends)
    by_axolotl = axolotl_spans(written, starts=starts, ends=ends, ids=ids, eos=eos)
    return (*(("trl", *span) for span in by_trl), *(("axolotl", *span) for span in by_axolotl))


def trl_spans(
    blocks: "Sequence[Turn]", *, starts: "NDArray[np.int32]", ends: "NDArray[np.int32]"
) -> "list[Turn]":
    """Return the token ranges that TRL trains.

    Args:
        blocks: character ranges of the generation blocks, see `blocks_of_turns`.
        starts: the character that holds each token's first byte, [T], not falling.
        ends: where each token ends, [T], see `token_ends`.

    Returns:
        (step, start, end) in tokens, none empty. Two blocks may share a token.
    """
    return [
        (step, start, end)
        for (step, _, _), (start, end) in zip(blocks, _overlap(blocks, starts, ends), strict=True)
        if start < end
    ]


def axolotl_spans(
    written: "Sequence[Turn]",
    *,
    starts: "NDArray[np.int32]",
    ends: "NDArray[np.int32]",
    ids: "NDArray[np.int32]",
    eos: int | None,
) -> "list[Turn]":
    """Return the token ranges that axolotl trains.

    Args:
        written: character ranges of the turns, see `Placeholders`.
        starts: as for `trl_spans`.
        ends: as for `trl_spans`.
        ids: token ids, [T].
        eos: the tokenizer's `eos_token` as an id, None where it has none.

    Returns:
        (step, start, end) in tokens, none empty; two of a turn whose end-of-text token lies apart.
    """
    if not written:
        return []
    places = np.flatnonzero(ids == eos) if eos is not None else np.empty(0, np.int64)
    ranges = _overlap(written, starts, ends)
    following = np.searchsorted(places, [end for _, end in ranges]).tolist()
    spans: list[Turn] = []
    for (step, _, _), (start, end), which in zip(written, ranges, following, strict=True):
        if start >= end:
            continue
        place = int(places[which]) if which < len(places) else -1
        if place == end:
            spans.append((step, start, end + 1))
            continue
        spans.append((step, start, end))
        if 0 <= place - end <= EOS_REACH:
            spans.append((step, place, place + 1))
    return spans


def _overlap(
    turns: "Sequence[Turn]", starts: "NDArray[np.int32]", ends: "NDArray[np.int32]"
) -> "list[tuple[int, int]]":
    """Return the half-open range of the tokens that share a character with each range."""
    edges = np.array([turn[1:] for turn in turns], np.int32).reshape(-1, 2)
    first = np.searchsorted(ends, edges[:, 0], side="right")
    behind = np.searchsorted(starts, edges[:, 1], side="left")
    return list(zip(first.tolist(), behind.tolist(), strict=True))


def blocks_of_turns(
    generation: Iterable[tuple[int, int]],
    segments: Mapping[int, tuple[int, int]],
    steps: Mapping[int, int],
) -> "list[Turn]":
    """Return each generation block with the step that it belongs to.

    Empty blocks, too: TRL trains a token that one stands within.

    Args:
        generation: character ranges of the generation blocks, in order.
        segments: message index -> character range of its rendering.
        steps: message index -> step; a block of another message gets -1.
    """
    places = sorted((start, index) for index, (start, _) in segments.items())
    begins = [start for start, _ in places]
    turns: list[Turn] = []
    for start, end in generation:
        which = bisect_right(begins, start) - 1
        owner = places[which][1] if which >= 0 else -1
        turns.append((steps.get(owner, -1), start, end))
    return turns


class Placeholders:
    """Finds what axolotl takes for written, by putting placeholders in the place of turns.

    axolotl renders a conversation anew for each turn. Most templates write the same frame around
    every turn, which small conversations tell once and for all. Else one more rendering, with all
    turns replaced at once, tells each turn's frame (thinking models: whether an empty `<think>`
    block comes first). Only where a turn changes how other messages are rendered (in DeepSeek's, a
    first call), turns are replaced one by one, at the price that axolotl pays.
    """

    def __init__(self, render: "Render") -> None:
        """Try the template on small conversations with turns in all positions.

        `render` raises `FormatError` for a conversation that the template refuses.
        """
        self._render = render
        self._independent = True
        found: set[tuple[str, str]] = set()
        for probe in _PROBES:
            try:
                whole = render(probe, None)
                for turn in _turns(probe):
                    replaced = render(_replaced(probe, [turn]), None)
                    found.add(_frame(replaced, turn))
                    if not _same_elsewhere(whole, replaced, [turn]):
                        self._independent = False
            except FormatError:
                continue
        self.constant = found.pop() if len(found) == 1 and self._independent else None
        """What is written before and behind every turn's content; None where that depends."""

    def written(
        self,
        rendering: "Rendering",
        messages: "list[dict[str, Any]]",
        tools: "list[dict[str, Any]] | None",
        *,
        steps: Mapping[int, int],
    ) -> "list[Turn]":
        """Return the character range of each assistant turn, empty ones left out.

        Args:
            rendering: the whole conversation's.
            messages: as they were rendered.
            tools: the same.
            steps: message index -> step; a turn of another message gets -1.

        Raises:
            FormatError: the template refuses a turn without its calls there (axolotl stops, too).
        """
        turns = _turns(messages)
        if self.constant is not None:
            ranges = [_within(rendering, turn, self.constant) for turn in turns]
        else:
            ranges = self._by_rendering(rendering, messages, tools, turns)
        return [
            (steps.get(turn, -1), start, end)
            for turn, (start, end) in zip(turns, ranges, strict=True)
            if start < end
        ]

    def _by_rendering(
        self,
        rendering: "Rendering",
        messages: "list[dict[str, Any]]",
        tools: "list[dict[str, Any]] | None",
        turns: Sequence[int],
    ) -> list[tuple[int, int]]:
        if self._independent:
            replaced = self._render(_replaced(messages, turns), tools)
            if _same_elsewhere(rendering, replaced, turns):
                return [_within(rendering, turn, _frame(replaced, turn)) for turn in turns]
        return [self._differing(rendering.text, messages, tools, turn) for turn in turns]

    def _differing(
        self,
        text: str,
        messages: "list[dict[str, Any]]",
        tools: "list[dict[str, Any]] | None",
        turn: int,
    ) -> tuple[int, int]:
        """Return where a rendering differs from those with either placeholder as one turn."""
        starts, ends = [], []
        for placeholder in PLACEHOLDERS:
            other = self._render(_replaced(messages, [turn], placeholder), tools).text
            start = _shared(text, other)
            most = min(len(text), len(other)) - start
            shared = _shared(text[::-1][:most], other[::-1][:most])
            starts.append(start)
            ends.append(len(text) - shared)
        return min(starts), max(ends)


def _turns(messages: "list[dict[str, Any]]") -> list[int]:
    return [index for index, message in enumerate(messages) if message["role"] == "assistant"]


def _replaced(
    messages: "list[dict[str, Any]]", turns: Sequence[int], placeholder: str = PLACEHOLDERS[0]
) -> "list[dict[str, Any]]":
    """Return messages with the given turns replaced by a placeholder."""
    chosen = set(turns)
    return [
        {"role": "assistant", "content": placeholder} if index in chosen else message
        for index, message in enumerate(messages)
    ]


def _frame(replaced: "Rendering", turn: int) -> tuple[str, str]:
    """Return what is written before and behind the placeholder of a turn."""
    start, end = replaced.segments.get(turn, (0, 0))
    before, _, behind = replaced.text[start:end].partition(PLACEHOLDERS[0])
    return before, behind


def _same_elsewhere(whole: "Rendering", replaced: "Rendering", turns: Sequence[int]) -> bool:
    """Return whether all but the given turns was rendered alike."""
    pieces = []
    for rendering in (whole, replaced):
        position, found = 0, []
        for start, end in (rendering.segments.get(turn, (0, 0)) for turn in turns):
            found.append(rendering.text[position : max(start, position)])
            position = max(end, position)
        pieces.append([*found, rendering.text[position:]])
    return pieces[0] == pieces[1]


def _within(rendering: "Rendering", turn: int, frame: tuple[str, str]) -> tuple[int, int]:
    """Return what a turn's rendering holds beside the frame that it shares with a placeholder's."""
    begin, stop = rendering.segments.get(turn, (0, 0))
    before, behind = frame
    text = rendering.text
    start = begin + _shared(text[begin : min(stop, begin + len(before))], before)
    tail = text[max(start, stop - len(behind)) : stop]
    return start, stop - _shared(tail[::-1], behind[::-1])


def _shared(left: str, right: str) -> int:
    """Return how many characters two texts have in common from their start."""
    least, most = 0, min(len(left), len(right))
    if left[:most] == right[:most]:
        return most
    while most - least > 1:  # left and right differ before `most`, and not before `least`
        middle = (least + most) // 2
        if left[least:middle] == right[least:middle]:
            least = middle
        else:
            most = middle
    return least


def _probe(roles: str) -> "list[dict[str, Any]]":
    function = {"name": "f", "arguments": {"x": "y"}}
    call = {"id": "abcdefgh1", "type": "function", "function": function}
    said: dict[str, dict[str, Any]] = {
        "s": {"role": "system", "content": "x"},
        "u": {"role": "user", "content": "x"},
        "a": {"role": "assistant", "content": "x"},
        "c": {"role": "assistant", "content": "x", "tool_calls": [call]},
        "t": {"role": "tool", "content": "x", "tool_call_id": "abcdefgh1", "name": "f"},
    }
    return [said[role] for role in roles]


_PROBES: Final = tuple(
    map(_probe, ("ua", "sua", "uaua", "ucta", "uctca", "uctauau", "uaa", "uauau", "ucttau", "a"))
)
"""Conversations with a turn first, last, in the middle, calling, and behind each other role."""
