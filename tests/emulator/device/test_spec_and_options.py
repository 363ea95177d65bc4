"""The config space byte for byte, and the properties with QEMU's refusals."""

from __future__ import annotations

import asyncio
import struct
import subprocess
from typing import Any

import pytest

from kit.memory_disk import Bench
from livedisk.emulator.device.geometry import guess
from livedisk.emulator.device.options import WITHOUT_EFFECT, check, read_options
from livedisk.emulator.device.spec import CONFIG_BYTES, WRITEBACK_OFFSET, ConfigSpace, Feature
from livedisk.emulator.errors import LiveDiskError
from livedisk.emulator.qmp.visit import JSON, KEYVAL

OFFSETS = {  # virtio 1.2, 5.2.4: field, offset, format
    "capacity": (0, "<Q"),
    "size_max": (8, "<I"),
    "seg_max": (12, "<I"),
    "cylinders": (16, "<H"),
    "heads": (18, "B"),
    "sectors": (19, "B"),
    "blk_size": (20, "<I"),
    "physical_block_exp": (24, "B"),
    "alignment_offset": (25, "B"),
    "min_io_size": (26, "<H"),
    "opt_io_size": (28, "<I"),
    "writeback": (32, "B"),
    "num_queues": (34, "<H"),
    "max_discard_sectors": (36, "<I"),
    "max_discard_seg": (40, "<I"),
    "discard_sector_alignment": (44, "<I"),
    "max_write_zeroes_sectors": (48, "<I"),
    "max_write_zeroes_seg": (52, "<I"),
    "write_zeroes_may_unmap": (56, "B"),
}


def test_every_field_of_the_config_space_stands_where_the_specification_puts_it() -> None:
    values = {name: 3 + index for index, name in enumerate(OFFSETS)}
    raw = ConfigSpace(**values).pack()
    assert len(raw) == CONFIG_BYTES == 60
    for name, (offset, form) in OFFSETS.items():
        assert struct.unpack_from(form, raw, offset)[0] == values[name], name
    assert OFFSETS["writeback"][0] == WRITEBACK_OFFSET


def test_config_space_and_features_follow_the_properties() -> None:
    async def main() -> None:
        bench = Bench()
        await bench.disk(size=(1 << 20) + 700)
        device = await bench.device(
            logical_block_size=4096,
            physical_block_size=16384,
            min_io_size=8192,
            opt_io_size=65536,
            discard_granularity=8192,
            **{"queue-size": 128, "num-queues": 4, "max-discard-sectors": 2048, "write-zeroes": False},
        )
        config = device.config()
        assert config.capacity == (1 << 20) // 512 + 1  # whole sectors only
        assert (config.blk_size, config.physical_block_exp) == (4096, 2)
        assert (config.min_io_size, config.opt_io_size) == (2, 16)
        assert (config.seg_max, config.num_queues) == (126, 4)
        assert (config.max_discard_sectors, config.max_discard_seg, config.discard_sector_alignment) == (2048, 1, 16)
        assert (config.max_write_zeroes_sectors, config.max_write_zeroes_seg, config.write_zeroes_may_unmap) == (
            0,
            0,
            0,
        )
        assert config.writeback == 1
        assert (config.cylinders, config.heads) == (2, 16)
        features = {bit for bit in Feature if device.features >> bit & 1}
        assert features >= {Feature.MQ, Feature.DISCARD, Feature.FLUSH, Feature.CONFIG_WCE, Feature.VERSION_1}
        assert not features & {Feature.WRITE_ZEROES, Feature.RO, Feature.SIZE_MAX}
        await bench.close()

    asyncio.run(main())


def test_a_read_only_node_makes_a_read_only_device() -> None:
    async def main() -> None:
        bench = Bench()
        await bench.disk(**{"read-only": True})
        device = await bench.device()
        assert device.read_only
        assert device.features >> Feature.RO & 1
        await bench.close()

    asyncio.run(main())


def partition_table(*, end_head: int, end_sector: int, sectors: int) -> bytes:
    entry = bytes([0x80, 0, 1, 0, 0x83, end_head, end_sector, 0]) + struct.pack("<II", 63, sectors)
    return bytes(0x1BE) + entry + bytes(48) + b"\x55\xaa"


