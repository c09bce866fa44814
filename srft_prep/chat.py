"""A tokenizer with its chat template: conversations -> ids and spans.

`TokenizerSpec` is what `AutoTokenizer` loaded, as plain strings, so that worker processes get the
very backend that `apply_chat_template` would use without importing all of transformers again.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from srft_prep.config import History
from srft_prep.errors import ConfigError, FormatError
from srft_prep.render import (
    ChatTemplate,
    Rendering,
    action_span,
    template_messages,
    template_tools,
)
from srft_prep.types import Trajectory

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from tokenizers import Encoding, Tokenizer

    Encoded = tuple[NDArray[np.int32], tuple[tuple[int, int, int], ...]]

EXAMPLE_TOKENIZER: Final = "example"
"""Name of the small tokenizer that comes with the package."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """A rendering and where its steps lie in it."""

    rendering: Rendering
    spans: tuple[tuple[int, int, int], ...]
    """(step, start, end), half-open character ranges, in order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerSpec:
    """All that decides ids and spans, picklable."""

    source: str
    """The path or id that was given."""
    backend: str
    """`tokenizer.json` of the backend in use."""
    template: str
    """The chat template's text."""
    variables: dict[str, Any]
    """The tokenizer's special tokens by name, as templates see them."""
    control_tokens: tuple[str, ...]
    """Texts of the special tokens, which content can never become."""

    @property
    def tokenizer_hash(self) -> str:
        """SHA-256 of the backend."""
        return _sha256(self.backend)

    @property
    def template_hash(self) -> str:
        """SHA-256 of the template."""
        return _sha256(self.template)

    def describe(self) -> dict[str, Any]:
        """Return the tokenizer's entry in a manifest."""
        return {
            "source": self.source,
            "tokenizer_hash": self.tokenizer_hash,
            "template_hash": self.template_hash,
        }

    def load(self) -> "LoadedTokenizer":
        """Return the tokenizer, ready for use."""
        return LoadedTokenizer(self)


def load_backend(source: str, *, option: str = "--tokenizer") -> "tuple[Tokenizer, str]":
    """Load a tokenizer without its template; return its backend and its `tokenizer_hash`.

    Raises:
        ConfigError: there is no such tokenizer, or it has no fast backend.
    """
    from tokenizers import Tokenizer as Backend

    text = _from_pretrained(source, option).backend_tokenizer.to_str()
    return Backend.from_str(text), _sha256(text)


def load_spec(
    source: str,
    chat_template: Path | None = None,
    *,
    option: str = "--tokenizer",
) -> TokenizerSpec:
    """Load a tokenizer from a folder or the hub, and its chat template or the one given.

    `option` is what the user named it by, for errors.

    Raises:
        ConfigError: there is no such tokenizer, it has no fast backend, or there is no template.
    """
    tokenizer = _from_pretrained(source, option)
    template = tokenizer.chat_template
    if chat_template is not None:
        try:
            template = chat_template.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--chat-template {chat_template}: {error}") from None
    if isinstance(template, dict):
        raise ConfigError(
            f"{option} {source}: has several chat templates ({', '.join(sorted(template))}); "
            "give the one that inference uses as --chat-template FILE"
        )
    if not template:
        raise ConfigError(f"{option} {source}: has no chat template; give --chat-template FILE")
    added = tokenizer.added_tokens_decoder.values()
    return TokenizerSpec(
        source=source,
        backend=tokenizer.backend_tokenizer.to_str(),
        template=template,
        variables={key: str(value) for key, value in tokenizer.special_tokens_map.items()},
        control_tokens=tuple(sorted(token.content for token in added if token.special)),
    )


