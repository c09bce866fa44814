"""The fast engine is used where it proved equal, and its first mistake is found and mended."""

import json
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from srft_prep import engines
from srft_prep.certificate import Encoder, Gate, MismatchError, prove
from srft_prep.chat import load_spec, tokenizer_path
from srft_prep.engines import FastEngine, ReferenceEngine
from tests.stages import srft_prep, write_trajectories
from tests.stages import trajectory as made

START, END = "<|im_start|>", "<|im_end|>"
CONTROL = (START, END, "<|endoftext|>")


@cache
def backend() -> str:
    return AutoTokenizer.from_pretrained(tokenizer_path("example")).backend_tokenizer.to_str()


def loaded(text: str) -> Tokenizer:
    tokenizer = Tokenizer.from_str(text)
    tokenizer.post_processor = None
    return tokenizer


def swapped(first: str, second: str) -> str:
    """Return the example tokenizer with the ids of two tokens exchanged: an engine with a bug."""
    described = json.loads(backend())
    vocabulary = described["model"]["vocab"]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    return json.dumps(described)


def test_the_fast_engine_is_certified_on_the_example_tokenizer() -> None:
    samples = [f"{START}user\nsome text, ça va?{END}\n" * 20]
    certificate = prove(backend(), loaded(backend()), samples, control_tokens=CONTROL)
    assert certificate.exact
    assert certificate.reason is None
    assert certificate.strings > 1_900
    assert certificate.tokens > 10_000
    assert certificate.mismatches == 0


def test_an_engine_with_a_bug_is_not_certified() -> None:
    certificate = prove(swapped("e", "a"), loaded(backend()), [], control_tokens=CONTROL)
    assert not certificate.exact
    assert certificate.mismatches > 50
    assert "differently" in str(certificate.reason)
    with pytest.raises(MismatchError, match="differently"):
        prove(swapped("e", "a"), loaded(backend()), [], control_tokens=CONTROL, engine="fastokens")


def test_a_difference_on_the_data_alone_is_found_by_the_samples() -> None:
    word = next(each for each in json.loads(backend())["model"]["vocab"] if each == "\u0120test")
    buggy = swapped(word, "\u0120return")
    with_words = [f"a test of {number}" for number in range(10)]
    certificate = prove(buggy, loaded(backend()), with_words, control_tokens=CONTROL)
    assert not certificate.exact


def test_what_was_compared_is_in_the_certificate() -> None:
    certificate = prove(backend(), loaded(backend()), [], control_tokens=CONTROL)
    during = Counter(checked_strings=3, checked_tokens=40, fast_texts=9, reference_texts=1)
    described = certificate.describe(during)
    assert described["engine"] == "fastokens"
    assert set(described["versions"]) == {"fastokens", "tokenizers"}
    assert described["at_start"]["strings"] == certificate.strings
    assert described["during_run"] == {
        "strings": 3,
        "tokens": 40,
        "mismatches": 0,
        "texts_by_fast_engine": 9,
        "texts_by_reference": 1,
    }


def test_the_gate_trusts_a_rare_character_only_after_trying_it() -> None:
    same = Gate(FastEngine(backend()), ReferenceEngine(loaded(backend())))
    assert same.admits("\U0001f9ff \U0001fae0 \u20bf")
    described = json.loads(swapped("\u00f0", "\u0141"))  # the first byte of all emoji
    differs = Gate(FastEngine(json.dumps(described)), ReferenceEngine(loaded(backend())))
    assert not differs.admits("a \U0001f9ff")
    assert differs.admits("plain, and é, which Unicode has known for long")
    assert not differs.admits("\U0001f9ff again")


def test_texts_behind_the_gate_are_encoded_by_the_reference() -> None:
    buggy = swapped("\u00f0", "\u0141")
    encoder = Encoder(buggy, loaded(backend()), fast=True, control_tokens=CONTROL)
    texts = ["plain", "a \U0001f9ff"]
    theirs = ReferenceEngine(loaded(backend())).encode(texts)
    assert [each.ids.tolist() for each in encoder.encode(texts)] == [
        each.ids.tolist() for each in theirs
    ]
    assert encoder.counts == {"fast_texts": 1, "reference_texts": 1}


