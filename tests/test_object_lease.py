"""The lease of an output in a store: what comes between a request and its answer does no harm.

moto's S3 server as a process of its own, and a way to it on which a test loses answers.
"""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import orjson
import pytest

from srft_prep.errors import ConfigError
from srft_prep.object_lease import CLOCK, LEASE, SECONDS, Lease
from tests.object_stores import Bucket, Machine, Way, reaching
from tests.processes import wait_until

pytestmark = pytest.mark.slow
PLACE = f"out/.progress/{LEASE}"
NUM_REPEATS = 12
"""More than s3fs and aiohttp together ask before they give up."""


@pytest.fixture
def way(s3_port: int, tmp_path: Path) -> Iterator[Way]:
    """The way on which this process reaches the store."""
    way = Way(s3_port)
    with reaching(Machine(tmp_path / "machine", way.port)):
        yield way
    way.close()


def once(
    request: str, act: Callable[[], object] = lambda: None, *, loses: bool = True
) -> Callable[[str], bool]:
    """Return what acts on the first answer to a request, and loses it."""
    left = [request]

    def happens(got: str) -> bool:
        if not got.startswith(request) or not left:
            return True
        left.clear()
        act()
        return not loses

    return happens


def owner(bucket: Bucket, **changes: object) -> bytes:
    """Put the lease of a process of this machine that is dead."""
    content = orjson.dumps({**orjson.loads(Lease("s3://x/y", "s3://x/y")._content), **changes})
    bucket.put(PLACE, content)
    return content


def made(bucket: Bucket) -> Lease:
    return Lease(f"{bucket.url}/out", f"{bucket.url}/out/.progress")


def test_a_lease_is_taken_though_the_answer_to_its_creation_is_lost(
    bucket: Bucket, way: Way
) -> None:
    lease = made(bucket)
    way.happens = once(f"PUT {LEASE}")
    lease.take()
    lease.assure()
    assert way.answered[f"PUT {LEASE}"] == 1, "the request was repeated"
    lease.release()
    assert bucket.names() == []


def rewrite(bucket: Bucket) -> None:
    """Write the lease as it is, under another ETag: as stores do that encrypt by their own key."""
    place = {"Bucket": bucket.name, "Key": PLACE}
    content = bucket.get(PLACE)
    before = bucket.client.head_object(**place)["ETag"]
    upload = {**place, "UploadId": bucket.client.create_multipart_upload(**place)["UploadId"]}
    part = bucket.client.upload_part(**upload, PartNumber=1, Body=content)
    parts = {"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]}
    bucket.client.complete_multipart_upload(**upload, MultipartUpload=parts)
    assert bucket.client.head_object(**place)["ETag"] != before


def test_a_dead_lease_is_taken_over_though_the_answer_is_lost(bucket: Bucket, way: Way) -> None:
    owner(bucket, pid=1 << 30)
    lease = made(bucket)
    way.happens = once(f"PUT {LEASE}")
    lease.take()
    lease.assure()
    lease.release()
    assert bucket.names() == []


def test_a_lease_is_renewed_though_an_answer_was_lost_and_its_etag_changed(
    bucket: Bucket, way: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SECONDS, "2")
    lease = made(bucket)
    lease.take()
    way.happens = once(f"PUT {LEASE}", lambda: rewrite(bucket))
    wait_until(lambda: lease.is_lost or way.answered[f"PUT {LEASE}"] > 4)
    assert not lease.is_lost
    lease.assure()
    lease.release()
    assert bucket.names() == []


def test_a_lease_whose_etag_could_not_be_asked_for_after_a_renewal_is_still_ours(
    bucket: Bucket, way: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SECONDS, "2")
    lease = made(bucket)
    lease.take()
    lost: list[str] = []
    renewed = threading.Event()

    def happens(request: str) -> bool:
        if request == f"PUT {LEASE}" and not renewed.is_set():
            rewrite(bucket)
            renewed.set()
        elif request == f"HEAD {LEASE}" and renewed.is_set() and len(lost) < NUM_REPEATS:
            lost.append(request)
            return False
        return True

    way.happens = happens
    wait_until(lambda: len(lost) == NUM_REPEATS)
    seen = way.answered[f"PUT {LEASE}"]
    wait_until(lambda: lease.is_lost or way.answered[f"PUT {LEASE}"] > seen + 1)
    assert not lease.is_lost
    lease.release()


def test_nothing_is_written_under_a_lease_that_was_released(bucket: Bucket, way: Way) -> None:
    lease = made(bucket)
    lease.take()
    lease.release()
    with pytest.raises(ConfigError, match="this run is over"):
        lease.assure()
    assert bucket.names() == []


def test_another_machine_that_lost_its_clock_probe_does_not_take_a_live_lease(
    bucket: Bucket, way: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = owner(bucket, machine="another", run="another")

    def sweep() -> None:
        for name in bucket.names(f"out/.progress/{CLOCK}"):
            bucket.delete(name)

    def sweeps(request: str) -> bool:
        sweep()
        return True

    for every in (False, True):
        lease = made(bucket)
        way.happens = once(f"PUT {CLOCK}", sweep, loses=False)
        if every:
            way.happens = sweeps
        refusal = "other runs are taking" if every else "counts as dead after 60"
        with pytest.raises(ConfigError, match=refusal):
            lease.take()
        assert bucket.get(PLACE) == content
    assert bucket.names() == [PLACE]


def test_a_lease_of_another_run_is_noticed_and_not_removed(
    bucket: Bucket, way: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SECONDS, "2")
    lease = made(bucket)
    lease.take()
    content = owner(bucket, machine="another", run="another")
    wait_until(lambda: lease.is_lost)
    with pytest.raises(ConfigError, match="another run took over"):
        lease.assure()
    lease.release()
    assert bucket.get(PLACE) == content
