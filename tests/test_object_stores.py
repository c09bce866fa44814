"""The other stores: Google's, by an emulator, and the hub of Hugging Face, by a server of ours."""

import sys
from pathlib import Path

import pytest

from tests.faults.commands import finish
from tests.hub_server import hub
from tests.object_stores import Machine, free_port, program, write_raw

pytestmark = pytest.mark.slow
EMULATOR = """
import sys, threading
from gcp_storage_emulator.server import create_server
create_server("127.0.0.1", int(sys.argv[1]), in_memory=True, default_bucket="bucket").start()
threading.Event().wait()
"""


def test_stages_read_and_write_a_bucket_of_google_s(tmp_path: Path) -> None:
    write_raw(tmp_path / "runs", num_runs=20)
    port, base = free_port(), "gs://bucket"
    with program([sys.executable, "-c", EMULATOR, str(port)], port):
        environment = {"STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{port}"}
        machine = Machine(tmp_path / "machine", 0, **environment)
        machine.run("ingest", tmp_path / "runs", "-o", f"{base}/trajectories", status=1)
        other = machine.again("other")
        words = ("tokenize", f"{base}/trajectories", "--tokenizer", "example", "-o")
        other.run(*words, f"{base}/tokens")
        third = machine.again("third")
        words = ("pack", f"{base}/tokens", "--recipe", "naive", "--seq-len", 4096, "-o")
        third.run(*words, f"{base}/shards")
        third.run(*words, f"{base}/shards")
        assert "ok: pack, 1 files" in other.run("verify", f"{base}/shards")
        said = other.run("verify", "gs://no-such-bucket/x", status=2)
        assert "there is no bucket gs://no-such-bucket" in said
        found = next(other.cache.rglob("in/gs*/bucket/shards/shard-00000.parquet")).read_bytes()
    finish(("ingest", tmp_path / "runs", "-o", tmp_path / "one"), tmp_path / "log", status=1)
    words = ("tokenize", tmp_path / "one", "--tokenizer", "example", "-o", tmp_path / "two")
    finish(words, tmp_path / "log")
    words = ("pack", tmp_path / "two", "--recipe", "naive", "--seq-len", 4096, "-o")
    finish((*words, tmp_path / "three"), tmp_path / "log")
    assert found == (tmp_path / "three" / "shard-00000.parquet").read_bytes()


def test_runs_are_read_from_a_data_set_of_the_hub(tmp_path: Path) -> None:
    raw = write_raw(tmp_path / "data", num_runs=20)
    files = {
        f"data/{path.relative_to(raw)}": path.read_bytes()
        for path in raw.rglob("*")
        if path.is_file()
    }
    finish(("ingest", raw / "more", "-o", tmp_path / "expected"), tmp_path / "log")
    for path in (tmp_path / "expected").iterdir():
        files[f"stage/{path.name}"] = path.read_bytes()
    with hub({**files, "README.md": b"about"}) as server:
        environment = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "hf")}
        machine = Machine(tmp_path / "machine", 0, **environment)
        for number, source in enumerate(("n/data/more", "n@main/data/more/*.jsonl", "n/data/more")):
            output = tmp_path / f"out-{number}"
            machine.run_anew("ingest", f"hf://datasets/o/{source}", "-o", output)
            for path in (tmp_path / "expected").glob("part-*"):
                assert (output / path.name).read_bytes() == path.read_bytes()
        raw_files = [name for name in server.sent if name.startswith("data/")]
        assert raw_files == ["data/more/b.jsonl"] * 2, "a revision is a place of its own"
        assert "ok: ingest" in machine.run_anew("verify", "hf://datasets/o/n/stage")
        said = machine.run_anew("ingest", "hf://datasets/o/none", "-o", tmp_path / "x", status=2)
        assert "hf://datasets/o/none: no such file or folder" in said
