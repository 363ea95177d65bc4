"""Internal snapshots made, deleted and applied while the image is open, against a model; qemu-img judges the image."""

from __future__ import annotations

import asyncio
import errno
import random
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kit.peers import run
from kit.qcow2_disk import VARIANTS, Disk, opened
from kit.qemu import assert_same, check, create, qemu_img
from livedisk.emulator.block.driver import Moment
from livedisk.emulator.block.types import ZeroFlags

SIZE = 4 << 20
MOMENT = Moment(1_700_000_000, 5000)


class Session:
    """A guest and an administrator at one image: ``model`` is what the guest sees, ``kept`` what each snapshot holds, by id."""

    def __init__(self, disk: Disk, model: bytearray, seed: int) -> None:
        self.disk = disk
        self.model = model
        self.kept: dict[str, bytes] = {}
        self.chance = random.Random(seed)

    async def run(self, steps: int) -> None:
        for _ in range(steps):
            await self.guest()
            if self.chance.random() < 0.4:
                async with self.disk.node.graph.drained(self.disk.node):
                    try:
                        await self.administrator()
                    except OSError as error:
                        # Compressed clusters share host clusters: two bits may not count one reference more.
                        if (error.errno, self.disk.image.geometry.refcount_bits) != (errno.EINVAL, 2):
                            raise
                assert await self.disk.read(0, len(self.model)) == bytes(self.model)

    async def guest(self) -> None:
        length = self.chance.choice([512, 65536, self.chance.randrange(1, 300_000)])
        offset = self.chance.randrange(0, len(self.model) - length + 1)
        match self.chance.choice(["write", "write", "write", "zero", "discard", "compressed"]):
            case "write":
                await self.change(offset, self.chance.randbytes(length))
            case "zero":
                self.model[offset : offset + length] = bytes(length)
                await self.disk.backend.write_zeroes(offset, length, ZeroFlags.MAY_UNMAP)
            case "discard":
                cluster = self.disk.driver.cluster_size()
                start, end = -(-offset // cluster) * cluster, (offset + length) // cluster * cluster
                if start < end:
                    self.model[start:end] = bytes(end - start)
                    await self.disk.backend.discard(start, end - start)
            case "compressed":
                cluster = self.disk.driver.cluster_size()
                start = offset // cluster * cluster
                data = self.chance.randbytes(16) * (cluster // 16)
                if start + cluster <= len(self.model):
                    self.model[start : start + cluster] = data
                    await self.disk.node.write_compressed(start, memoryview(data))

    async def change(self, offset: int, data: bytes) -> None:
        self.model[offset : offset + len(data)] = data
        await self.disk.write(offset, data)

    async def administrator(self) -> None:
        driver, known = self.disk.driver, sorted(self.kept)
        action = self.chance.choice(["create", "create", "delete", "apply"]) if known else "create"
        id = self.chance.choice(known) if known else ""
        if action == "create" and len(known) < 3:  # as many as two bits of refcount allow
            made = await driver.snapshot_create(f"s{self.chance.randrange(1000)}", MOMENT)
            self.kept[made["id"]] = bytes(self.model)
        elif action == "delete":
            await driver.snapshot_delete(id)
            del self.kept[id]
        elif action == "apply" and len(known) < 2:  # for a moment there is one reference more
            await driver.snapshot_apply(id)
            self.model[:] = self.kept[id]


def judge(path: Path, session: Session, folder: Path) -> None:
    check(path)
    (folder / "model.raw").write_bytes(session.model)
    assert_same(path, folder / "model.raw", "-f", "qcow2", "-F", "raw")
    for id, content in session.kept.items():
        qemu_img("convert", "-l", f"snapshot.id={id}", "-O", "raw", path, folder / "then.raw")
        assert (folder / "then.raw").read_bytes() == content, f"snapshot {id}"


@pytest.mark.parametrize("variant", [name for name in VARIANTS if "data file" not in name])
@settings(max_examples=2)
@given(seed=st.integers(0, 1 << 30), cache=st.sampled_from([1 << 25, 4096]))
def test_every_snapshot_keeps_what_it_was_made_of(variant: str, seed: int, cache: int) -> None:
    async def exercise(session: Session) -> None:
        for _ in range(2):  # what is kept is kept over a new opening
            async with opened(path, l2_cache_size=cache) as disk:
                session.disk = disk
                await session.run(12)

    if "1 bit" in variant:
        return  # nothing can be shared
    with TemporaryDirectory() as name:
        folder = Path(name)
        path = create(folder / "image.qcow2", SIZE, options=VARIANTS[variant].format(folder=folder))
        session = Session(None, bytearray(SIZE), seed)  # type: ignore[arg-type]
        asyncio.run(exercise(session))
        judge(path, session, folder)


def test_snapshots_made_by_qemu_are_applied_and_deleted(tmp_path: Path) -> None:
    path = create(tmp_path / "image.qcow2", SIZE)
    for number in range(1, 4):
        run(
            [
                "qemu-io",
                "-f",
                "qcow2",
                "-c",
                f"write -P {number} 0 1M",
                "-c",
                f"write -c -P {number} {number}M 64k",
                path,
            ]
        )
        qemu_img("snapshot", "-c", f"s{number}", path)

    async def exercise() -> None:
        async with opened(path) as disk:
            assert [one["name"] for one in disk.driver.snapshots()] == ["s1", "s2", "s3"]
            await disk.driver.snapshot_apply("1")
            assert await disk.read(0, 1 << 20) == b"\1" * (1 << 20)
            await disk.driver.snapshot_delete("2")

    asyncio.run(exercise())
    check(path)
    qemu_img("snapshot", "-a", "s3", path)
    run(["qemu-io", "-f", "qcow2", "-c", "read -P 3 0 1M", "-c", "read -P 3 3M 64k", path])
    check(path)


def test_applying_a_snapshot_of_another_size_resizes(tmp_path: Path) -> None:
    path = create(tmp_path / "image.qcow2", SIZE)

    async def exercise() -> None:
        async with opened(path) as disk:
            await disk.write(0, b"a" * 4096)
            made = await disk.driver.snapshot_create("small", MOMENT)
            await disk.node.truncate(1 << 40)
            await disk.write((1 << 40) - 4096, b"b" * 4096)
            large = await disk.driver.snapshot_create("large", MOMENT)
            await disk.driver.snapshot_apply(made["id"])
            assert disk.node.size == SIZE
            assert await disk.read(0, 4096) == b"a" * 4096
            await disk.driver.snapshot_apply(large["id"])
            assert disk.node.size == 1 << 40
            assert await disk.read((1 << 40) - 4096, 4096) == b"b" * 4096

    asyncio.run(exercise())
    check(path)


@pytest.mark.parametrize(
    ("options", "number"),
    [("refcount_bits=1", errno.EINVAL), ("data_file={folder}/data.raw", errno.ENOTSUP)],
)
def test_a_refused_snapshot_changes_nothing(options: str, number: int, tmp_path: Path) -> None:
    path = create(tmp_path / "image.qcow2", SIZE, options=options.format(folder=tmp_path))
    run(["qemu-io", "-f", "qcow2", "-c", "write -P 1 0 1M", path])
    before = path.read_bytes()

    async def exercise() -> Any:
        async with opened(path) as disk:
            with pytest.raises(OSError) as raised:
                await disk.driver.snapshot_create("s", MOMENT)
            await disk.write(0, b"b" * 4096)
            return raised.value.errno

    assert asyncio.run(exercise()) == number
    check(path)
    assert len(path.read_bytes()) == len(before)


def test_a_snapshot_that_is_not_there_is_enoent(tmp_path: Path) -> None:
    path = create(tmp_path / "image.qcow2", SIZE)

    async def exercise() -> None:
        async with opened(path) as disk:
            for call in (disk.driver.snapshot_delete, disk.driver.snapshot_apply):
                with pytest.raises(OSError) as raised:
                    await call("7")
                assert raised.value.errno == errno.ENOENT

    asyncio.run(exercise())
    check(path)