def _from_pretrained(source: str, option: str) -> Any:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers import AutoTokenizer

    path = tokenizer_path(source)
    if path.startswith(("/", ".")) and not Path(path).is_dir():
        found = "a file; give its folder" if Path(path).exists() else "there is no such folder"
        raise ConfigError(f"{option} {source}: {found}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # noqa: BLE001 - all that tokenizers raises is a bare Exception
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(f"{option} {source}: cannot be loaded: {reason}") from None
    if not getattr(tokenizer, "backend_tokenizer", None):
        raise ConfigError(f"{option} {source}: has no tokenizer.json; a fast one is needed")
    return tokenizer


def tokenizer_path(source: str) -> str:
    """Return the folder or hub id of a tokenizer's name."""
    if source == EXAMPLE_TOKENIZER:
        return str(Path(__file__).parent / "examples" / "tokenizer")
    return source


class LoadedTokenizer:
    """A backend and a compiled template."""

    def __init__(self, spec: TokenizerSpec) -> None:
        from tokenizers import Tokenizer as Backend

        self.spec = spec
        self.backend: Tokenizer = Backend.from_str(spec.backend)
        # What a tokenizer.json may ask for beside ids, and `apply_chat_template` does not do:
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.post_processor = None  # some move a token's start behind its spaces
        self.template = ChatTemplate(
            spec.template, variables=spec.variables, control_tokens=spec.control_tokens
        )
        self.header = self.template.generation_prompt([{"role": "user", "content": "-"}])
        self._newline = self.backend.encode("\n", add_special_tokens=False).ids

    def conversations(self, trajectory: Trajectory, *, history: History) -> Iterator[Conversation]:
        """Yield the renderings to train on: one, or with `per-step` one a step.

        Raises:
            FormatError: the template refuses the conversation, or rewrites its history although
                `history` is `auto`.
        """
        messages, indices = template_messages(trajectory)
        tools = template_tools(trajectory)
        if not messages:
            raise FormatError("no message of a role that chat templates know")
        actions = _actions(trajectory, indices)
        if history == "per-step":
            for step, position in enumerate(actions):
                yield self._conversation(messages[: position + 1], tools, {step: position})
            return
        whole = self._conversation(messages, tools, dict(enumerate(actions)))
        yield whole
        if history == "auto" and (where := self.rewrites_history(trajectory, whole, num_cuts=2)):
            raise FormatError(
                f"the chat template rewrites what was there {where}; use --history per-step or full"
            )

    def _conversation(
        self, messages: list[dict[str, Any]], tools: Any, actions: dict[int, int]
    ) -> Conversation:
        rendering = self.template.render(messages, tools)
        end = self.template.control_tokens
        return Conversation(
            rendering=rendering,
            spans=tuple(
                (step, *action_span(rendering, position, header=self.header, end=end))
                for step, position in actions.items()
            ),
        )

    def rewrites_history(
        self, trajectory: Trajectory, whole: Conversation, *, num_cuts: int
    ) -> str | None:
        """Return up to where a later message changes the rendering, None for nowhere.

        What the model saw at a step, and what it saw and wrote, must both be starts of the whole
        rendering. Looks at `num_cuts` steps spread over the trajectory, the last and the first
        included, and at the first step of which the whole rendering leaves out a field.
        """
        messages, indices = template_messages(trajectory)
        tools = template_tools(trajectory)
        actions = _actions(trajectory, indices)
        text = whole.rendering.text
        cuts = np.linspace(len(actions) - 1, 0, num=min(num_cuts, len(actions)), dtype=int).tolist()
        incomplete = (step for step, _ in _left_out(trajectory, whole))
        for step in dict.fromkeys([*cuts, *islice(incomplete, 1)]):
            position = actions[step]
            if position > 0:
                seen = self.template.render(messages[:position], tools, add_generation_prompt=True)
                if not text.startswith(seen.text):
                    return f"before step {step}"
            if position + 1 < len(messages):
                wrote = self._conversation(messages[: position + 1], tools, {step: position})
                if not text.startswith(wrote.rendering.text[: wrote.spans[0][2]]):
                    return f"up to the end of step {step}"
        return None

    def dropped_fields(
        self, trajectory: Trajectory, conversations: Sequence[Conversation]
    ) -> Counter[str]:
        """Count the steps of which the template left out a field without a word."""
        return Counter(
            f"dropped_{name}"
            for conversation in conversations
            for _, name in _left_out(trajectory, conversation)
        )

    def encode(self, conversations: Sequence[Conversation]) -> "list[Encoded]":
        """Return (ids, spans in tokens) of every conversation."""
        plain = [each.rendering.text for each in conversations if not each.rendering.forged]
        encodings = iter(self.backend.encode_batch(plain, add_special_tokens=False))
        return [
            self._encode_pieces(each)
            if each.rendering.forged
            else _with_spans(next(encodings), each.spans)
            for each in conversations
        ]

    def _encode_pieces(self, conversation: Conversation) -> "Encoded":
        """Encode a rendering that holds control tokens as text: those apart, without added tokens.

        The pieces between them are encoded behind a newline that is taken off again, so that no
        tokenizer treats their start as the start of a text. The same ids come out of
        `apply_chat_template(..., sanitize_control_tokens=True)`.
        """
        text = conversation.rendering.text
        ids: list[int] = []
        starts: list[int] = []  # first character of each token
        position = 0
        for begin, end in (*conversation.rendering.forged, (len(text), len(text))):
            self._append_piece(text[position:begin], position, ids, starts)
            plain = self._without_added_tokens(text[begin:end])
            ids += plain
            starts += [begin] * len(plain)
            position = end
        firsts = np.array(starts, np.int64)
        spans = tuple(
            (step, int(np.searchsorted(firsts, start)), int(np.searchsorted(firsts, end)))
            for step, start, end in conversation.spans
        )
        return np.array(ids, np.int32), spans

    def _append_piece(self, piece: str, position: int, ids: list[int], starts: list[int]) -> None:
        if not piece:
            return
        encoding, shift, skip = self._encode(piece), 0, 0
        if ids:
            behind = self._encode("\n" + piece)
            if behind.ids[: len(self._newline)] == self._newline:
                encoding, shift, skip = behind, 1, len(self._newline)
        ids += encoding.ids[skip:]
        starts += [position + start - shift for start, _ in encoding.offsets[skip:]]

    def _encode(self, text: str) -> "Encoding":
        return self.backend.encode(text, add_special_tokens=False)

    def _without_added_tokens(self, text: str) -> list[int]:
        if self.backend.normalizer is not None:
            text = self.backend.normalizer.normalize_str(text)
        pieces = [text]
        if self.backend.pre_tokenizer is not None:
            pieces = [piece for piece, _ in self.backend.pre_tokenizer.pre_tokenize_str(text)]
        return [token.id for piece in pieces for token in self.backend.model.tokenize(piece)]


def _actions(trajectory: Trajectory, indices: Sequence[int]) -> list[int]:
    """Return which of the rendered messages are actions; `indices` is their place before."""
    return [i for i, index in enumerate(indices) if trajectory.messages[index].kind == "action"]


def _left_out(trajectory: Trajectory, conversation: Conversation) -> Iterator[tuple[int, str]]:
    """Yield (step, field) for every field of an action that is not in its rendering."""
    for step, start, end in conversation.spans:
        action = trajectory.steps[step].action
        written = conversation.rendering.text[start:end]
        if action.content and action.content.strip() not in written:
            yield step, "content"
        if action.reasoning_content and action.reasoning_content.strip() not in written:
            yield step, "reasoning_content"
        if action.tool_calls is not None and _first_name(action.tool_calls) not in written:
            yield step, "tool_calls"


def _with_spans(encoding: "Encoding", spans: tuple[tuple[int, int, int], ...]) -> "Encoded":
    firsts = np.array([start for start, _ in encoding.offsets], np.int64) if spans else None
    return np.array(encoding.ids, np.int32), tuple(
        (step, int(np.searchsorted(firsts, start)), int(np.searchsorted(firsts, end)))
        for step, start, end in spans
        if firsts is not None
    )


def _first_name(tool_calls: str) -> str:
    import orjson

    name: str = orjson.loads(tool_calls)[0]["function"]["name"]
    return name


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
