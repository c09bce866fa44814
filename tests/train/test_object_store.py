"""A run whose directory is in a store goes on on any machine, and leaves what a local run does."""

import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import orjson
import pytest

from srft_prep.object_lease import LEASE
from tests.faults.commands import Command, finish, started
from tests.object_stores import SECRET_CANARY, Bucket, Machine, free_port
from tests.train.runs import losses_of

pytestmark = pytest.mark.slow
STEPS = 12
SETTINGS = (
    *("--tiny", "--batch-sequences", 2, "--checkpoint-every", 3),
    *("--schedule", "constant", "--warmup-steps", 1),
)


def words_of(shards: Path, output: object, *, steps: int = STEPS) -> tuple[object, ...]:
    return ("train", shards, *SETTINGS, "--max-steps", steps, "-o", output)


@pytest.fixture(scope="module")
def local(short_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run into a local folder that nothing happened to; to be read only."""
    folder = tmp_path_factory.mktemp("local")
    finish(words_of(short_shards, folder / "run"), folder / "log")
    return folder / "run"


def assert_as_local(bucket: Bucket, local: Path, folder: Path) -> None:
    """Compare what the store has with a local run's directory; but for times and TensorBoard.

    The newest checkpoint is there; of those before it one may have been passed over.
    """
    found = bucket.get_folder("run", folder)
    assert rest(found) == rest(local)
    assert newest(found) == newest(local)
    assert 1 <= len([*(found / "checkpoints").glob("step-*")]) <= 2
    assert [*(found / "tensorboard").iterdir()]
    assert losses_of(found) == losses_of(local)
    for name in ("model/model.safetensors", "model/config.json", "checkpoints/plan.json"):
        assert (found / name).read_bytes() == (local / name).read_bytes(), name


def names_in(folder: Path) -> set[str]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)) for path in paths if "tfevents" not in path.name}


def newest(folder: Path) -> set[str]:
    return {name for name in names_in(folder) if name.startswith(checkpoint(STEPS))}


def rest(folder: Path) -> set[str]:
    return {name for name in names_in(folder) if "/step-" not in name}


def checkpoint(step: int) -> str:
    return f"checkpoints/step-{step:08d}"


def is_complete(key: str) -> bool:
    """Whether an object is that by which a checkpoint counts for whole."""
    return key.endswith("/complete.json")


def steps_whole(bucket: Bucket) -> list[int]:
    """The steps whose checkpoints count for whole in the store."""
    names = bucket.names("run/checkpoints/")
    return sorted(int(name.split("/")[2][5:]) for name in names if name.endswith("/complete.json"))


class Ranks:
    """The ranks of a run, on machines that share a cache or do not."""

    def __init__(self, runs: list[Command]) -> None:
        self.runs = runs

    def send(self, number: signal.Signals) -> None:
        for run in self.runs:
            run.send(number)

    def wait(self) -> list[int | None]:
        return [run.wait() for run in self.runs]

    @property
    def said(self) -> str:
        return "".join(run.said for run in self.runs)


@contextmanager
def ranks_of(machines: list[Machine], words: tuple[object, ...]) -> Iterator[Ranks]:
    """Start a rank on each of some machines, as torchrun would."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with ExitStack() as stack:
        runs = []
        for rank, machine in enumerate(machines):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(len(machines))}
            environment = machine.environment | shared | (own if len(machines) > 1 else {})
            log = machine.folder / f"log{rank}"
            runs.append(stack.enter_context(started(words, log, environment=environment)))
        yield Ranks(runs)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_lost_machine_costs_no_bit_of_losses_and_weights(
    ranks: int,
    bucket: Bucket,
    machine: Machine,
    local: Path,
    short_shards: Path,
    tmp_path: Path,
) -> None:
    output = f"{bucket.url}/run"
    words = words_of(short_shards, output)
    if ranks > 1:  # sums over ranks round otherwise
        local = tmp_path / "local" / "run"
        with ranks_of([machine] * ranks, words_of(short_shards, local)) as undisturbed:
            assert undisturbed.wait() == [0] * ranks, undisturbed.said
    with ranks_of([machine] * ranks, words_of(short_shards, output, steps=3)) as short:
        assert short.wait() == [0] * ranks, short.said
    assert steps_whole(bucket) == [3]

    stopped = machine.again("stopped")  # asked to stop before the first step of the longer run
    stopped.gate.hold(lambda key: key == "run/.progress/plan.json")
    with ranks_of([stopped] * ranks, (*words, "--resume")) as run:
        assert run.runs[0].wait_until(lambda: bool(stopped.gate.held)), run.said
        run.send(signal.SIGTERM)
        stopped.gate.let_go()
        assert run.wait() == [130] * ranks, run.said
    assert steps_whole(bucket) == [3, 4], run.said
    assert f"run/.progress/{LEASE}" not in bucket.names("run/")
    assert "run/manifest.json" not in bucket.names("run/")

    killed = machine.again("killed")  # while a checkpoint is on its way
    killed.gate.hold(is_complete)
    with ranks_of([killed] * ranks, words) as run:
        assert run.runs[0].wait_until(lambda: bool(killed.gate.held)), run.said
        run.send(signal.SIGKILL)
        run.wait()
    killed.gate.lose()
    assert "goes on after step 4" in run.said
    assert steps_whole(bucket) == [3, 4]
    assert len({name.split("/")[2] for name in bucket.names("run/checkpoints/step-")}) == 3

    last = machine.again("last")
    with ranks_of([last] * ranks, words) as run:
        assert run.wait() == [0] * ranks, run.said
    assert "goes on after step 4" in run.said
    assert_as_local(bucket, local, tmp_path / "found")
    for path in [*machine.folder.parent.rglob("*"), *(tmp_path / "found").rglob("*")]:
        assert path.is_dir() or SECRET_CANARY.encode() not in path.read_bytes(), path


