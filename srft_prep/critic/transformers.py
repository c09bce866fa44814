"""The transformers critic: the slow reference, for any CPU or GPU that PyTorch runs on.

One request at a time, token by token, held to the schema by xgrammar as vLLM's engine is. It shares
nothing with the vLLM critic but the questions, the grammar and the parser, so that the one can be
checked against the other: same labels, same probabilities. Use it where vLLM does not run.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final

import orjson

from srft_prep.critic import CriticReply, CriticRequest, Question, failure_of
from srft_prep.critic.answers import THOUGHTS_END, AnswerError, Token, reply_of
from srft_prep.critic.engine.checkpoint import open_checkpoint, planner_of
from srft_prep.critic.engine.label_tokens import label_token_ids, pieces_of
from srft_prep.critic.pricing import Rates
from srft_prep.critic.question import QuestionSettings
from srft_prep.errors import BackendError, ConfigError, in_one_line
from srft_prep.types import Trajectory

if TYPE_CHECKING:
    import torch

INSTALL: Final = "pip install 'srft-prep[transformers]'"
SEPARATORS: Final = (",", ":")
"""Of the answer's JSON: those that vLLM's engine uses where it allows no other whitespace."""
_MARK_TOKENS: Final = 12
"""More tokens than a mark at the end of thoughts takes."""


class TransformersCritic:
    """A model in transformers on this machine."""

    def __init__(
        self,
        *,
        model: str,
        settings: QuestionSettings,
        device: str | None = None,
        usd_per_hour: float = 0.0,
    ) -> None:
        """Check the settings; the model is loaded with the first request.

        Args:
            model: a folder or a hub id.
            settings: how to ask.
            device: PyTorch's name of a device; by default the first GPU, else the CPU.
            usd_per_hour: what the machine costs.

        Raises:
            ConfigError: torch or xgrammar is not installed, there is no such model, or the prompt
                does not fit.
        """
        missing = [name for name in ("torch", "xgrammar") if find_spec(name) is None]
        if missing:
            raise ConfigError(
                f"--critic transformers: expected the packages torch and xgrammar, got no "
                f"{' and no '.join(missing)} ({INSTALL})"
            )
        self._checkpoint = open_checkpoint(model)
        context_tokens = self._checkpoint.context_tokens
        self._planner = planner_of(model, settings, context_tokens=context_tokens)
        self.critic_id = self._checkpoint.critic_id
        self.prompt_hash = self._planner.prompt_hash
        self.max_input_tokens: int | None = self._planner.max_input_tokens
        self.rates = Rates(usd_per_hour=usd_per_hour)
        self._settings = settings
        self._context_tokens = context_tokens
        self._device = device
        self._writer: _Writer | None = None

    def plan(self, trajectory: Trajectory, *, scale: float = 1.0) -> Sequence[CriticRequest]:
        """Return the requests that together ask for every step of a trajectory."""
        return self._planner.plan(trajectory, scale=scale)

    def label(self, requests: Iterable[CriticRequest]) -> Iterator[CriticReply]:
        """Yield one reply for each request, in order.

        Raises:
            BackendError: the model cannot be loaded.
        """
        for request in requests:
            if self._writer is None:
                self._writer = self._load()
            yield self._reply(request, self._writer)

    def close(self) -> None:
        """Let the model go."""
        self._writer = None

    def _load(self) -> "_Writer":
        try:
            return _Writer(
                self._checkpoint.model,
                revision=self._checkpoint.commit,
                device=self._device,
                temperature=self._settings.temperature,
                thinks=self._settings.reasoning != "none",
            )
        except Exception as error:
            reason = in_one_line(error, limit=500)
            raise BackendError(
                f"--model {self._checkpoint.model}: transformers cannot load it: "
                f"{type(error).__name__}: {reason} (try --device cpu, or a smaller model)"
            ) from error

    def _reply(self, request: CriticRequest, writer: "_Writer") -> CriticReply:
        question = request.question
        assert question is not None
        assert question.prompt_ids is not None, "a local model's questions have ids"
        prompt_tokens = len(question.prompt_ids)
        if prompt_tokens + question.max_output_tokens > self._context_tokens:
            failure = failure_of(
                "over-long",
                f"{prompt_tokens} tokens and {question.max_output_tokens} for the answer, of "
                f"{self._context_tokens}",
            )
            return CriticReply(request=request.light(), failure=failure)
        started = time.perf_counter()
        text, pieces, completion_tokens = writer.write(question)
        seconds = time.perf_counter() - started
        usage: dict[str, Any] = {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "seconds": seconds,
            "usd": seconds / 3600 * self.rates.usd_per_hour,
        }
        tokens = None if pieces is None else [Token(part, tuple(others)) for part, others in pieces]
        try:
            return reply_of(request.light(), text, tokens, **usage)
        except AnswerError as error:
            failure = failure_of("unparseable", str(error))
            return CriticReply(request=request.light(), failure=failure, **usage)


class _Writer:
    """A loaded model that writes what a schema allows."""

    def __init__(
        self,
        model: str,
        *,
        revision: str | None,
        device: str | None,
        temperature: float,
        thinks: bool,
    ) -> None:
        import torch
        import xgrammar
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self._device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._tokenizer = AutoTokenizer.from_pretrained(model, revision=revision)
        # As Any: the package's types do not say what its factories return.
        loaded: Any = AutoModelForCausalLM.from_pretrained(model, revision=revision, dtype="auto")
        self._model = loaded.to(self._device).eval()
        self._vocab_size: int = self._model.get_output_embeddings().weight.shape[0]
        info = xgrammar.TokenizerInfo.from_huggingface(self._tokenizer, vocab_size=self._vocab_size)
        self._compiler = xgrammar.GrammarCompiler(info)
        self._bitmask = xgrammar.allocate_token_bitmask(1, self._vocab_size)
        self._label_ids = label_token_ids(self._tokenizer)
        self._temperature = temperature
        self._thinks = thinks

    def write(self, question: Question) -> tuple[str, Any, int]:
        """Return the text written, its pieces with scores, and the number of tokens."""
        import torch
        import xgrammar

        matcher = xgrammar.GrammarMatcher(
            self._compiler.compile_json_schema(
                orjson.dumps(question.schema).decode(), any_whitespace=False, separators=SEPARATORS
            )
        )
        ids: list[int] = []
        scores: list[list[tuple[int, float]]] = []
        given = torch.tensor([question.prompt_ids], device=self._device)
        cache = None
        thinking = self._thinks
        with torch.inference_mode():
            while len(ids) < question.max_output_tokens and not matcher.is_terminated():
                output = self._model(
                    input_ids=given, past_key_values=cache, use_cache=True, logits_to_keep=1
                )
                cache = output.past_key_values
                logits = output.logits[:, -1].float()
                if not thinking:
                    matcher.fill_next_token_bitmask(self._bitmask)
                    xgrammar.apply_token_bitmask_inplace(logits, self._bitmask.to(logits.device))
                token_id = self._choose(logits)
                ids.append(token_id)
                scores.append([] if thinking else self._scores(logits, token_id))
                if thinking:
                    tail = self._tokenizer.decode(ids[-_MARK_TOKENS:])
                    thinking = not any(mark in tail for mark in THOUGHTS_END)
                else:
                    matcher.accept_token(token_id)
                given = torch.tensor([[token_id]], device=self._device)
        text, pieces = pieces_of(self._tokenizer, ids, scores)
        return text, pieces, len(ids)

    def _choose(self, logits: "torch.Tensor") -> int:
        if not self._temperature:
            return int(logits.argmax())
        shares = (logits / self._temperature).softmax(-1)
        return int(shares.multinomial(1))

    def _scores(self, logits: "torch.Tensor", token_id: int) -> list[tuple[int, float]]:
        """Return the log-probabilities of the label tokens where one of them was written."""
        if token_id not in self._label_ids:
            return []
        found = logits[0].log_softmax(-1)[self._label_ids].tolist()
        return list(zip(self._label_ids, found, strict=True))
