from pathlib import Path

import pytest

from srft_prep.critic.hardware import PEAK_FLOPS
from srft_prep.critic.models import LONG_TOKENS, MFU, load_rows, markdown, recommended_critic

REPOSITORY = Path(__file__).resolve().parents[2]
GB = 10**9
A3B = "Qwen/Qwen3-Coder-30B-A3B-Instruct-FP8"


def test_the_page_shows_what_the_code_computes(request):
    path = REPOSITORY / "docs" / "MODELS.md"
    text = path.read_text(encoding="utf-8")
    first, last = text.index("| GPU memory"), text.index("\n## How to read it")
    if request.config.getoption("--update-golden"):
        path.write_text(text[:first] + markdown() + text[last:], encoding="utf-8")
        text = path.read_text(encoding="utf-8")
    assert markdown() in text, "run pytest --update-golden"


def weight_bytes(model):
    return next(row.weight_bytes for row in load_rows() if row.model == model)


def test_gpt_oss_takes_what_its_model_card_says():
    # arXiv 2508.10925, table 1: 60.8 GiB and 12.8 GiB.
    assert weight_bytes("openai/gpt-oss-120b") / 2**30 == pytest.approx(60.8, abs=0.05)
    assert weight_bytes("openai/gpt-oss-20b") / 2**30 == pytest.approx(12.8, abs=0.05)


def test_quantised_weights_take_what_their_tensors_do():
    # AWQ: 8 weights an int32; for every 128 of a column an fp16 scale and a 4-bit zero.
    def awq(rows, columns):
        groups = rows // 128
        return rows * (columns // 8) * 4 + groups * columns * 2 + groups * (columns // 8) * 4

    layer = 2 * awq(3584, 3584) + 2 * awq(3584, 512) + 3 * awq(3584, 18944)
    in_two_bytes = 2 * 152064 * 3584 + 28 * (2 * 3584 + 3584 + 1024) + 3584
    assert weight_bytes("Qwen/Qwen2.5-Coder-7B-Instruct-AWQ") == 28 * layer + 2 * in_two_bytes

    # FP8: a byte a weight, and a 4-byte scale for every block of 128 x 128.
    def fp8(rows, columns):
        return rows * columns + 4 * (rows // 128) * (columns // 128)

    layer = 2 * fp8(2048, 4096) + 2 * fp8(2048, 512) + fp8(2048, 128) + 128 * 3 * fp8(2048, 768)
    in_two_bytes = 2 * 151936 * 2048 + 48 * (2 * 2048 + 2 * 128) + 2048
    assert weight_bytes(A3B) == 48 * layer + 2 * in_two_bytes


def test_every_row_holds_a_long_request_and_one_as_long_as_its_engine_takes():
    for row in load_rows():
        longest = row.shape.kv_bytes(int(row.engine_args["max_model_len"]))
        left = row.gpus * (0.92 * row.memory_gb * GB - 2e9) - row.weight_bytes
        assert longest <= left, (row.machine, row.model)
        assert row.long_requests == int(left // row.shape.kv_bytes(LONG_TOKENS)) >= 1


def test_copies_over_several_gpus_say_so_to_the_engine():
    for row in load_rows():
        assert row.engine_args.get("tensor_parallel_size", "1") == str(row.gpus)
        assert row.gpu in PEAK_FLOPS


def test_the_computed_speed_holds_public_measurements():
    # reference/CRITIC.md: gpt-oss-120b on an H100, 16k to 17k tokens/s.
    (row,) = (row for row in load_rows() if "120b" in row.model and row.memory_gb == 80)
    slow, fast = (row.tokens_per_second(mfu) for mfu in MFU)
    assert slow < 16_000 < 17_000 < fast


def test_gpu_hours_follow_from_the_speed_whatever_the_number_of_gpus():
    for row in load_rows():
        flops = row.shape.flops(prompt_tokens=LONG_TOKENS)
        seconds = LONG_TOKENS / row.tokens_per_second(0.3)
        assert row.gpu_hours(flops, 0.3) == pytest.approx(row.gpus * seconds / 3600)


@pytest.mark.parametrize(
    ("memory_mib", "count", "model"),
    [
        (8192, 1, None),
        (8192, 8, None),
        (143771, 0, None),
        (16376, 1, "Qwen/Qwen2.5-Coder-7B-Instruct-AWQ"),
        (23034, 1, "Qwen/Qwen2.5-Coder-14B-Instruct-AWQ"),
        (23034, 2, A3B),
        (40960, 1, A3B),
        (46068, 4, A3B),
        (81559, 1, A3B),
        (143771, 8, A3B),
    ],
)
def test_the_critic_for_a_machine_is_the_best_that_fits(memory_mib, count, model):
    found = recommended_critic(memory_mib << 20, count)
    assert (found and found[0]) == model


def test_a_larger_gpu_may_read_longer_prompts():
    lengths = [
        int(found[1]["max_model_len"])
        for gigabytes in (40, 48, 80)
        if (found := recommended_critic(gigabytes * GB, 1))
    ]
    assert lengths == [32768, 65536, 131072]


def test_what_is_returned_can_be_changed_without_changing_the_table():
    _, arguments = recommended_critic(80 * GB, 1) or ("", {})
    arguments.clear()
    assert recommended_critic(80 * GB, 1) != (A3B, {})
