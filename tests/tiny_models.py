"""Tiny models with random weights and a real tokenizer, for tests and benchmarks."""

import os
import shutil
from pathlib import Path

from srft_prep.examples.record import RUNS_DIR

REPOSITORY = Path(__file__).resolve().parents[1]
QWEN_TOKENIZER = REPOSITORY.parent / "shared" / "data" / "tokenizers" / "qwen2.5-coder-instruct"
EXAMPLE_TOKENIZER = RUNS_DIR.parent / "tokenizer"


def make_tiny_model(
    path: Path,
    *,
    tokenizer: Path | None = None,
    hidden: int = 128,
    layers: int = 2,
    context_tokens: int = 8192,
    seed: int = 0,
) -> Path:
    """Write a randomly initialised Qwen2 with its tokenizer; return its folder.

    The weights are ten times as large as a fresh model's, so that its choices are distinct: with
    near ties two correct implementations would choose differently.

    Args:
        path: the folder to make.
        tokenizer: the folder of a tokenizer; by default that of Qwen2.5-Coder in the shared data.
        hidden: size of the hidden state; a multiple of 128, four heads of at least 32.
        layers: number of layers.
        context_tokens: the longest prompt and answer together.
        seed: of the weights.
    """
    os.environ.setdefault("USE_TORCH", "1")
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    source = tokenizer or QWEN_TOKENIZER
    path.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.name.startswith(("tokenizer", "chat_template")):
            shutil.copy(file, path)
    loaded = AutoTokenizer.from_pretrained(path)
    config = Qwen2Config(
        vocab_size=-(-len(loaded) // 64) * 64,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context_tokens,
        tie_word_embeddings=True,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=loaded.eos_token_id,
        dtype="float32",
    )
    torch.manual_seed(seed)
    Qwen2ForCausalLM(config).save_pretrained(path)
    return path
