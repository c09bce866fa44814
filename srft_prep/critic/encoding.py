"""Counts a prompt's tokens, and renders it for models that run here.

A local model gets ids: its own chat template around the question, in which nothing that a
trajectory holds can become a control token (`chat`). A model behind an API gets text, so its tokens
are counted with a tokenizer that the user names, or estimated from the bytes.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, Protocol

from srft_prep.chat import LoadedTokenizer, load_backend, load_spec
from srft_prep.conversations import Conversation
from srft_prep.errors import ConfigError, FormatError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BYTES_PER_TOKEN: Final = 3.4
"""On the long side, so that few questions turn out longer than they were taken for: the questions
about the runs in ../shared/data have 3.9 with Qwen2.5's tokenizer, 4.0 with gpt-oss' and 3.1 with
Phi-3's (docs/LOG.md)."""
HEADER_TOKENS: Final = 16
"""What a chat template adds to a system and a user text, about."""

_FINAL_CHANNEL: Final = "<|channel|>final<|message|>"
"""Where gpt-oss begins its answer once it has thought; the header alone leaves it to think."""


class Encoder(Protocol):
    """Counts and renders."""

    def count(self, texts: Sequence[str]) -> list[int]:
        """Return how many tokens each text takes, or about."""
        ...

    def prompt(self, system: str, user: str) -> tuple[int, tuple[int, ...] | None]:
        """Return how many tokens a prompt takes, and its ids where the model runs here."""
        ...


class TextEncoder:
    """For models that are sent text."""

    def __init__(self, tokenizer: str | None = None) -> None:
        """Count with a tokenizer's folder or hub id, or without one by the bytes.

        Raises:
            ConfigError: there is no such tokenizer.
        """
        self._backend: Tokenizer | None = None
        if tokenizer is not None:
            self._backend, _ = load_backend(tokenizer)
            self._backend.no_truncation()
            self._backend.no_padding()

    def count(self, texts: Sequence[str]) -> list[int]:
        """Return how many tokens each text takes, or about."""
        if self._backend is None:
            return [round(len(text.encode()) / BYTES_PER_TOKEN) for text in texts]
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [len(encoding.ids) for encoding in encodings]

    def prompt(self, system: str, user: str) -> tuple[int, None]:
        """Return how many tokens a prompt takes, or about."""
        return sum(self.count([system, user])) + HEADER_TOKENS, None


class ChatEncoder:
    """For a model that runs here: its tokenizer and its chat template."""

    def __init__(self, model: str, *, reasoning: str = "none") -> None:
        """Load the tokenizer of a model's folder or hub id.

        Args:
            model: the folder or hub id.
            reasoning: how much the model may think; told to its template, which may not know it.

        Raises:
            ConfigError: there is no tokenizer, it has no chat template, or the template cannot
                hold a question.
        """
        from tokenizers import Tokenizer as Backend

        spec = load_spec(model, option="--model")
        thinking: dict[str, Any] = {
            "enable_thinking": reasoning != "none",
            "reasoning_effort": "low" if reasoning == "none" else reasoning,
        }
        try:
            self._tokenizer = LoadedTokenizer(
                replace(spec, variables={**spec.variables, **thinking})
            )
        except ConfigError as error:
            raise _takes_no_question(model, error) from None
        self._counter = Backend.from_str(spec.backend)
        self._counter.no_truncation()
        self._counter.no_padding()
        self._counter.encode_special_tokens = True  # as text: that is how a prompt holds them
        has_channels = "<|channel|>" in spec.control_tokens
        self._opening: list[int] = []
        if has_channels and reasoning == "none":
            self._opening = self._ids(_FINAL_CHANNEL)
        self._system = True
        try:
            self._render("-", "-")
        except FormatError:
            self._system = False
        try:
            self._render("-", "-")
        except FormatError as error:
            raise _takes_no_question(model, error) from None

    def count(self, texts: Sequence[str]) -> list[int]:
        """Return how many tokens each text takes by itself."""
        encodings = self._counter.encode_batch_fast(list(texts), add_special_tokens=False)
        return [len(encoding.ids) for encoding in encodings]

    def prompt(self, system: str, user: str) -> tuple[int, tuple[int, ...]]:
        """Return a prompt's ids and their number."""
        conversation = self._render(system, user)
        if conversation.rendering.forged:
            (forged,) = self._tokenizer.encode([conversation])
            ids = forged.ids.tolist()
        else:  # without offsets: half as fast again
            text = conversation.rendering.text
            backend = self._tokenizer.backend
            ids = backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
        prompt_ids = (*ids, *self._opening)
        return len(prompt_ids), prompt_ids

    def _render(self, system: str, user: str) -> Conversation:
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        if not self._system:
            messages = [{"role": "user", "content": f"{system}\n\n{user}"}]
        rendering = self._tokenizer.template.render(messages, None, add_generation_prompt=True)
        return Conversation(rendering=rendering, spans=())

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer.backend.encode(text, add_special_tokens=False).ids


def _takes_no_question(model: str, error: ConfigError | FormatError) -> ConfigError:
    return ConfigError(f"--model {model}: its chat template takes no question: {error}")