def put_unfinished(bucket: Bucket, local: Path) -> None:
    """Put what a run's machine left in the store that was lost before the model was written."""
    bucket.put_folder(local, "run")
    manifest = orjson.loads(bucket.get("run/manifest.json"))
    plan = {key: manifest[key] for key in ("schema_version", "package_version", "stage")}
    plan |= {key: manifest[key] for key in ("config", "inputs")}
    bucket.put("run/.progress/plan.json", orjson.dumps(plan))
    bucket.delete("run/manifest.json")


def damage(bucket: Bucket, step: int, how: str) -> None:
    folder = f"run/{checkpoint(step)}"
    (name,) = (name for name in bucket.names(folder) if name.endswith(".distcp"))
    if how == "changed":
        bucket.put(name, bytes(len(bucket.get(name))))
    elif how == "cut short":
        bucket.put(name, bucket.get(name)[:-10])
    else:
        bucket.delete(f"{folder}/complete.json")


@pytest.mark.parametrize("how", ["changed", "cut short", "unfinished"])
def test_a_damaged_checkpoint_in_the_store_is_said_and_the_one_before_it_used(
    how: str, bucket: Bucket, machine: Machine, local: Path, short_shards: Path, tmp_path: Path
) -> None:
    put_unfinished(bucket, local)
    damage(bucket, 12, how)
    said = machine.run(*words_of(short_shards, f"{bucket.url}/run"))
    assert "goes on after step 9" in said
    where = f"{bucket.url}/run/{checkpoint(12)}"
    assert (where in said) == (how != "unfinished")
    assert_as_local(bucket, local, tmp_path / "found")


def test_without_a_whole_checkpoint_in_the_store_nothing_is_begun_anew_silently(
    bucket: Bucket, machine: Machine, local: Path, short_shards: Path
) -> None:
    put_unfinished(bucket, local)
    damage(bucket, 9, "changed")
    damage(bucket, 12, "cut short")
    left = contents(bucket)
    said = machine.run(*words_of(short_shards, f"{bucket.url}/run"), status=2)
    assert f"{bucket.url}/run/checkpoints: no checkpoint is whole" in said
    assert contents(bucket) == left


def contents(bucket: Bucket) -> dict[str, bytes]:
    return {name: bucket.get(name) for name in bucket.names()}


def test_a_finished_run_has_nothing_to_do_and_fetches_nothing(
    bucket: Bucket, machine: Machine, local: Path, short_shards: Path
) -> None:
    bucket.put_folder(local, "run")
    left = contents(bucket)
    assert "train: 12 steps" in machine.run(*words_of(short_shards, f"{bucket.url}/run"))
    assert contents(bucket) == left
    assert not [*machine.cache.rglob("*.distcp"), *machine.cache.rglob("*.safetensors")]
    assert "ok: train" in machine.run("verify", f"{bucket.url}/run")


def test_a_run_that_cannot_begin_leaves_the_store_as_it_was(
    bucket: Bucket, machine: Machine, local: Path, short_shards: Path, tmp_path: Path
) -> None:
    for leave in (bucket.put_folder, lambda folder, prefix: put_unfinished(bucket, folder)):
        leave(local, "run")
        left = contents(bucket)
        wrong = ("train", short_shards, "--model", tmp_path / "nowhere", "-o", f"{bucket.url}/run")
        machine.run(*wrong, "--overwrite", status=2)
        words = words_of(short_shards, f"{bucket.url}/run", steps=STEPS - 1)
        said = machine.run(*words, status=2)
        assert f"{bucket.url}/run: holds " in said
        assert "max_steps: 12 before, 11 now" in said
        said = machine.again("other").run(*words, "--resume", status=2)
        assert "--resume goes on after step 12, but --max-steps is 11" in said
        assert contents(bucket) == left


