"""A tokenizer with its chat template: conversations -> ids and spans.

One tokenisation of the whole rendering gives ids and the place of every token; spans are looked up
in it. A token belongs where its first character does.

`TokenizerSpec` is what `AutoTokenizer` loaded, as plain strings, so that worker processes get the
very backend that `apply_chat_template` would use without importing all of transformers again.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from srft_prep.certificate import Encoder
from srft_prep.config import History
from srft_prep.conventions import convention_spans, token_ends
from srft_prep.conversations import Conversation
from srft_prep.engines import Encoded
from srft_prep.errors import ConfigError, FormatError, in_one_line
from srft_prep.history import Renderer
from srft_prep.hub import hub_problem
from srft_prep.render import ChatTemplate
from srft_prep.types import Trajectory

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from tokenizers import Encoding, Tokenizer

EXAMPLE_TOKENIZER: Final = "example"
"""Name of the small tokenizer that comes with the package."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """One conversation as tokens, with what a token part says of it (see `schemas.TOKENS`)."""

    ids: "NDArray[np.int32]"
    """Token ids, [T]."""
    step_spans: tuple[tuple[int, int, int], ...]
    """(step, start, end), half-open token ranges, in order."""
    part_spans: tuple[tuple[int, str, int, int], ...]
    """(step, part, start, end), half-open token ranges, in order, none empty."""
    field_spans: tuple[tuple[int, str, int, int, int], ...]
    """(step, field, start, end, skipped), characters of the step's text."""
    convention_spans: tuple[tuple[str, int, int, int], ...]
    """(convention, step, start, end), half-open token ranges, none empty."""
    step_chars: "NDArray[np.int16]"
    """How many characters each token of the steps begins, step after step."""


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

    def load(self, *, fast: bool = False, axolotl: bool = False) -> "LoadedTokenizer":
        """Return the tokenizer, ready for use; `fast` where its certificate allows it.

        `axolotl` is `Renderer`'s.
        """
        return LoadedTokenizer(self, fast=fast, axolotl=axolotl)


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
    is_here = Path(path).is_dir()
    if not is_here and (path.startswith(("/", ".", "~")) or path.count("/") > 1):
        found = "a file; give its folder" if Path(path).exists() else "there is no such folder"
        raise ConfigError(f"{option} {source}: {found}")
    problem = None if is_here else hub_problem()
    try:
        # Where the hub does not answer there is its cache, which its client would come to last.
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=problem is not None)
    except Exception as error:  # noqa: BLE001 - all that tokenizers raises is a bare Exception
        if problem and isinstance(error, OSError):  # files are missing, or it is no name of a hub's
            raise ConfigError(
                f"{option} {source}: expected a folder or a hub id, got no such folder, nothing "
                f"usable in the hub's cache, and {problem}"
            ) from None
        reason = f"{type(error).__name__}: {in_one_line(error)}"
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

    def __init__(self, spec: TokenizerSpec, *, fast: bool = False, axolotl: bool = False) -> None:
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
        self.renderer = Renderer(self.template, axolotl=axolotl)
        self.header = self.renderer.header
        self._newline = self._encode("\n").ids
        eos = spec.variables.get("eos_token")
        self._eos: int | None = self.backend.token_to_id(eos) if eos else None
        self.use_engine(fast=fast)

    def use_engine(self, *, fast: bool) -> None:
        """Encode by the fast engine or the reference from now on."""
        self.encoder = Encoder(
            self.spec.backend, self.backend, fast=fast, control_tokens=self.spec.control_tokens
        )

    def conversations(self, trajectory: Trajectory, *, history: History) -> list[Conversation]:
        """Return the renderings to train on, see `Renderer.conversations`."""
        return self.renderer.conversations(trajectory, history=history)

    def encode(self, conversations: Sequence[Conversation]) -> list[Tokens]:
        """Return the tokens of every conversation.

        Raises:
            FormatError: a text holds half of a surrogate pair, which no tokenizer takes.
            MismatchError: the fast engine is found to differ from the reference.
        """
        for each in conversations:
            _refuse_surrogates(each.rendering.text)
        plain = [each.rendering.text for each in conversations if not each.rendering.forged]
        encoded = self.encoder.encode(plain)
        if plain:
            which = max(range(len(plain)), key=lambda i: hash_of_place(plain[i], i))
            self.encoder.check(plain[which], encoded[which], seed=hash_of_place(plain[which], -1))
        found = iter(encoded)
        return [
            _tokens(
                each,
                self._encode_pieces(each) if each.rendering.forged else next(found),
                self._eos,
            )
            for each in conversations
        ]

    def _encode_pieces(self, conversation: Conversation) -> Encoded:
        """Encode a rendering that holds control tokens as text: those apart, without added tokens.

        The pieces between them are encoded behind a newline that is taken off again, so that no
        tokenizer treats their start as the start of a text. The same ids come out of
        `apply_chat_template(..., sanitize_control_tokens=True)`. All characters of a control token
        are taken to begin in the first of its tokens.
        """
        text = conversation.rendering.text
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        position = 0
        for begin, end in (*conversation.rendering.forged, (len(text), len(text))):
            self._append_piece(text[position:begin], position, ids, offsets)
            plain = self._without_added_tokens(text[begin:end])
            ids += plain
            offsets += [(begin, end)] * len(plain)
            position = end
        return Encoded.of_offsets(ids, offsets)

    def _append_piece(
        self, piece: str, position: int, ids: list[int], offsets: list[tuple[int, int]]
    ) -> None:
        if not piece:
            return
        encoding, shift, skip = self._encode(piece), 0, 0
        if ids:
            behind = self._encode("\n" + piece)
            if behind.ids[: len(self._newline)] == self._newline:
                encoding, shift, skip = behind, 1, len(self._newline)
        ids += encoding.ids[skip:]
        moved = position - shift
        offsets += [(start + moved, end + moved) for start, end in encoding.offsets[skip:]]

    def _encode(self, text: str) -> "Encoding":
        return self.backend.encode(text, add_special_tokens=False)

    def _without_added_tokens(self, text: str) -> list[int]:
        behind = self._plain("\n" + text)
        if behind[: len(self._newline)] == self._newline:
            return behind[len(self._newline) :]
        return self._plain(text)

    def _plain(self, text: str) -> list[int]:
        if self.backend.normalizer is not None:
            text = self.backend.normalizer.normalize_str(text)
        pieces = [text]
        if self.backend.pre_tokenizer is not None:
            pieces = [piece for piece, _ in self.backend.pre_tokenizer.pre_tokenize_str(text)]
        return [token.id for piece in pieces for token in self.backend.model.tokenize(piece)]


