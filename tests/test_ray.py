"""The Ray engine: the same files as the local one, also where workers are killed."""

import errno
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from srft_prep.config import IngestConfig
from srft_prep.critic import CriticRequest, open_critic
from srft_prep.critic.on_ray import RayCritic
from srft_prep.errors import BackendError, ConfigError
from srft_prep.examples.record import RUNS_DIR
from srft_prep.ingest import ingest
from srft_prep.progress import Silent
from srft_prep.ray_cluster import RayCluster
from srft_prep.ray_jobs import run_jobs
from srft_prep.storage import StageWriter, write_table
from srft_prep.tokens import tokenize
from srft_prep.trajectories import read_trajectories, trajectories_table
from srft_prep.types import Trajectory
from tests.gates import gated
from tests.processes import processes_with
from tests.ray_clusters import kill_actors, local_cluster
from tests.stages import srft_prep

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="finds Ray's processes in /proc"),
]

PARTS = 4


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    with local_cluster() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def trajectories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example runs in several parts."""
    folder = tmp_path_factory.mktemp("ray")
    runs = ingest([str(RUNS_DIR)], folder / "runs", IngestConfig(), outcomes=[str(RUNS_DIR)])
    rows = list(read_trajectories(runs.parts))
    with StageWriter.open(folder / "parts", stage="ingest", config={}, inputs=[]) as writer:
        names = [f"part-{number:05d}.parquet" for number in range(PARTS)]
        for number, name in enumerate(names):
            table = trajectories_table(rows[number::PARTS])
            write_table(table, folder / "parts" / name, row_group_rows=16)
        counts = {"trajectories": len(rows), "rejected": 0}
        writer.finish(counts=counts, names=names, command=[])
    return folder / "parts"


@pytest.fixture(scope="module")
def alone(trajectories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokens that the local engine makes of them."""
    output = tmp_path_factory.mktemp("local") / "tokens"
    tokenize(trajectories, output, tokenizer="example")
    return output


class KillsOnce(Silent):
    """Kills the processes of a kind of actor when the first part is done."""

    def __init__(self, kind: str) -> None:
        self.kind, self.killed = kind, 0

    def advance(self, count: int = 1, note: str = "") -> None:
        self.killed = self.killed or kill_actors(self.kind)


def assert_same_tokens(found: Path, expected: Path) -> None:
    names = {path.name for path in expected.iterdir()}
    assert {path.name for path in found.iterdir()} == names
    for name in names - {"manifest.json"}:
        assert (found / name).read_bytes() == (expected / name).read_bytes(), name


def test_tokenize_on_two_workers_writes_the_local_bytes_although_its_workers_are_killed(
    cluster: RayCluster, trajectories: Path, alone: Path, tmp_path: Path
) -> None:
    killing = KillsOnce("_Worker")
    tokenize(
        trajectories,
        tmp_path / "out",
        tokenizer="example",
        workers=2,
        cluster=cluster,
        progress=killing,
    )
    assert killing.killed
    assert_same_tokens(tmp_path / "out", alone)


