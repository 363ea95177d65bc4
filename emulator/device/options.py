"""The properties of a virtio-blk device, typed once, under the names that QEMU's ``-device virtio-blk-pci,help`` gives.

`DeviceOptions` holds them all: those with a meaning here, and those that place the device on a bus or tune a ring that
it does not have. The latter are taken, so that existing command lines run, and each is named once in the log
(`without_effect`). Anything else is QEMU's error ``Property 'virtio-blk-pci.x' not found``.

`check` holds the rules between values, in QEMU's order and words. Source: QEMU 10.0.2, asked; ``hw/block/block.c``
(blkconf_blocksizes, blkconf_geometry), ``hw/block/virtio-blk.c`` (virtio_blk_device_realize).
"""

from __future__ import annotations

import enum
import logging
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from livedisk.emulator.device.policy import OnError
from livedisk.emulator.device.spec import SECTOR
from livedisk.emulator.errors import LiveDiskError, ParameterError
from livedisk.emulator.qmp.qapi import UNSET, Int32, QapiStruct, Size, UInt16, UInt32, UnsetType
from livedisk.emulator.qmp.visit import Syntax, visit

log = logging.getLogger(__name__)

MODELS: Final = {"virtio-blk-pci": "virtio-blk-pci", "virtio-blk": "virtio-blk-pci"}
"""Names that ``driver`` takes, and the model each stands for."""

MAX_SECTORS: Final = 0x7FFFFFFF >> 9
"""Sectors in one request at most (QEMU BDRV_REQUEST_MAX_SECTORS)."""
MAX_BLOCK: Final = 2 << 20
MAX_QUEUES: Final = 1023
"""VIRTIO_QUEUE_MAX less the configuration vector."""
DEFAULT_GRANULARITY: Final = 0xFFFFFFFF

_Str = str | UnsetType
_Bool = bool | UnsetType


class OnOffAuto(enum.StrEnum):
    """QEMU's OnOffAuto."""

    AUTO = "auto"
    ON = "on"
    OFF = "off"


def _named(name: str, default: Any) -> Any:
    return msgspec.field(name=name, default=default)


class DeviceError(LiveDiskError):
    """A device was refused."""


class DeviceOptions(QapiStruct):
    """Every property. Sizes are bytes; ``*_sectors`` are of 512 bytes."""

    driver: str
    id: _Str = UNSET

    drive: _Str = UNSET
    """Name of the node that the device is put on."""
    serial: _Str = UNSET
    """GET_ID's answer; what is longer than 20 bytes is cut off, as QEMU does."""
    logical_block_size: Size = _named("logical_block_size", 0)
    """0: 512."""
    physical_block_size: Size = _named("physical_block_size", 0)
    """0: the logical block size."""
    min_io_size: Size = _named("min_io_size", 0)
    opt_io_size: Size = _named("opt_io_size", 0)
    discard_granularity: Size = _named("discard_granularity", DEFAULT_GRANULARITY)
    """The default stands for the logical block size."""
    write_cache: OnOffAuto = OnOffAuto.AUTO
    """Off: every write is on stable storage before it is acknowledged. Auto is on."""
    config_wce: bool = True
    """The driver may switch the write cache in the config space."""
    share_rw: bool = False
    """Others may write to the node at the same time."""
    rerror: OnError = OnError.AUTO
    werror: OnError = OnError.AUTO
    account_invalid: OnOffAuto = OnOffAuto.AUTO
    account_failed: OnOffAuto = OnOffAuto.AUTO
    cyls: UInt32 = 0
    heads: UInt32 = 0
    secs: UInt32 = 0
    discard: bool = True
    """Offer DISCARD to the guest."""
    write_zeroes: bool = True
    """Offer WRITE_ZEROES to the guest."""
    max_discard_sectors: UInt32 = MAX_SECTORS
    max_write_zeroes_sectors: UInt32 = MAX_SECTORS
    report_discard_granularity: bool = True
    queue_size: UInt16 = 256
    seg_max_adjust: bool = True
    num_queues: UInt16 = 0xFFFF
    """The default stands for 1: there is no machine whose CPUs would each want one."""

    iothread: _Str = UNSET
    bus: _Str = UNSET
    addr: _Str = UNSET
    bootindex: Int32 | UnsetType = UNSET
    iothread_vq_mapping: list[Any] | UnsetType = UNSET
    backend_defaults: OnOffAuto | UnsetType = _named("backend_defaults", UNSET)
    request_merging: _Bool = UNSET
    lcyls: UInt32 | UnsetType = UNSET
    lheads: UInt32 | UnsetType = UNSET
    lsecs: UInt32 | UnsetType = UNSET
    vectors: UInt32 | UnsetType = UNSET
    disable_legacy: OnOffAuto | UnsetType = UNSET
    disable_modern: _Bool = UNSET
    acpi_index: UInt32 | UnsetType = UNSET
    aer: _Bool = UNSET
    any_layout: _Bool = _named("any_layout", UNSET)
    ats: _Bool = UNSET
    busnr: _Str = UNSET
    device_class: UInt32 | UnsetType = _named("class", UNSET)
    event_idx: _Bool = _named("event_idx", UNSET)
    failover_pair_id: _Str = _named("failover_pair_id", UNSET)
    in_order: _Bool = _named("in_order", UNSET)
    indirect_desc: _Bool = _named("indirect_desc", UNSET)
    ioeventfd: _Bool = UNSET
    iommu_platform: _Bool = _named("iommu_platform", UNSET)
    migrate_extra: _Bool = UNSET
    modern_pio_notify: _Bool = UNSET
    multifunction: _Bool = UNSET
    notify_on_empty: _Bool = _named("notify_on_empty", UNSET)
    packed: _Bool = UNSET
    page_per_vq: _Bool = UNSET
    queue_reset: _Bool = _named("queue_reset", UNSET)
    rombar: Int32 | UnsetType = UNSET
    romfile: _Str = UNSET
    romsize: UInt32 | UnsetType = UNSET
    use_disabled_flag: _Bool = UNSET
    use_started: _Bool = UNSET
    virtio_pci_bus_master_bug_migration: _Bool = UNSET