def test_overwrite_begins_anew_there_too(
    bucket: Bucket, machine: Machine, local: Path, short_shards: Path, tmp_path: Path
) -> None:
    put_unfinished(bucket, local)
    bucket.put(f"run/{checkpoint(15)}/__0_0.distcp", b"left by a killed machine")
    words = words_of(short_shards, tmp_path / "four", steps=4)
    finish(words, tmp_path / "log")
    said = machine.run(*words[:-1], f"{bucket.url}/run", "--overwrite")
    assert "goes on" not in said
    found = bucket.get_folder("run", tmp_path / "found")
    assert losses_of(found) == losses_of(tmp_path / "four")
    assert rest(found) == rest(tmp_path / "four")
    assert steps_whole(bucket)[-1] == 4
    assert not bucket.names(f"run/{checkpoint(15)}")
    assert not bucket.names(f"run/{checkpoint(12)}")


def test_another_run_is_refused_and_a_checkpoint_on_its_way_stays(
    bucket: Bucket, machine: Machine, local: Path, short_shards: Path, tmp_path: Path
) -> None:
    words = (*words_of(short_shards, f"{bucket.url}/run"), "--keep-checkpoints", 1)
    with machine.held(is_complete, *words) as run:
        said = machine.again("other").run(*words, status=2)
        assert f"{bucket.url}/run: another srft-prep run is writing here" in said
        ended = lambda: any(machine.cache.rglob("run/model/model.safetensors"))  # noqa: E731
        assert run.wait_until(ended), run.said
        assert any(machine.cache.rglob(machine.gate.held[0])), "dropped on its way"
        machine.gate.let_go()
        assert run.wait() == 0, run.said
        assert "Traceback" not in run.said
    assert steps_whole(bucket) == [STEPS], "what is too old goes there, too"
    assert len([*machine.cache.rglob("run/checkpoints/step-*")]) == 1
    assert_as_local(bucket, local, tmp_path / "found")


def test_a_store_that_is_away_does_not_stop_training_and_the_same_command_uploads_the_rest(
    bucket: Bucket, machine: Machine, local: Path, short_shards: Path, tmp_path: Path
) -> None:
    machine.environment["SRFT_STORAGE_PATIENCE_SECONDS"] = "1"
    words = words_of(short_shards, f"{bucket.url}/run")
    with machine.held(is_complete, *words) as run:
        machine.gate.close()
        assert run.wait() == 2, run.said
        assert "give the same command again here, and it uploads the rest" in run.said
        assert "Traceback" not in run.said
    (model,) = machine.cache.rglob("run/model/model.safetensors")
    made = model.stat().st_ino
    assert "run/manifest.json" not in bucket.names("run/")
    machine.gate.lose()
    machine.gate.open()
    with machine.held(is_complete, *words) as run:  # it goes away a second time
        machine.gate.close()
        assert run.wait() == 2, run.said
    machine.gate.lose()
    machine.gate.open()
    machine.run(*words)
    assert_as_local(bucket, local, tmp_path / "found")
    assert model.stat().st_ino == made, "it was made again"


def test_a_store_that_comes_back_in_time_costs_nothing(
    bucket: Bucket, machine: Machine, local: Path, short_shards: Path, tmp_path: Path
) -> None:
    with machine.held(is_complete, *words_of(short_shards, f"{bucket.url}/run")) as run:
        machine.gate.close()
        ended = lambda: any(machine.cache.rglob("run/model/model.safetensors"))  # noqa: E731
        assert run.wait_until(ended), run.said
        machine.gate.lose()
        machine.gate.open()
        assert run.wait() == 0, run.said
    assert_as_local(bucket, local, tmp_path / "found")


def test_ranks_that_do_not_see_one_cache_end_with_one_error(
    bucket: Bucket, machine: Machine, short_shards: Path
) -> None:
    machines = [machine, machine.again("other")]
    machines[1].environment["AWS_ENDPOINT_URL"] = machine.environment["AWS_ENDPOINT_URL"]
    with ranks_of(machines, words_of(short_shards, f"{bucket.url}/run")) as run:
        assert run.wait() == [2, 2], run.said
    assert run.said.count("give a folder that all machines share as SRFT_CACHE") == 1
    assert "Traceback" not in run.said
    assert bucket.names() == []