@pytest.mark.parametrize(
    ("size", "first", "expected"),
    [
        (1 << 20, bytes(512), (2, 16, 63)),
        (1 << 30, bytes(512), (2080, 16, 63)),
        (1 << 40, bytes(512), (16383, 16, 63)),
        (1 << 30, partition_table(end_head=7, end_sector=32, sectors=1000), (8192, 8, 32)),
        (1 << 30, partition_table(end_head=254, end_sector=63, sectors=1000), (2080, 16, 63)),
        (1 << 30, partition_table(end_head=7, end_sector=32, sectors=0), (2080, 16, 63)),
    ],
)
def test_geometry_is_guessed_as_qemu_guesses_it(size: int, first: bytes, expected: tuple[int, int, int]) -> None:
    assert tuple(guess(size, first)) == expected


REFUSED = [
    {"foo": "1"},
    {"logical_block_size": "513"},
    {"logical_block_size": "4194304"},
    {"physical_block_size": "256"},
    {"logical_block_size": "4096"},
    {"min_io_size": "1000"},
    {"opt_io_size": "1000"},
    {"opt_io_size": "99999999999"},
    {"min_io_size": "99999744"},
    {"discard_granularity": "1000"},
    {"max-discard-sectors": "0"},
    {"max-discard-sectors": "4194304"},
    {"max-write-zeroes-sectors": "0"},
    {"num-queues": "0"},
    {"queue-size": "3"},
    {"queue-size": "2048"},
    {"queue-size": "2"},
    {"secs": "999", "heads": "1", "cyls": "1"},
    {"secs": "63", "heads": "16", "cyls": "70000"},
    {"secs": "63", "heads": "300", "cyls": "7"},
    {"write-cache": "true"},
    {"werror": "foo"},
    {"share-rw": "foo"},
    {"config-wce": "1"},
    {"num-queues": "x"},
    {"bootindex": "x"},
    {"scsi": "off"},
    {"disable-legacy": "on", "disable-modern": "on"},
]


def refusal(values: dict[str, Any]) -> str | None:
    try:
        check(read_options({"driver": "virtio-blk", "drive": "n", **values}, KEYVAL))
    except LiveDiskError as error:
        return str(error)
    return None


@pytest.mark.parametrize("values", REFUSED, ids=lambda values: ",".join(f"{k}={v}" for k, v in values.items()))
def test_properties_are_refused_in_qemus_words(values: dict[str, str]) -> None:
    option = "virtio-blk,drive=n," + ",".join(f"{name}={value}" for name, value in values.items())
    command = ["qemu-system-x86_64", "-M", "pc", "-nodefaults", "-display", "none", "-S"]
    command += ["-blockdev", "null-co,size=1048576,node-name=n", "-device", option]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 1
    message = done.stderr.splitlines()[0].partition(f"-device {option}: ")[2]
    assert refusal(values) == message


def test_placement_is_accepted_and_named_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        read_options({"driver": "virtio-blk-pci", "drive": "n", "addr": "06.0", "disable-legacy": "on"}, KEYVAL)
    assert "without effect here: addr, disable-legacy" in caplog.text


def test_every_property_of_qemus_device_is_known() -> None:
    done = subprocess.run(
        ["qemu-system-x86_64", "-device", "virtio-blk-pci,help"], capture_output=True, text=True, timeout=30, check=True
    )
    names = {line.strip().partition("=")[0] for line in done.stdout.splitlines()[1:]}
    # Experimental switches, and the backend, which is no property to be set.
    names = {name for name in names if not name.startswith("x-")} - {"virtio-backend"}
    for name in names:
        message = refusal({name: "\0"})
        assert message is None or "not found" not in message, name
    assert "serial" not in WITHOUT_EFFECT
    assert "bootindex" in WITHOUT_EFFECT


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"drive": "n"}, "Parameter 'driver' is missing"),
        ({"driver": "nope"}, "'nope' is not a valid device model name"),
        ({"driver": "scsi-hd", "drive": "n"}, "'scsi-hd' is not a valid device model name"),
        ({"driver": "virtio-blk", "logical_block_size": "4k"}, "Parameter 'logical_block_size' expects uint64"),
        ({"driver": "virtio-blk", "num-queues": 70000}, "Parameter 'num-queues' expects uint16_t"),
        ({"driver": "virtio-blk", "share-rw": "on"}, "Invalid parameter type for 'share-rw', expected: boolean"),
    ],
)
def test_device_add_checks_types_as_qmp_does(values: dict[str, Any], message: str) -> None:
    with pytest.raises(LiveDiskError) as caught:
        read_options(values, JSON)
    assert str(caught.value) == message
