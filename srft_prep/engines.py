"""Text -> token ids and the character that each token begins with: two engines, one result.

The reference is Hugging Face `tokenizers`, which gives offsets with the ids. The fast engine is
`fastokens`, which gives ids alone (25 to 70 times faster, reference/PEERS.md); where its tokens
begin follows from their lengths in bytes, which a byte-level vocabulary states: each character of
a token's name is one byte, and the names of a text's tokens joined are the text. That holds where
nothing rewrites the text first, so the fast engine takes texts in NFC only where the tokenizer
normalises to NFC, and gives back (None) every text whose bytes its tokens do not add up to.
Whether the two agree is not for this module to believe: see `certificate`.
"""

import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from typing import TYPE_CHECKING, Any, Final, Self

import numpy as np

from srft_prep.errors import FormatError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray
    from tokenizers import Tokenizer

FAST: Final = "fastokens"
REFERENCE: Final = "tokenizers"

_JOINERS: Final = frozenset("\u200b\u200c\u200d\ufe0e\ufe0f\ufeff")
"""Characters of emoji and the like that normalisation leaves alone, whatever stands beside them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoded:
    """The tokens of one text."""

    ids: "NDArray[np.int32]"
    """Token ids, [T]."""
    firsts: "NDArray[np.int32]"
    """The character that holds each token's first byte, [T], not falling."""
    begun: "NDArray[np.int32]"
    """The first character that begins in each token or behind it, [T]: one more than `firsts`
    where a token begins within a character."""

    @classmethod
    def of_offsets(cls, ids: Sequence[int], offsets: Sequence[tuple[int, int]]) -> Self:
        """Return tokens that are given with the characters that they stand for, as by Hugging Face.

        A token that begins within a character overlaps the token before it.
        """
        places = np.array(offsets, np.int32).reshape(-1, 2)
        firsts = np.maximum.accumulate(places[:, 0]) if len(places) else places[:, 0]
        begun = firsts.copy()
        np.maximum(firsts[1:], places[:-1, 1], out=begun[1:])
        return cls(ids=np.array(ids, np.int32), firsts=firsts, begun=begun)

    @classmethod
    def joined(cls, pieces: "Sequence[Encoded]", starts: Sequence[int]) -> Self:
        """Return the tokens of a text from those of its pieces, which start at these characters."""
        return cls(
            ids=np.concatenate([piece.ids for piece in pieces]),
            firsts=np.concatenate(
                [
                    piece.firsts + np.int32(start)
                    for piece, start in zip(pieces, starts, strict=True)
                ]
            ),
            begun=np.concatenate(
                [piece.begun + np.int32(start) for piece, start in zip(pieces, starts, strict=True)]
            ),
        )

    def tokens_before(self, characters: "ArrayLike") -> "NDArray[np.int64]":
        """Return how many tokens have their first character before each of the characters.

        So a half-open range of characters becomes a half-open range of tokens in which a token
        that straddles an edge lies on the side where its first character does.
        """
        return np.searchsorted(self.firsts, np.asarray(characters, np.int32))

    def characters_begun(self, *, length: int) -> "NDArray[np.int16]":
        """Return how many characters begin in each token, [T]; `length` is the text's."""
        return np.diff(self.begun, append=np.int32(length)).astype(np.int16)


