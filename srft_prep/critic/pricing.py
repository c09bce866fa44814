"""What requests cost: a table of prices a model, in US dollars a million tokens.

The table is TOML (`prices.toml` beside this file, or the user's own with `--prices`):

    ["claude-sonnet-4"]
    input = 3.00            # a million input tokens that no cache held
    cached_input = 0.30     # ... that the provider's cache held; as `input` where it is left out
    cache_write = 3.75      # ... that were written into the cache; as `input` where it is left out
    output = 15.00
    batch_factor = 0.5      # what a batch job costs, as a part of that; 1 where it is left out

    long_prompt_tokens = 200000     # where a prompt of more tokens, cached ones included, ...
    long_input_factor = 2.0         # ... makes all input of its request dearer by this factor
    long_output_factor = 1.5        # ... and all output by this one

An entry stands for the model of exactly that name and for its dated versions, never for another
model that is called something alike: a wrong price is worse than none.
"""

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from srft_prep.errors import ConfigError

PRICES_FILE: Final = Path(__file__).parent / "prices.toml"
MILLION: Final = 1_000_000

_VERSION: Final = re.compile(r"(?:-latest|-\d{8}|-\d{4}-\d{2}-\d{2})?(?:@.*)?")
"""What may follow a model's name: `-20250514`, `-2025-08-07`, `-latest`, `@20250514`, `@revision`.
Fewer digits are no date: `-5` of claude-sonnet-4-5 makes it another model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """One model's prices, in US dollars a million tokens."""

    input: float
    output: float
    cached_input: float
    cache_write: float
    batch_factor: float = 1.0
    long_prompt_tokens: int | None = None
    """A prompt of more tokens than this is long; None where the length does not matter."""
    long_input_factor: float = 1.0
    """By how much all input of a request with a long prompt costs more."""
    long_output_factor: float = 1.0
    """By how much its output does."""

    def usd(
        self,
        *,
        prompt_tokens: int,
        cached_tokens: int = 0,
        cache_write_tokens: int = 0,
        completion_tokens: int = 0,
        batch: bool = False,
    ) -> float:
        """Return what one request costs (of several, add up: the price knows long prompts).

        Args:
            prompt_tokens: all tokens sent, the cached and the written ones included.
            cached_tokens: those read from the provider's cache.
            cache_write_tokens: those written into it at a price of their own.
            completion_tokens: tokens received, thoughts included.
            batch: whether it was part of a batch job.
        """
        fresh = max(prompt_tokens - cached_tokens - cache_write_tokens, 0)
        sent = (
            fresh * self.input
            + cached_tokens * self.cached_input
            + cache_write_tokens * self.cache_write
        )
        received = completion_tokens * self.output
        if self.long_prompt_tokens is not None and prompt_tokens > self.long_prompt_tokens:
            sent *= self.long_input_factor
            received *= self.long_output_factor
        usd = (sent + received) / MILLION
        return usd * self.batch_factor if batch else usd


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """How a critic is paid: by tokens, by the hour, or not at all."""

    price: Price | None = None
    """None where the critic is not paid by tokens, or nobody knows its price."""
    batch: bool = False
    usd_per_hour: float = 0.0
    """Of all devices together."""


def load_prices(path: Path | None = None) -> dict[str, Price]:
    """Return the prices of a TOML table by the model's name; by default the package's.

    Raises:
        ConfigError: the file cannot be read, or an entry is no price.
    """
    file = path or PRICES_FILE
    try:
        data = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file}: expected a table of prices: {error.strerror}") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{file}: expected a table of prices in TOML: {error}") from None
    return {name: _price(entry, where=f"{file}: {name}") for name, entry in data.items()}


def price_of(model: str, prices: Mapping[str, Price]) -> Price | None:
    """Return the price of a model, or of the one that it is a dated version of; None for others.

    `gpt-5-2025-08-07` has the price of `gpt-5`; `gpt-5-pro`, `gpt-5.2` and `openai/gpt-5`, which
    another company may host, do not.
    """
    names = [
        name
        for name in prices
        if model.startswith(name) and _VERSION.fullmatch(model, pos=len(name))
    ]
    return prices[max(names, key=len)] if names else None


def _price(entry: Any, *, where: str) -> Price:
    fields = list(Price.__dataclass_fields__)
    if not isinstance(entry, dict) or not {"input", "output"} <= entry.keys() <= set(fields):
        got = ", ".join(entry) if isinstance(entry, dict) else repr(entry)
        raise ConfigError(
            f"{where}: expected input and output, and maybe {', '.join(fields[2:])}, got {got} "
            "(a model's name with a dot in it stands in quotes)"
        )
    for name, value in entry.items():
        types = (int,) if name == "long_prompt_tokens" else (int, float)
        if type(value) not in types or not 0 <= value < 10 * MILLION:
            kind = "a whole number" if types == (int,) else "a number"
            raise ConfigError(f"{where}: {name}: expected {kind} from 0, got {value!r}")
    return Price(**{"cached_input": entry["input"], "cache_write": entry["input"], **entry})