def test_a_cluster_at_an_address_is_used_and_left_running(
    cluster: RayCluster, trajectories: Path, alone: Path, tmp_path: Path
) -> None:
    address = cluster.ray.get_runtime_context().gcs_address
    words = ["tokenize", str(trajectories), "-o", str(tmp_path / "out"), "--tokenizer", "example"]
    command = [sys.executable, "-m", "srft_prep", *words, "--engine", "ray", "--workers", "1"]
    run = subprocess.run(
        [*command, "--ray-address", address], capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    assert_same_tokens(tmp_path / "out", alone)
    assert cluster.number_of("CPU") == 2


STARTS_LATE = """
import ray
from srft_prep.ray_cluster import RayCluster

init, tries = ray.init, []

def fails_twice(**options):
    tries.append(options)
    if len(tries) < 3:
        raise RuntimeError("Failed to start GCS.")
    return init(**options)

ray.init = fails_twice
with RayCluster(num_cpus=1) as cluster:
    print(len(tries), cluster.number_of("CPU"))
"""


def test_a_local_cluster_that_did_not_start_in_time_is_started_again() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    run = subprocess.run(
        [sys.executable, "-c", STARTS_LATE],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment | {"RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_AUTH_MODE": "token"},
    )
    assert run.stdout == "3 1\n", run.stderr


def test_a_wrong_token_opens_no_cluster(cluster: RayCluster, tmp_path: Path) -> None:
    address = cluster.ray.get_runtime_context().gcs_address
    code = (
        "import sys; from srft_prep.ray_cluster import RayCluster\n"
        "with RayCluster(sys.argv[1]) as cluster: print(cluster.number_of('CPU'))"
    )
    environment = {**os.environ, "RAY_AUTH_TOKEN": "cd" * 32, "RAY_AUTH_MODE": "token"}
    run = subprocess.run(
        [sys.executable, "-c", code, address],
        capture_output=True,
        text=True,
        timeout=300,
        env={**environment, "RAY_gcs_rpc_server_connect_timeout_s": "1"},
    )
    assert run.returncode == 1
    assert run.stdout == ""
    assert "InvalidAuthToken" in run.stderr
    assert "the cluster cannot be used" in run.stderr


def test_label_in_a_cluster_writes_the_local_labels(
    cluster: RayCluster, trajectories: Path, tmp_path: Path
) -> None:
    words = ("label", trajectories, "--critic", "rules", "--only", "all", "-o")
    assert srft_prep(*words, tmp_path / "local").status == 0
    address = cluster.ray.get_runtime_context().gcs_address
    engine = ("--engine", "ray", "--ray-address", address, "--workers", "2")
    run = subprocess.run(
        [sys.executable, "-m", "srft_prep", *map(str, (*words, tmp_path / "out", *engine))],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    labels = [(tmp_path / each / "labels.parquet").read_bytes() for each in ("local", "out")]
    assert labels[0] == labels[1]
    assert srft_prep("verify", tmp_path / "out").status == 0


def working_processes(mark: str) -> list[bytes]:
    """Return what runs of a cluster, but for two agents of Ray's, which notice a minute later."""
    found = []
    for number in processes_with(mark):
        with suppress(OSError):
            words = Path(f"/proc/{number}/cmdline").read_bytes()
            if b"ray::DashboardAgent" not in words and b"ray::RuntimeEnvAgent" not in words:
                found.append(words)
    return found


def test_a_local_cluster_dies_with_the_command_that_started_it(
    trajectories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, mark = tmp_path / "out", secrets.token_hex(32)
    words = ["label", str(trajectories), "-o", str(output), "--only", "all"]
    ray = ("--engine", "ray", "--workers", 1)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with gated(tmp_path / "gate", *words, *ray, RAY_AUTH_TOKEN=mark) as command:
        command.wait_until(
            lambda: any(file.stat().st_size for file in output.glob("ledger-*.jsonl"))
        )
        assert len(processes_with(mark)) > 3
        command.kill()
    until = time.monotonic() + 60
    while left := working_processes(mark):
        assert time.monotonic() < until, left
        time.sleep(0.05)
    assert srft_prep(*words).status == 0, "and the local engine goes on where it was"


def requests_about(trajectories: Path, copies: int) -> list[CriticRequest]:
    found = []
    for number in range(copies):
        for trajectory in read_trajectories(sorted(trajectories.glob("part-*"))):
            content = f"{trajectory.content_hash}{number}"
            request = CriticRequest.of(trajectory)
            found.append(replace(request, content_hash=content))
    return found


def test_critics_in_actors_give_the_local_labels_although_they_are_killed(
    cluster: RayCluster, trajectories: Path
) -> None:
    requests = requests_about(trajectories, copies=10)
    critic = RayCritic("rules", {}, cluster, workers=2)
    found, killed = [], 0
    for reply in critic.label(requests):
        found.append(reply)
        if len(found) == len(requests) // 4:
            killed = kill_actors("CriticActor", number=2)
    second_round = list(critic.label(requests[:5]))
    critic.close()
    assert killed == 2
    local = open_critic("rules")
    expected = {reply.request.content_hash: reply.labels for reply in local.label(requests)}
    assert len(found) == len(requests), "one reply for each request"
    assert {reply.request.content_hash: reply.labels for reply in found} == expected
    assert all(reply.failure is None and reply.request.trajectory is None for reply in found)
    assert len(second_round) == 5
    assert (critic.critic_id, critic.prompt_hash) == (local.critic_id, local.prompt_hash)


def kill_this_process(trajectory: str) -> str:
    if trajectory == "bad":
        os.kill(os.getpid(), signal.SIGKILL)
    return trajectory


def nothing() -> None:
    pass


def test_a_job_that_kills_every_worker_ends_the_run_and_says_so(cluster: RayCluster) -> None:
    jobs = run_jobs(
        ["good", "bad"],
        kill_this_process,
        cluster=cluster,
        workers=1,
        start=nothing,
        start_arguments=(),
    )
    assert next(jobs) == ("good", "good")
    with pytest.raises(BackendError, match=r"bad: 3 processes died of it"):
        next(jobs)


def lacks_its_model(*_: object) -> None:
    raise ConfigError("expected a tokenizer on this node, got none")


def test_what_a_worker_lacks_to_begin_with_is_told_and_is_no_death(cluster: RayCluster) -> None:
    jobs = run_jobs(
        ["job"], echo, cluster=cluster, workers=1, start=lacks_its_model, start_arguments=()
    )
    with pytest.raises(ConfigError, match="expected a tokenizer on this node"):
        next(jobs)


def fill_the_disk(job: str) -> str:
    raise OSError(errno.ENOSPC, "No space left on device", job)


def test_a_disk_that_is_full_is_told_as_it_is_without_a_cluster(cluster: RayCluster) -> None:
    jobs = run_jobs(
        ["out/part"], fill_the_disk, cluster=cluster, workers=1, start=nothing, start_arguments=()
    )
    with pytest.raises(OSError, match="No space") as caught:
        next(jobs)
    assert (caught.value.strerror, caught.value.filename) == ("No space left on device", "out/part")
    assert "Traceback" not in str(caught.value)


def echo(job: str) -> str:
    return job


def test_a_request_that_kills_every_actor_is_given_up_and_the_others_are_answered(
    cluster: RayCluster, trajectories: Path, tmp_path: Path
) -> None:
    requests = requests_about(trajectories, copies=1)[:6]
    script = tmp_path / "labels.jsonl"
    script.write_text("", encoding="utf-8")
    killer = CriticRequest(
        trajectory_id="killer",
        content_hash="killer",
        part="all",
        steps=(0,),
        trajectory=Killer(**vars_of(requests[0].trajectory)),
    )
    critic = RayCritic("rules", {}, cluster, workers=1)
    replies = {reply.request.content_hash: reply for reply in critic.label([killer, *requests])}
    critic.close()
    assert len(replies) == 7
    assert replies["killer"].failure is not None
    assert replies["killer"].failure.startswith("engine: 3 actors died of it")


class Killer(Trajectory):
    """Kills the process that unpacks it."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[int, int]]:
        return die, (os.getpid(), 9)


def die(but: int, number: int) -> None:
    if os.getpid() != but:
        os.kill(os.getpid(), number)


def vars_of(trajectory: Trajectory | None) -> dict[str, object]:
    assert trajectory is not None
    names = Trajectory.__dataclass_fields__
    return {name: getattr(trajectory, name) for name in names}


def test_a_cluster_that_is_too_small_is_refused(cluster: RayCluster) -> None:
    with pytest.raises(ConfigError, match="expected a cluster with 3 CPU, got one with 2"):
        RayCritic("rules", {}, cluster, workers=3)


def test_an_error_of_a_critic_in_an_actor_is_raised_here(
    cluster: RayCluster, trajectories: Path, tmp_path: Path
) -> None:
    script = tmp_path / "labels.jsonl"
    script.write_text("", encoding="utf-8")
    critic = RayCritic("scripted", {"model": script}, cluster, workers=1)
    script.unlink()
    with pytest.raises(ConfigError, match="expected a JSONL or CSV file of labels"):
        list(critic.label(requests_about(trajectories, copies=1)))
    critic.close()


def test_critics_that_wait_for_servers_are_refused(cluster: RayCluster) -> None:
    with pytest.raises(ConfigError, match="expected a critic that computes"):
        RayCritic("openai", {}, cluster)