def test_only_the_pieces_in_question_go_to_the_reference(shared_data: Path) -> None:
    source = shared_data / "tokenizers" / "qwen2.5-coder-instruct"
    spec = load_spec(str(source))
    encoder, reference = spec.load(fast=True).encoder, spec.load().encoder
    texts = [
        f"{START}user\ncafe\u0301 \u212b{END}\n{START}assistant\nd'accord \U0001f642{END}\n",
        f"e\u0301{START}{END}\u0301 x\u0338{END}",
        "no control token, cafe\u0301",
    ]
    for ours, theirs in zip(encoder.encode(texts), reference.encode(texts), strict=True):
        assert ours.ids.tolist() == theirs.ids.tolist()
        assert ours.firsts.tolist() == theirs.firsts.tolist()
        assert ours.begun.tolist() == theirs.begun.tolist()
    assert encoder.counts == {"fast_texts": 0, "reference_texts": 3}


def test_a_check_during_the_run_finds_a_wrong_token() -> None:
    reference = loaded(backend())
    encoder = Encoder(swapped("e", "a"), reference, fast=True, control_tokens=CONTROL)
    text = f"{START}user\nee{END}\n"
    (encoded,) = encoder.encode([text])
    with pytest.raises(MismatchError, match="--tokenizer-engine tokenizers"):
        encoder.check(text, encoded, seed=0)
    right = Encoder(backend(), reference, fast=True, control_tokens=CONTROL)
    (encoded,) = right.encode([text])
    for seed in range(10):
        right.check(text, encoded, seed=seed)
    assert right.counts["checked_strings"] == 10


def test_a_mistake_in_the_midst_of_a_run_makes_it_start_over_with_the_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine errs on one word, which only the last trajectories hold."""
    usual = [made(f"run-{number}", text="plain words") for number in range(70)]
    late = [made(f"late-{number}", text=" test" * 40) for number in range(30)]
    trajectories = write_trajectories(tmp_path / "trajectories", [*usual, *late])
    buggy = FastEngine(swapped("\u0120test", "\u0120return"))
    monkeypatch.setattr(engines, "FastEngine", lambda backend: buggy)
    engines.load_fast.cache_clear()
    options = ("--tokenizer", "example", "--workers", 1)
    run = srft_prep("tokenize", trajectories, *options, "-o", tmp_path / "tokens")
    engines.load_fast.cache_clear()
    assert run.status == 0, run
    assert "Starting over with tokenizers" in run.stderr
    certificate = manifest_of(tmp_path / "tokens")["certificate"]
    assert certificate["engine"] == "tokenizers"
    assert "differently" in certificate["reason"]
    monkeypatch.undo()
    expected = srft_prep(
        "tokenize", trajectories, *options, "--tokenizer-engine", "tokenizers", "-o", tmp_path / "e"
    )
    assert expected.status == 0
    ours, theirs = (pl.read_parquet(tmp_path / each / "part-*.parquet") for each in ("tokens", "e"))
    assert ours.equals(theirs)


def test_the_user_can_insist_on_an_engine(tmp_path: Path, shared_data: Path) -> None:
    trajectories = write_trajectories(tmp_path / "trajectories", [made("a"), made("b")])
    by_both = {}
    for engine in ("fastokens", "tokenizers"):
        given = ("--tokenizer", "example", "--tokenizer-engine", engine, "-o", tmp_path / engine)
        assert srft_prep("tokenize", trajectories, *given).status == 0
        assert manifest_of(tmp_path / engine)["certificate"]["engine"] == engine
        by_both[engine] = (tmp_path / engine / "part-00000.parquet").read_bytes()
    assert by_both["fastokens"] == by_both["tokenizers"]
    phi = shared_data / "tokenizers" / "phi-3-mini"
    template = shared_data / "tokenizers" / "qwen2.5-coder-instruct" / "tokenizer_config.json"
    chatml = tmp_path / "chatml.jinja"
    chatml.write_text(json.loads(template.read_text())["chat_template"].replace(END, "<|end|>"))
    given = ("--tokenizer", phi, "--chat-template", chatml, "-o", tmp_path / "phi")
    refused = srft_prep("tokenize", trajectories, *given, "--tokenizer-engine", "fastokens")
    assert refused.status == 2
    assert "no byte-level vocabulary" in refused.stderr
    assert srft_prep("tokenize", trajectories, *given).status == 0
    assert "no byte-level" in manifest_of(tmp_path / "phi")["certificate"]["reason"]


def manifest_of(path: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((path / "manifest.json").read_bytes())
    return manifest


def test_a_spec_loads_the_engine_that_its_certificate_allows() -> None:
    spec = load_spec("example")
    assert spec.load(fast=True).encoder.is_fast
    assert not spec.load().encoder.is_fast
