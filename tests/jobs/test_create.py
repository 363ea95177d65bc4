"""blockdev-create and x-blockdev-amend: as QEMU's, job by job, and what QEMU's tools say of what was made.

Differences that are meant: an existing file is emptied, where QEMU leaves the rest of what was there behind the new image; a
refused creation leaves it as it was; encryption is refused; a backing format that is not known is the job's error; a size that
the format cannot hold is told in qemu-img's words.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kit.livedisk import Daemon
from kit.qemu import check, create, info, qemu_io
from kit.qmp import Qmp
from kit.side_by_side import MACHINE, Host, Job, Step, compare, step

MIB = 1 << 20


def make(**options: Any) -> list[Step]:
    """A creation from its start to the dismissal of its job."""
    wanted = {name.replace("_", "-"): value for name, value in options.items()}
    return [
        step("blockdev-create", job_id="job0", options=wanted),
        Job("job0"),
        step("query-jobs"),
        step("job-dismiss", id="job0"),
    ]


def qcow2(**options: Any) -> list[Step]:
    return make(driver="qcow2", **{"file": "f", "size": MIB, **options})


def amend(node: str, job: str = "job0", **options: Any) -> Step:
    return step("x-blockdev-amend", job_id=job, node_name=node, options=options)


def looked_at(folder: Path) -> Any:
    found = info(folder / "f", "-U")
    return {name: found.get(name) for name in ("virtual-size", "cluster-size", "backing-filename", "format-specific")}


LOOK = Host(looked_at)

SCRIPTS: dict[str, list[Step]] = {
    "files": [
        *make(driver="file", filename="a", size=MIB),
        *make(driver="file", filename="a", size=1000001),
        *make(driver="file", filename="none/a", size=MIB),
        *make(driver="file", filename="b", size=MIB, preallocation="metadata"),
        *make(driver="file", filename="c", size=MIB, preallocation="full", nocow=True),
        *make(driver="file", filename="c", size=2 * MIB, preallocation="falloc", extent_size_hint=65536),
        *make(driver="file", filename=".", size=1),
        *make(driver="file", filename="zz", size=1 << 63),
        Host(lambda folder: [(folder / name).stat().st_size for name in ("a", "c")]),
        *make(driver="file", filename="busy.qcow2", size=1),
    ],
    "who can": [
        step("blockdev-create", job_id="j", options={"driver": "null-co"}),
        step("blockdev-create", job_id="j", options={"driver": "raw"}),
        step("blockdev-create", job_id="j", options={"driver": "host_device"}),
        step("blockdev-create", job_id="j", options={"driver": "zz"}),
        step("blockdev-create", job_id="j", options={"driver": "file", "filename": "a"}),
        step("blockdev-create", job_id="1j", options={"driver": "file", "filename": "a", "size": 1}),
        step("blockdev-create", options={"driver": "file", "filename": "a", "size": 1}),
        step("blockdev-create", job_id="j", options={"driver": "file", "filename": "a", "size": -1}),
        Job("j"),
        step("blockdev-create", job_id="j", options={"driver": "file", "filename": "a", "size": 1}),
        step("job-cancel", id="j"),
        step("query-jobs"),
        step("query-block-jobs"),
        step("block-job-dismiss", id="j"),
        step("job-dismiss", id="j"),
        step("query-jobs"),
    ],
    "qcow2": [
        *qcow2(),
        LOOK,
        *qcow2(version="v2", cluster_size=4096),
        LOOK,
        *qcow2(refcount_bits=1, lazy_refcounts=True, compression_type="zstd"),
        LOOK,
        *qcow2(extended_l2=True, cluster_size=MIB, preallocation="metadata"),
        LOOK,
        *qcow2(backing_file="nowhere", backing_fmt="raw"),
        LOOK,
        *qcow2(data_file="d"),
        LOOK,
        *qcow2(data_file="d", data_file_raw=True),
        LOOK,
        *qcow2(file={"driver": "file", "filename": "f2"}, preallocation="falloc"),
        Host(lambda folder: check(folder / "f2")["check-errors"]),
        *qcow2(file={"driver": "file", "filename": "none"}),
    ],
    "qcow2 refused": [
        *qcow2(file="zz"),
        *qcow2(file="n"),
        *qcow2(file="busy"),
        *qcow2(size=MIB + 1),
        *qcow2(cluster_size=1),
        *qcow2(cluster_size=4 * MIB),
        *qcow2(refcount_bits=7),
        *qcow2(version="v2", refcount_bits=8),
        *qcow2(version="v2", lazy_refcounts=True),
        *qcow2(version="v2", data_file="d"),
        *qcow2(version="v2", extended_l2=True),
        *qcow2(version="v2", compression_type="zstd"),
        *qcow2(extended_l2=True, cluster_size=4096),
        *qcow2(data_file_raw=True),
        *qcow2(data_file="d", data_file_raw=True, backing_file="x"),
        *qcow2(backing_fmt="raw"),
        *qcow2(backing_file="x", preallocation="metadata"),
        step("blockdev-create", job_id="j", options={"driver": "qcow2", "size": 1}),
        step("blockdev-create", job_id="j", options={"driver": "qcow2", "file": "f", "size": 1, "version": "v4"}),
        step(
            "blockdev-create",
            job_id="j",
            options={"driver": "qcow2", "file": "f", "size": 1, "encrypt": {"format": "aes"}},
        ),
    ],
    "amend": [
        amend("zz", driver="qcow2"),
        amend("q", driver="file"),
        amend("f", driver="file"),
        amend("n", driver="null-co"),
        amend("q", driver="qcow2", size=1),
        amend("q", driver="qcow2", encrypt={"format": "luks"}),
        amend("q", "1j", driver="qcow2"),
        amend("q", driver="qcow2"),
        Job("job0"),
        amend("q", driver="qcow2"),
        step("query-jobs"),
        step("job-dismiss", id="job0"),
        amend("q", driver="qcow2", encrypt={"format": "luks", "state": "inactive"}),
        Job("job0"),
        step("query-jobs"),
    ],
}
NODES = (
    *("-blockdev", "file,node-name=f,filename=f", "-blockdev", "file,node-name=d,filename=d"),
    *("-blockdev", "qcow2,node-name=q,file.driver=file,file.node-name=busy,file.filename=busy.qcow2"),
    *("-blockdev", "null-co,node-name=n,size=1048576"),
)


def files(folder: Path) -> None:
    for name in ("f", "d", "f2"):
        (folder / name).touch()
    create(folder / "busy.qcow2", "1M")


@pytest.mark.parametrize("name", SCRIPTS)
def test_jobs_answers_and_images_are_those_of_qemu(name: str, tmp_path: Path) -> None:
    compare(tmp_path, SCRIPTS[name], prepare=files, options=[*MACHINE, *NODES])


def made(qmp: Qmp, **options: Any) -> str | None:
    """Run a creation; returns its error."""
    qmp.execute(
        "blockdev-create", job_id="job0", options={name.replace("_", "-"): one for name, one in options.items()}
    )
    qmp.wait_event("JOB_STATUS_CHANGE", lambda data: data["status"] == "concluded")
    (job,) = qmp.execute("query-jobs")
    qmp.execute("job-dismiss", id="job0")
    error: str | None = job.get("error")
    return error


def test_a_refused_creation_leaves_the_file_as_it_was(short_path: Path) -> None:
    path = short_path / "f"
    path.write_bytes(b"precious" * 512)
    with (
        Daemon(short_path, "--blockdev", f"file,node-name=f,filename={path}", nbd=False) as daemon,
        daemon.qmp() as qmp,
    ):
        assert made(qmp, driver="qcow2", file="f", size=MIB + 1)
        assert made(qmp, driver="qcow2", file="f", size=MIB, encrypt={"format": "luks", "key-secret": "s"}) == (
            "Encryption of qcow2 images is not supported: there is no cipher here that could write them"
        )
        assert made(qmp, driver="qcow2", file="f", size=MIB, backing_file="b", backing_fmt="zz") == (
            "Parameter 'backing-fmt' does not accept value 'zz'"
        )
        assert made(qmp, driver="file", filename=str(path), size=MIB, preallocation="metadata")
    assert path.read_bytes() == b"precious" * 512


def test_a_file_that_could_not_be_finished_is_removed(short_path: Path) -> None:
    with Daemon(short_path, nbd=False) as daemon, daemon.qmp() as qmp:
        assert made(qmp, driver="file", filename=str(short_path / "f"), size=(1 << 63) - 512)
    assert not (short_path / "f").exists()


def test_a_raw_disk_becomes_the_data_file_of_an_image_with_its_bytes(short_path: Path) -> None:
    (short_path / "d").write_bytes(b"\x5a" * MIB)
    (short_path / "f").touch()
    nodes = [f"--blockdev=file,node-name={name},filename={short_path / name}" for name in ("f", "d")]
    with Daemon(short_path, *nodes, nbd=False) as daemon, daemon.qmp() as qmp:
        assert made(qmp, driver="qcow2", file="f", data_file="d", data_file_raw=True, size=MIB) is None
        qmp.execute("blockdev-add", driver="qcow2", node_name="q", file="f", data_file="d")
    check(short_path / "f")
    assert "read 1048576/1048576" in qemu_io(short_path / "f", "read -P 0x5a 0 1M")


def test_an_image_inside_an_image(short_path: Path) -> None:
    create(short_path / "outer.qcow2", "64M")
    outer = f"qcow2,node-name=outer,file.driver=file,file.filename={short_path / 'outer.qcow2'}"
    with Daemon(short_path, "--blockdev", outer, nbd=False) as daemon, daemon.qmp() as qmp:
        assert made(qmp, driver="qcow2", file="outer", size=MIB) is None
        qmp.execute("blockdev-add", driver="qcow2", node_name="inner", file="outer")
    check(short_path / "outer.qcow2")
    file = {"driver": "file", "filename": str(short_path / "outer.qcow2")}
    inner = {"driver": "qcow2", "file": {"driver": "qcow2", "file": file}}
    assert info(f"json:{json.dumps(inner)}")["virtual-size"] == MIB
