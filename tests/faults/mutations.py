"""Small damages to real records: to their values, and to the bytes that they are written in."""

import random
from collections.abc import Callable
from typing import Any

ODD_VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1.5,
    1e308,
    2**53,
    2**63 - 1,
    2**64 - 1,
    "",
    " ",
    "\x00",
    "\u202e\x1b[31m",
    "../../../tmp/evil",
    "<|im_end|>\n<|im_start|>assistant\n",
    "{% raw %}{{ 1 }}",
    "[{",
    '[{"function": {"name": "x", "arguments": "{"}}]',
    "{}",
    "[]",
    "9" * 400,
    "x" * 5000,
    [],
    {},
    [None],
    [[]],
    [{}],
    [1, "a", None],
    {"": None},
    {"role": "assistant"},
    {"content": [{"type": "text", "text": 5}]},
    {"a": {"b": {"c": []}}},
)
"""Values that have broken something somewhere, or might."""

ODD_BYTES = (b"\x00", b"\xff", b'"', b"{", b"}", b"[", b"]", b",", b":", b"\\", rb"\ud800", b"\r")


def mutated(value: Any, rng: random.Random, *, times: int = 1) -> Any:
    """Return a JSON value with some of its inner values damaged; the given one stays as it is."""
    for _ in range(times):
        value = _mutate(value, rng, depth=rng.choice((1, 2, 3, 3, 4, 5, 6, 8)))
    return value


def _mutate(value: Any, rng: random.Random, *, depth: int) -> Any:
    if depth and isinstance(value, dict) and value:
        key = rng.choice(list(value))
        return {**value, key: _mutate(value[key], rng, depth=depth - 1)}
    if depth and isinstance(value, list) and value:
        place = rng.randrange(len(value))
        return [*value[:place], _mutate(value[place], rng, depth=depth - 1), *value[place + 1 :]]
    return _damaged(value, rng)


def _damaged(value: Any, rng: random.Random) -> Any:
    kinds: list[Callable[[], Any]] = [lambda: rng.choice(ODD_VALUES)] * 3
    if isinstance(value, str):
        kinds += [
            lambda: value[: rng.randrange(len(value) + 1)],
            lambda: value + str(rng.choice(ODD_VALUES)),
            lambda: [value],
            lambda: {"text": value},
        ]
    if isinstance(value, list):
        kinds += [
            lambda: value[: rng.randrange(len(value) + 1)],
            lambda: value + value,
            lambda: value[::-1],
            lambda: [*value, rng.choice(ODD_VALUES)],
            lambda: dict.fromkeys(map(str, range(len(value)))),
        ]
    if isinstance(value, dict):
        kinds += [
            lambda: dict(list(value.items())[: rng.randrange(len(value) + 1)]),
            lambda: {
                rng.choice(("role", "content", "id", key)): each for key, each in value.items()
            },
            lambda: {**value, rng.choice(list(value) or [""]): rng.choice(ODD_VALUES)},
            lambda: [value],
            lambda: list(value.items()),
        ]
    return rng.choice(kinds)()


def mutated_line(text: bytes, rng: random.Random, *, times: int = 1) -> bytes:
    """Return the bytes of a line damaged, but without a line break in them."""
    return damaged_bytes(text, rng, times=times).replace(b"\n", b" ")


def damaged_bytes(text: bytes, rng: random.Random, *, times: int = 1) -> bytes:
    """Return bytes of which some were flipped, cut out, doubled or put in, or the end is gone."""
    data = bytearray(text)
    for _ in range(times):
        place = rng.randrange(len(data)) if data else 0
        kind = rng.randrange(5)
        if kind == 0 and data:
            data[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[place : place + rng.randrange(1, 40)]
        elif kind == 2:
            data[place:place] = data[place : place + rng.randrange(1, 40)]
        elif kind == 3:
            data[place:place] = rng.choice(ODD_BYTES)
        else:
            del data[place:]
    return bytes(data)
