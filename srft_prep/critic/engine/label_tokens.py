"""Tokens of an answer as text, and those that can begin a label: for models that run here.

Probabilities of labels are read off the tokens that begin them (`answers`), so of a vocabulary only
those need scores: a beginning of a label, maybe with the end of what JSON has before it (`":"go`).
"""

import re
from collections.abc import Sequence
from typing import Any, Final

from srft_prep.types import LABELS

MOST_SCORED: Final = 128
"""vLLM scores no more tokens than this at a place."""

_BEFORE: Final = re.compile(r'\A(?:(?:\d*")?: ?)?"|\A ?"|\A')
"""What of the JSON before a label can be in one token with its beginning."""

Scores = Sequence[tuple[int, float]]
Piece = tuple[str, list[tuple[str, float]]]


def label_token_ids(tokenizer: Any) -> list[int]:
    """Return the tokens that can begin a label, the plainest first, at most MOST_SCORED.

    Args:
        tokenizer: of transformers, with a backend of tokenizers; none are known of another.
    """
    backend = _backend(tokenizer)
    if backend is None:
        return []
    texts = backend.decode_batch([[i] for i in range(backend.get_vocab_size())])
    found = [(len(before), i) for i, text in enumerate(texts) for before in _befores(text)]
    return [token_id for _, token_id in sorted(found)[:MOST_SCORED]]


def pieces_of(
    tokenizer: Any, ids: Sequence[int], scores: Sequence[Scores]
) -> tuple[str, list[Piece] | None]:
    """Return the text of some tokens, and that text in pieces with scored alternatives.

    A character that several tokens share belongs to the last of them. Tokens without scores are
    joined. The highest score of each piece becomes 0, since only differences count.

    Args:
        tokenizer: of transformers.
        ids: the tokens.
        scores: (token, log-probability or logit) of the alternatives at each place, or none.
    """
    backend = _backend(tokenizer)
    if backend is None:
        return str(tokenizer.decode(list(ids), skip_special_tokens=True)), None
    from tokenizers.decoders import DecodeStream

    stream = DecodeStream(skip_special_tokens=True)
    pieces: list[Piece] = []
    plain: list[str] = []
    try:
        for token_id, scored in zip(ids, scores, strict=True):
            text = stream.step(backend, token_id) or ""
            finite = {other: score for other, score in scored if score > float("-inf")}
            if not finite:
                plain.append(text)
                continue
            highest = max(finite.values())
            others = [
                (text if other == token_id else backend.decode([other]), score - highest)
                for other, score in finite.items()
            ]
            pieces += [("".join(plain), []), (text, others)]
            plain = []
    except Exception:  # noqa: BLE001 - the stream raises bare ones where bytes are no UTF-8
        return backend.decode(list(ids), skip_special_tokens=True), None
    pieces.append(("".join(plain), []))
    return "".join(text for text, _ in pieces), pieces


def _befores(text: str) -> list[str]:
    """Return what stands in a token before the label that it can begin, if it can begin one."""
    before = match[0] if (match := _BEFORE.match(text)) else ""
    rest = text[len(before) :]
    begins = rest and any(
        label.startswith(rest) or rest.startswith(f'{label}"') for label in LABELS
    )
    return [before] if begins else []


def _backend(tokenizer: Any) -> Any:
    from tokenizers import Tokenizer

    backend = getattr(tokenizer, "_tokenizer", None)
    return backend if isinstance(backend, Tokenizer) else None