_FIELDS: Final = msgspec.structs.fields(DeviceOptions)
_FIRST_PLACED: Final = next(index for index, info in enumerate(_FIELDS) if info.name == "iothread")
PROPERTIES: Final = frozenset(info.encode_name for info in _FIELDS)
"""Every name that is taken."""
WITHOUT_EFFECT: Final = frozenset(info.encode_name for info in _FIELDS[_FIRST_PLACED:])
"""Properties from ``iothread`` on: placement on a bus and details of rings."""


def model_of(values: Mapping[str, Any]) -> str:
    """The model that ``driver`` names. Raises ParameterError or `DeviceError`."""
    driver = values.get("driver")
    if driver is None:
        raise ParameterError("Parameter 'driver' is missing")
    if not isinstance(driver, str):
        raise ParameterError("Invalid parameter type for 'driver', expected: string")
    try:
        return MODELS[driver]
    except KeyError:
        known = ", ".join(sorted(MODELS))
        raise DeviceError(f"'{driver}' is not a valid device model name", hint=f"Known models: {known}") from None


def read_options(values: Mapping[str, Any], syntax: Syntax) -> DeviceOptions:
    """Typed properties from parsed JSON or key=value.

    Raises ParameterError (missing driver, wrong type) or `DeviceError` (unknown model or property), in QEMU's words.
    """
    model = model_of(values)
    for name in values:
        if name not in PROPERTIES:
            raise DeviceError(f"Property '{model}.{name}' not found")
    options = visit(DeviceOptions, dict(values), syntax)
    ignored = sorted(WITHOUT_EFFECT & values.keys())
    if ignored:
        log.info("device %s: without effect here: %s", options.id or options.driver, ", ".join(ignored))
    return options


def check(options: DeviceOptions) -> None:
    """Raise `DeviceError` where values do not fit each other, or are out of their range."""
    _check_queues(options)
    _check_blocks(options)
    if options.discard:
        _check_sectors("max-discard-sectors", options.max_discard_sectors)
    if options.write_zeroes:
        _check_sectors("max-write-zeroes-sectors", options.max_write_zeroes_sectors)
    _check_geometry(options)
    if options.disable_modern is True and options.disable_legacy == OnOffAuto.ON:
        raise DeviceError(
            "device cannot work as neither modern nor legacy mode is enabled",
            hint="Set either disable-modern or disable-legacy to off",
        )


def _check_queues(options: DeviceOptions) -> None:
    if options.num_queues == 0:
        raise DeviceError("num-queues property must be larger than 0")
    if options.num_queues != 0xFFFF and options.num_queues > MAX_QUEUES:
        # QEMU 10.0.2 aborts here.
        raise DeviceError(f"invalid num-queues property ({options.num_queues}), must be at most {MAX_QUEUES}")
    size = options.queue_size
    if size <= 2:
        raise DeviceError(f"invalid queue-size property ({size}), must be > 2")
    if size & (size - 1) or size > 1024:
        raise DeviceError(f"invalid queue-size property ({size}), must be a power of 2 (max 1024)")


def _check_blocks(options: DeviceOptions) -> None:
    for name in ("logical_block_size", "physical_block_size"):
        value = getattr(options, name)
        if value and (value & (value - 1) or not SECTOR <= value <= MAX_BLOCK):
            raise DeviceError(f"parameter {name} must be a power of 2 between {SECTOR} and {MAX_BLOCK}")
    for name in ("min_io_size", "opt_io_size", "discard_granularity"):
        value = getattr(options, name)
        if value > 0xFFFFFFFF:
            raise DeviceError(f"Property virtio-blk-device.{name} doesn't take value {value} (maximum: 4294967295)")
    logical, physical = block_sizes(options)
    if logical > physical:
        raise DeviceError("logical_block_size > physical_block_size not supported")
    if options.min_io_size % logical:
        raise DeviceError("min_io_size must be a multiple of logical_block_size")
    if options.min_io_size // logical > 0xFFFF:
        raise DeviceError("min_io_size must not exceed 65535 logical blocks")
    if options.opt_io_size % logical:
        raise DeviceError("opt_io_size must be a multiple of logical_block_size")
    if options.discard_granularity != DEFAULT_GRANULARITY and options.discard_granularity % logical:
        raise DeviceError("discard_granularity must be a multiple of logical_block_size")


def _check_sectors(name: str, value: int) -> None:
    if not 1 <= value <= MAX_SECTORS:
        raise DeviceError(f"invalid {name} property ({value}), must be between 1 and {MAX_SECTORS}")


def _check_geometry(options: DeviceOptions) -> None:
    if not (options.cyls or options.heads or options.secs):
        return  # guessed
    for name, most in (("cyls", 65535), ("heads", 255), ("secs", 255)):
        if not 1 <= getattr(options, name) <= most:
            raise DeviceError(f"{name} must be between 1 and {most}")


def block_sizes(options: DeviceOptions) -> tuple[int, int]:
    """Logical and physical block size, bytes, with the defaults filled in (512 each)."""
    return options.logical_block_size or SECTOR, options.physical_block_size or SECTOR