def _tokens(conversation: Conversation, encoded: Encoded, eos: int | None) -> Tokens:
    """Look the characters of a conversation's spans up in its encoding.

    `eos` is the id of the tokenizer's `eos_token`, which axolotl looks for.
    """
    spans, parts = conversation.spans, conversation.parts
    edges = [*(each[1:] for each in spans), *(each[2:] for each in parts)]
    found = encoded.tokens_before(edges).tolist() if edges else []
    step_spans = tuple((each[0], *pair) for each, pair in zip(spans, found, strict=False))
    behind = found[len(spans) :]
    part_spans = tuple((*each[:2], *pair) for each, pair in zip(parts, behind, strict=True))
    length = len(conversation.rendering.text)
    begun = encoded.characters_begun(length=length)
    pieces = [begun[start:end] for _, start, end in step_spans]
    return Tokens(
        ids=encoded.ids,
        step_spans=step_spans,
        part_spans=tuple(each for each in part_spans if each[2] < each[3]),
        field_spans=_moved(conversation, step_spans, encoded),
        convention_spans=convention_spans(
            conversation.conventions,
            starts=encoded.firsts,
            ends=token_ends(encoded.begun, length=length),
            ids=encoded.ids,
            eos=eos,
        )
        if conversation.conventions
        else (),
        step_chars=np.concatenate(pieces) if pieces else begun[:0],
    )


def _pair(values: list[int]) -> tuple[int, int]:
    return values[0], values[1]


def _moved(
    conversation: Conversation, step_spans: Sequence[tuple[int, int, int]], encoded: Encoded
) -> tuple[tuple[int, str, int, int, int], ...]:
    """Return the field spans counted from the first character that begins in the step's tokens.

    That is not the first one that the agent wrote where a token straddles the header's end.
    """
    if not step_spans:
        return conversation.fields
    text_length = np.int32(len(conversation.rendering.text))
    begun = np.append(encoded.begun, text_length)[[start for _, start, _ in step_spans]].tolist()
    missing = {
        step: begins - first
        for (step, first, _), begins in zip(conversation.spans, begun, strict=True)
        if begins != first
    }
    if not missing:
        return conversation.fields
    moved = []
    for step, name, start, end, skipped in conversation.fields:
        cut = missing.get(step, 0)
        lost = max(cut - start, 0)
        moved.append((step, name, max(start - cut, 0), max(end - cut, 0), skipped + lost))
    return tuple(moved)


def _refuse_surrogates(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise FormatError(
            f"character {error.start} of the chat text is half of a surrogate pair "
            f"(U+{ord(text[error.start]):04X}), which no tokenizer takes"
        ) from None


def hash_of_place(text: str, place: int) -> int:
    """Return a number that depends on a text's length and place, and on nothing else."""
    digest = hashlib.blake2b(f"{len(text)}:{place}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
