"""Which engine encodes a text, and the proof that it does not matter.

The fast engine is used where it proved equal to the reference, on this tokenizer and this data:

- **At the start** both encode fuzzed strings (control-token lookalikes, runs of blanks, digits,
  CJK, combining marks, emoji) and samples of the data; ids and places of the tokens must be equal.
- **A gate for rare characters.** Engines split text by Unicode categories, of different Unicode
  versions. A character whose category is what it was in Unicode 3.2 is trusted. Any other is put
  into a dozen contexts and encoded by both before the first text that holds it; where they differ,
  its texts go to the reference.
- **During the run** a stretch between two control tokens of one text in each batch is encoded by
  the reference, too. The first difference raises: `tokens` then starts over with the reference.

All that was compared is counted into the certificate, which the manifest of `tokenize` holds.
"""

import random
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import compress, pairwise
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np

from srft_prep.engines import (
    FAST,
    REFERENCE,
    Encoded,
    FastEngine,
    ReferenceEngine,
    beyond_ascii,
    is_settled,
    load_fast,
    versions,
)
from srft_prep.errors import BackendError, FormatError
from srft_prep.render import any_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Engine = Literal["auto", "fastokens", "tokenizers"]

FUZZED_STRINGS: Final = 2_000
SAMPLE_CHARACTERS: Final = 4_000
"""Length of the stretch of a text of the data that is compared at the start."""
CHECKED_TOKENS: Final = 512
"""Longest stretch that is compared during a run."""

_CONTEXTS: Final = (
    *("{}", "a{}", "{}a", "A{}a", " {}", "{} ", "1{}2", "'{}S", "\n{}\n", "{0}{0}", ".{}!"),
    *("漢{}字", "\t{}  x", "e{}"),
)
_PIECES: Final = (
    *("the", "Hello", "def f(x):", "don't", "I'LL", "x_1", "0xFF", "3.14159", "1234567", "é", "ß"),
    *(" ", "  ", "\n", "\n\n", "\r\n", "\t", "        ", "\u00a0", "\u3000", "\u200b", "\ufeff"),
    *("漢字", "한국어", "日本", "العربية", "עברית", "हिन्दी", "ไทย", "Ελληνικά", "русский"),
    *("😀", "👩\u200d💻", "✅", "⚠\ufe0f", "→", "—", "…", "“", "”", "•", "═", "№", "ﬁ", "½"),
    *("<|", "|>", "<", ">", "</", "[", "]", "{", "}", '"', "'", "`", "```", "\\n", "$", "%", "#"),
)


