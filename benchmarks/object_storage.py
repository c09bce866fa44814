"""Bytes per second to and from a store: ours against plain s3fs get and put of the same files.

    python benchmarks/object_storage.py [--megabytes 256] [--files 16] [--rounds 5]

The store is moto's S3 server, a process of its own on loopback, which is the ceiling of both: a
real store is slower, and a machine near it has a faster line. Each round fetches and uploads the
same files with both, in an order that changes; ours hashes what it fetches.
Prints a table, and last a JSON line with the medians and their spread (least and greatest ratio).
"""

import argparse
import hashlib
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from tests.object_stores import Bucket, s3_server  # noqa: E402  # tests are no package installed

WAYS = ("fetch", "upload")


def main() -> None:
    """Measure, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=256)
    parser.add_argument("--files", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, s3_server() as port:
        os.environ |= {
            "SRFT_CACHE": f"{folder}/cache",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        measure(Path(folder), Bucket(port, "bench"), given)


def measure(folder: Path, bucket: Bucket, given: argparse.Namespace) -> None:
    """Fetch and upload files in rounds with both, and print the rates."""
    import s3fs

    from srft_prep.object_lease import Lease
    from srft_prep.object_mirror import fetch, input_place, output_place
    from srft_prep.object_uploads import Uploads

    size = (given.megabytes << 20) // given.files
    source = output_place(f"{bucket.url}/ours")
    source.mkdir(parents=True)
    files = []
    for number in range(given.files):
        content = os.urandom(size)
        name = f"part-{number:05d}.parquet"
        (source / name).write_bytes(content)
        files.append({"name": name, "bytes": size, "sha256": hashlib.sha256(content).hexdigest()})
    names = [str(file["name"]) for file in files]
    hashes = {str(file["name"]): str(file["sha256"]) for file in files}
    place, plain_place = input_place(f"{bucket.url}/plain"), folder / "plain"  # not written here
    system = s3fs.S3FileSystem()

    def ours_up() -> None:
        Uploads(source, Lease(f"{bucket.url}/ours", f"{bucket.url}/ours/.progress")).send(hashes)

    def ours_down() -> None:
        assert not fetch(place, files)

    def plain_up() -> None:
        system.put([str(source / n) for n in names], [f"{bucket.name}/plain/{n}" for n in names])

    def plain_down() -> None:
        system.get(
            [f"{bucket.name}/plain/{n}" for n in names], [str(plain_place / n) for n in names]
        )

    runs: dict[tuple[str, str], Callable[[], None]] = {
        ("upload", "ours"): ours_up,
        ("upload", "s3fs"): plain_up,
        ("fetch", "ours"): ours_down,
        ("fetch", "s3fs"): plain_down,
    }
    rates: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    for turn in range(given.rounds + 1):  # the first warms both up
        shutil.rmtree(place, ignore_errors=True)
        shutil.rmtree(plain_place, ignore_errors=True)
        plain_place.mkdir()
        for way in ("upload", "fetch"):
            for who in ("ours", "s3fs")[:: -1 if turn % 2 else 1]:
                begun = time.perf_counter()
                runs[way, who]()
                if turn:
                    rates[way, who].append(given.megabytes / (time.perf_counter() - begun))
    document: dict[str, object] = {"megabytes": given.megabytes, "files": given.files}
    print(f"{'':8} {'ours MiB/s':>12} {'s3fs MiB/s':>12} {'ratio':>7}   least..greatest")
    for way in WAYS:
        ours, peer = rates[way, "ours"], rates[way, "s3fs"]
        ratios = [mine / theirs for mine, theirs in zip(ours, peer, strict=True)]
        medians = [statistics.median(each) for each in (ours, peer, ratios)]
        print(
            f"{way:8} {medians[0]:12.0f} {medians[1]:12.0f} {medians[2]:7.2f}   "
            f"{min(ratios):.2f}..{max(ratios):.2f}"
        )
        document[way] = {
            "ours_mib_per_second": medians[0],
            "s3fs_mib_per_second": medians[1],
            "ratio": medians[2],
            "least": min(ratios),
            "greatest": max(ratios),
        }
    print(json.dumps(document))


if __name__ == "__main__":
    main()