class ReferenceEngine:
    """Hugging Face `tokenizers`."""

    def __init__(self, backend: "Tokenizer") -> None:
        self.backend = backend

    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        """Return the tokens of every text."""
        encodings = self.backend.encode_batch(list(texts), add_special_tokens=False)
        return [Encoded.of_offsets(each.ids, each.offsets) for each in encodings]

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of every text."""
        encodings = self.backend.encode_batch(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]


class FastEngine:
    """`fastokens`, for tokenizers with a byte-level vocabulary."""

    def __init__(self, backend: str) -> None:
        """Load a `tokenizer.json`.

        Raises:
            FormatError: the tokenizer is of another kind, or the engine cannot load it.
        """
        described = json.loads(backend)
        if reason := _unsuited(described):
            raise FormatError(reason)
        try:
            import fastokens

            self._tokenizer = fastokens.Tokenizer.from_json_str(backend)
        except ImportError:
            raise FormatError("fastokens is not installed") from None
        except Exception as error:  # noqa: BLE001 - all that it raises is of many classes
            raise FormatError(f"fastokens cannot load the tokenizer: {error}") from None
        self._tokenizer.no_truncation()
        self._num_bytes = _bytes_of_tokens(described)
        self._normalises = described.get("normalizer") is not None
        self._inert: set[str] = set()

    def ids(self, texts: Sequence[str]) -> "list[NDArray[np.int32]]":
        """Return the token ids of every text, each [T]."""
        flat, ends = self._tokenizer.encode_batch_flat(list(texts))
        ids = np.frombuffer(flat, np.int32)
        return np.split(ids, np.frombuffer(ends, np.uint64)[1:-1].astype(np.int64))

    def encode(self, texts: Sequence[str]) -> list[Encoded | None]:
        """Return the tokens of every text; None for one that the reference has to encode."""
        fit = [self._takes(text) for text in texts]
        found = iter(self.ids([text for text, taken in zip(texts, fit, strict=True) if taken]))
        return [
            self._located(next(found), text) if taken else None
            for text, taken in zip(texts, fit, strict=True)
        ]

    def _takes(self, text: str) -> bool:
        if not self._normalises or text.isascii():
            return True
        unknown = beyond_ascii(text) - self._inert
        self._inert.update(filter(_is_inert, unknown))
        return unknown <= self._inert or unicodedata.is_normalized("NFC", text)

    def _located(self, ids: "NDArray[np.int32]", text: str) -> Encoded | None:
        ends = np.cumsum(np.take(self._num_bytes, ids), dtype=np.int32)
        data = text.encode()
        if (int(ends[-1]) if len(ends) else 0) != len(data):
            return None
        starts = np.zeros_like(ends)
        starts[1:] = ends[:-1]
        if len(data) == len(text):
            return Encoded(ids=ids, firsts=starts, begun=starts)
        within = np.flatnonzero(np.frombuffer(data, np.int8) < -64)  # bytes inside a character
        return Encoded(
            ids=ids,
            firsts=starts - _number_up_to(within, starts, inclusive=True),
            begun=starts - _number_up_to(within, starts, inclusive=False),
        )


def beyond_ascii(text: str) -> set[str]:
    """Return the characters of a text that are not ASCII."""
    data = np.frombuffer(text.encode(errors="surrogatepass"), np.int8)
    return set(data[data < 0].tobytes().decode(errors="surrogatepass"))


def is_settled(character: str) -> bool:
    """Return whether a character was assigned in Unicode 3.2 and has kept its category since."""
    category = unicodedata.category(character)
    return category[0] != "C" and category == unicodedata.ucd_3_2_0.category(character)


def _is_inert(character: str) -> bool:
    """Return whether a text of such characters alone is in NFC.

    Unicode Standard Annex 15, section 9: that needs the quick check to say yes, and no combining
    class. Characters for which it says "maybe" are marks, or jamo of Hangul.
    """
    return character in _JOINERS or (
        is_settled(character)
        and unicodedata.category(character)[0] != "M"
        and not "\u1100" <= character <= "\u11ff"
        and unicodedata.is_normalized("NFC", character)
    )


def _number_up_to(
    places: "NDArray[np.int64]", starts: "NDArray[np.int32]", *, inclusive: bool
) -> "NDArray[np.int32]":
    """Return how many of the places lie before each start, or at it, [T]; both are sorted."""
    first = np.searchsorted(starts, places.astype(np.int32), side="left" if inclusive else "right")
    return np.cumsum(np.bincount(first, minlength=len(starts) + 1)[:-1], dtype=np.int32)


@lru_cache(maxsize=1)
def load_fast(backend: str) -> FastEngine:
    """Return the fast engine for a `tokenizer.json`; loading one takes a second or two.

    Raises:
        FormatError: it cannot be used, see `FastEngine`.
    """
    return FastEngine(backend)


def versions() -> dict[str, str]:
    """Return the engines' versions, by name; an engine that is not installed is left out."""
    found = {}
    for name in (FAST, REFERENCE):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _unsuited(described: dict[str, Any]) -> str | None:
    """Return why token lengths would not tell where tokens begin, or None where they do."""
    if described["model"]["type"] != "BPE":
        return f"a {described['model']['type']} model, not a byte-level BPE"
    steps = _flattened(described.get("pre_tokenizer"), "pretokenizers")
    byte_level = [step for step in steps if step["type"] == "ByteLevel"]
    if not byte_level or byte_level[0].get("add_prefix_space"):
        return "no byte-level vocabulary"
    for step in _flattened(described.get("normalizer"), "normalizers"):
        if step["type"] != "NFC":
            return f"a normalizer that changes the text: {step['type']}"
    for token in described.get("added_tokens", ()):
        if token["lstrip"] or token["rstrip"]:
            return f"the token {token['content']!r} swallows white space"
    return None


def _flattened(step: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    if step is None:
        return []
    if step["type"] != "Sequence":
        return [step]
    return [leaf for inner in step[key] for leaf in _flattened(inner, key)]


def _bytes_of_tokens(described: dict[str, Any]) -> "NDArray[np.int32]":
    """Return the length in bytes of every token by id."""
    lengths = {number: len(name) for name, number in described["model"]["vocab"].items()}
    for token in described.get("added_tokens", ()):
        lengths[token["id"]] = len(token["content"].encode())
    table = np.zeros(max(lengths, default=0) + 1, np.int32)
    table[list(lengths)] = list(lengths.values())
    return table
