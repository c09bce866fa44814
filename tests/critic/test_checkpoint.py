"""What a model's folder or hub id leads to."""

from pathlib import Path

import pytest

from srft_prep.critic.engine.checkpoint import open_checkpoint
from srft_prep.errors import ConfigError

SIZE = 1 << 20


def folder_of(path: Path, *, config: str = '{"max_position_embeddings": 300000}') -> Path:
    path.mkdir()
    (path / "config.json").write_text(config)
    (path / "model-1.safetensors").write_bytes(bytes(range(256)) * (SIZE // 256))
    return path


def test_the_same_files_have_the_same_revision_wherever_they_lie(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    first = open_checkpoint(str(folder_of(tmp_path / "tiny")))
    second = open_checkpoint(str(folder_of(tmp_path / "elsewhere" / "tiny")))
    assert first.critic_id == second.critic_id
    assert first.name == "tiny"
    assert first.context_tokens == 131_072


@pytest.mark.parametrize("change", ["config", "size", "head", "end", "name"])
def test_changed_files_have_another_revision(change: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "tiny")
    before = open_checkpoint(str(folder)).revision
    weights = folder / "model-1.safetensors"
    data = bytearray(weights.read_bytes())
    if change == "config":
        (folder / "config.json").write_text('{"max_position_embeddings": 8192}')
    elif change == "size":
        weights.write_bytes(data + b"0")
    elif change == "name":
        weights.rename(folder / "model-2.safetensors")
    else:
        data[0 if change == "head" else -1] ^= 1
        weights.write_bytes(data)
    assert open_checkpoint(str(folder)).revision != before


@pytest.mark.parametrize(
    ("config", "words"), [("{", "in JSON"), ("[]", "JSON object"), (None, "without config")]
)
def test_a_folder_that_is_no_model_is_refused(
    config: str | None, words: str, tmp_path: Path
) -> None:
    folder = folder_of(tmp_path / "tiny", config=config or "")
    if config is None:
        (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match=words):
        open_checkpoint(str(folder))


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "tiny")
    (folder / "model-1.safetensors").unlink()
    with pytest.raises(ConfigError, match="expected weights"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize("model", ["./none", "/none", "a/b/c", "not a model", "no-such/model"])
def test_a_model_that_is_nowhere_is_refused_in_a_sentence(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="expected a model's folder") as raised:
        open_checkpoint(model)
    assert "\n" not in str(raised.value)
