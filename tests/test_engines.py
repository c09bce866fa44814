"""Two engines, one result: ids, and the character that each token begins with."""

import json
import sys
import unicodedata
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer

import srft_prep.engines as engine_module
from srft_prep.chat import tokenizer_path
from srft_prep.engines import Encoded, FastEngine, ReferenceEngine
from srft_prep.errors import FormatError

BYTE_LEVEL = ("example", "qwen2.5-coder-instruct", "qwen3", "gpt-oss")

TEXTS = (
    "",
    "a",
    "def f(x):\n    return x  # ok\n",
    "naïve café — “quotes” … 漢字かな 한국어 हिन्दी \U0001f469\u200d\U0001f4bb✅",
    "<|im_start|>user\nhé<|im_end|>\n<|im_start|>assistant\n\n\nx<|im_end|>",
    "\u200b\ufeff\u00a0\u3000\r\n\t\t  \n",
    "\U0001d518\U0001d52b \U000e0001 \U0001f1e9\U0001f1ea",
    "x" * 3000 + "1" * 300 + "é" * 300,
)


@cache
def backend(name: str, data: Path) -> str:
    source = tokenizer_path(name) if name == "example" else data / "tokenizers" / name
    return AutoTokenizer.from_pretrained(source).backend_tokenizer.to_str()


@cache
def engines(name: str, data: Path) -> tuple[FastEngine, ReferenceEngine]:
    return FastEngine(backend(name, data)), reference(backend(name, data))


def reference(text: str) -> ReferenceEngine:
    loaded = Tokenizer.from_str(text)
    loaded.post_processor = None
    loaded.no_truncation()
    loaded.no_padding()
    return ReferenceEngine(loaded)


def assert_same(ours: Encoded | None, theirs: Encoded) -> None:
    assert ours is not None
    assert ours.ids.tolist() == theirs.ids.tolist()
    assert ours.firsts.tolist() == theirs.firsts.tolist()
    assert ours.begun.tolist() == theirs.begun.tolist()


@pytest.mark.parametrize("name", BYTE_LEVEL)
def test_both_engines_give_the_same_tokens_at_the_same_places(name: str, shared_data: Path) -> None:
    fast, slow = engines(name, shared_data)
    for ours, theirs in zip(fast.encode(TEXTS), slow.encode(TEXTS), strict=True):
        assert_same(ours, theirs)


@pytest.mark.parametrize("name", BYTE_LEVEL)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters(exclude_categories=["Cs", "Cn", "Co"]), max_size=60))
def test_places_are_equal_wherever_the_fast_engine_takes_a_text(
    name: str, text: str, shared_data: Path
) -> None:
    fast, slow = engines(name, shared_data)
    (ours,), (theirs,) = fast.encode([text]), slow.encode([text])
    if ours is not None and ours.ids.tolist() == theirs.ids.tolist():
        assert_same(ours, theirs)


@pytest.mark.parametrize("name", BYTE_LEVEL)
def test_every_character_begins_in_one_token(name: str, shared_data: Path) -> None:
    fast, slow = engines(name, shared_data)
    for encoded, text in zip(fast.encode(TEXTS), TEXTS, strict=True):
        assert encoded is not None
        begun = encoded.characters_begun(length=len(text))
        assert (begun >= 0).all()
        names = [slow.backend.id_to_token(token) for token in encoded.ids]
        byte_ends = np.cumsum([len(name) for name in names])  # a byte-level name: a letter a byte
        first_bytes = np.cumsum([0, *(len(char.encode()) for char in text)])[:-1]
        expected = np.searchsorted(first_bytes, byte_ends)
        assert np.cumsum(begun).tolist() == expected.tolist()


def test_text_that_the_tokenizer_would_rewrite_is_left_to_the_reference(shared_data: Path) -> None:
    fast, slow = engines("qwen2.5-coder-instruct", shared_data)
    decomposed = "cafe\u0301"
    assert fast.encode([decomposed, "café"])[0] is None
    (theirs,) = slow.encode([decomposed])
    assert theirs.tokens_before([len(decomposed)]).tolist() == [len(theirs.ids)]


def _without_byte_level(described: dict[str, Any]) -> None:
    described["pre_tokenizer"] = None


def _with_lowercase(described: dict[str, Any]) -> None:
    described["normalizer"] = {"type": "Lowercase"}


def _with_strip(described: dict[str, Any]) -> None:
    described["added_tokens"][0]["rstrip"] = True


def _with_words(described: dict[str, Any]) -> None:
    described["model"] = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_without_byte_level, "no byte-level vocabulary"),
        (_with_lowercase, "a normalizer that changes the text: Lowercase"),
        (_with_strip, "swallows white space"),
        (_with_words, "a WordLevel model"),
    ],
)
def test_a_tokenizer_whose_token_lengths_tell_no_places_is_refused(
    change: Any, reason: str, shared_data: Path
) -> None:
    described = json.loads(backend("example", shared_data))
    change(described)
    with pytest.raises(FormatError, match=reason):
        FastEngine(json.dumps(described))


def test_a_sentencepiece_vocabulary_is_refused(shared_data: Path) -> None:
    with pytest.raises(FormatError, match="no byte-level vocabulary"):
        FastEngine(backend("phi-3-mini", shared_data))


def test_texts_of_inert_characters_are_normalized() -> None:
    inert = {chr(code) for code in range(sys.maxunicode + 1) if engine_module._is_inert(chr(code))}
    pairs = (unicodedata.decomposition(chr(code)).split() for code in range(sys.maxunicode + 1))
    joining = {chr(int(pair[1], 16)) for pair in pairs if len(pair) == 2 and "<" not in pair[0]}
    jamo = set(map(chr, range(0x1161, 0x1176))) | set(map(chr, range(0x11A8, 0x11C3)))
    assert len(inert) > 70_000
    assert inert.isdisjoint(joining | jamo)
    assert not any(map(unicodedata.combining, inert))
    assert unicodedata.is_normalized("NFC", "".join(sorted(inert)))