class MismatchError(BackendError):
    """The fast engine gave other tokens than the reference."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """What was found out about the fast engine before a run."""

    exact: bool
    """Whether the fast engine may be used."""
    reason: str | None = None
    """Why not."""
    strings: int = 0
    """Strings that both engines encoded."""
    tokens: int = 0
    mismatches: int = 0

    def describe(self, during: Counter[str]) -> dict[str, Any]:
        """Return the manifest's entry; `during` holds the run's own counts, see `Encoder`."""
        return {
            "engine": FAST if self.exact else REFERENCE,
            "reference": REFERENCE,
            "versions": versions(),
            "reason": self.reason,
            "at_start": {
                "strings": self.strings,
                "tokens": self.tokens,
                "mismatches": self.mismatches,
            },
            "during_run": {
                "strings": during["checked_strings"],
                "tokens": during["checked_tokens"],
                "mismatches": 0,
                "texts_by_fast_engine": during["fast_texts"],
                "texts_by_reference": during["reference_texts"],
            },
        }


def prove(
    backend: str,
    reference: "Tokenizer",
    samples: Iterable[str],
    *,
    control_tokens: Sequence[str],
    engine: Engine = "auto",
) -> Certificate:
    """Find out whether the fast engine equals the reference on this tokenizer and this data.

    Args:
        backend: the `tokenizer.json` as text.
        reference: the same, loaded.
        samples: texts of the data.
        control_tokens: texts of the special tokens.
        engine: what the user asked for.

    Raises:
        MismatchError: the user asked for the fast engine, and it is not exact.
    """
    if engine == REFERENCE:
        return Certificate(exact=False, reason="asked for")
    try:
        fast = load_fast(backend)
    except FormatError as error:
        certificate = Certificate(exact=False, reason=str(error))
    else:
        certificate = _compare(fast, ReferenceEngine(reference), samples, control_tokens)
    if engine == FAST and not certificate.exact:
        raise MismatchError(f"{certificate.reason}; --tokenizer-engine auto does without {FAST}")
    return certificate


def _compare(
    fast: FastEngine,
    reference: ReferenceEngine,
    samples: Iterable[str],
    control_tokens: Sequence[str],
) -> Certificate:
    source = random.Random(0)
    strings = [_fuzzed(source, control_tokens) for _ in range(FUZZED_STRINGS)]
    strings += [_stretch(source, text) for text in samples]
    gate = Gate(fast, reference)
    strings = [text for text in strings if gate.admits(text)]
    compared, tokens, wrong = 0, 0, []
    for text, ours, theirs in zip(
        strings, fast.encode(strings), reference.encode(strings), strict=True
    ):
        if ours is None:
            continue
        compared += 1
        tokens += len(theirs.ids)
        if not _same(ours, theirs):
            wrong.append(text)
    reason = None
    if wrong:
        reason = (
            f"{FAST} encodes {wrong[0][:60]!r} differently ({len(wrong)} of {compared} strings)"
        )
    return Certificate(
        exact=not wrong, reason=reason, strings=compared, tokens=tokens, mismatches=len(wrong)
    )


def _fuzzed(source: random.Random, control_tokens: Sequence[str]) -> str:
    pieces: list[str] = []
    for _ in range(source.randint(1, 16)):
        kind = source.random()
        if kind < 0.1 and control_tokens:
            token = source.choice(control_tokens)
            pieces.append(token if kind < 0.05 else token[: source.randint(1, len(token))])
        elif kind < 0.3:
            pieces.append(chr(source.choice((*range(0x20, 0x250), *range(0x370, 0x530)))))
        else:
            pieces.append(source.choice(_PIECES) * source.choice((1, 1, 1, 2, 5)))
    return "".join(pieces)


def _stretch(source: random.Random, text: str) -> str:
    start = source.randrange(max(len(text) - SAMPLE_CHARACTERS, 0) + 1)
    return text[start : start + SAMPLE_CHARACTERS]


def _same(ours: Encoded, theirs: Encoded) -> bool:
    return (
        np.array_equal(ours.ids, theirs.ids)
        and np.array_equal(ours.firsts, theirs.firsts)
        and np.array_equal(ours.begun, theirs.begun)
    )


class Gate:
    """Decides by its characters whether the fast engine may have a text."""

    def __init__(self, fast: FastEngine, reference: ReferenceEngine) -> None:
        self._fast = fast
        self._reference = reference
        self._trusted: set[str] = set()
        self._refused: set[str] = set()

    def admits(self, text: str) -> bool:
        """Return whether no character of a text is one that the engines differ on."""
        if text.isascii():
            return True
        found = beyond_ascii(text)
        for character in found - self._trusted - self._refused:
            trusted = is_settled(character) or self._proves(character)
            (self._trusted if trusted else self._refused).add(character)
        return self._refused.isdisjoint(found)

    def _proves(self, character: str) -> bool:
        strings = [
            text
            for text in (context.format(character) for context in _CONTEXTS)
            if unicodedata.is_normalized("NFC", text)
        ]
        return all(
            ours is None or _same(ours, theirs)
            for ours, theirs in zip(
                self._fast.encode(strings), self._reference.encode(strings), strict=True
            )
        )


class Encoder:
    """Texts -> tokens, by the fast engine where its certificate says so."""

    def __init__(
        self,
        backend: str,
        reference: "Tokenizer",
        *,
        fast: bool,
        control_tokens: Sequence[str],
    ) -> None:
        """Load what is needed; `fast` is the certificate's verdict."""
        self.counts: Counter[str] = Counter()
        """`fast_texts`, `reference_texts`, `checked_strings`, `checked_tokens` so far."""
        self._reference = ReferenceEngine(reference)
        self._fast = load_fast(backend) if fast else None
        self._gate = Gate(self._fast, self._reference) if self._fast else None
        self._control_tokens = any_of(control_tokens)
        self._is_control = np.zeros(reference.get_vocab_size() + 1, np.bool_)
        for token in control_tokens:
            if (number := reference.token_to_id(token)) is not None:
                self._is_control[number] = True

    @property
    def is_fast(self) -> bool:
        """Whether the fast engine is in use."""
        return self._fast is not None

    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        """Return the tokens of every text.

        No token reaches over a control token, so that a text which the fast engine must not have is
        cut before each of them, and only the pieces in question go to the reference.
        """
        found = self._by_fast_engine(texts)
        missing = sum(each is None for each in found)
        self.counts["fast_texts"] += len(texts) - missing
        self.counts["reference_texts"] += missing
        return [
            self._in_pieces(text) if each is None else each
            for text, each in zip(texts, found, strict=True)
        ]

    def _by_fast_engine(self, texts: Sequence[str]) -> list[Encoded | None]:
        if self._fast is None or self._gate is None:
            return [None] * len(texts)
        admitted = [self._gate.admits(text) for text in texts]
        encoded = iter(self._fast.encode(list(compress(texts, admitted))))
        return [next(encoded) if each else None for each in admitted]

    def _in_pieces(self, text: str) -> Encoded:
        if self._fast is None:
            return self._reference.encode([text])[0]
        edges = [0, *(match.start() for match in self._control_tokens.finditer(text)), len(text)]
        pieces = [text[start:end] for start, end in pairwise(edges)]
        found = self._by_fast_engine(pieces)
        missing = [piece for piece, each in zip(pieces, found, strict=True) if each is None]
        replaced = iter(self._reference.encode(missing))
        return Encoded.joined(
            [next(replaced) if each is None else each for each in found], edges[:-1]
        )

    def check(self, text: str, encoded: Encoded, *, seed: int) -> None:
        """Compare a stretch of a text with the reference, if the fast engine is in use.

        `seed` chooses the stretch: from one control token to the next, and if that one is longer
        than `CHECKED_TOKENS`, a shorter one.

        Raises:
            MismatchError: the reference gives other tokens.
        """
        if self._fast is None:
            return
        edges = np.flatnonzero(self._is_control[encoded.ids])
        edges = np.append(edges, len(encoded.ids))
        if len(edges) < 2:
            return
        which = max(int(np.searchsorted(edges, seed % len(encoded.ids), side="right")) - 1, 0)
        if edges[which + 1] - edges[which] > CHECKED_TOKENS:
            short = np.flatnonzero(np.diff(edges) <= CHECKED_TOKENS)
            if not len(short):
                return
            which = int(short[seed % len(short)])
        start, end = int(edges[which]), int(edges[which + 1])
        last = int(encoded.firsts[end]) if end < len(encoded.ids) else len(text)
        piece = text[int(encoded.firsts[start]) : last]
        (theirs,) = self._reference.ids([piece])
        self.counts["checked_strings"] += 1
        self.counts["checked_tokens"] += len(theirs)
        if not np.array_equal(encoded.ids[start:end], theirs):
            raise MismatchError(
                f"{FAST} encodes {piece[:60]!r}... differently from {REFERENCE}: please report it; "
                f"--tokenizer-engine {REFERENCE} does without it"
            )
