"""throttle-group objects, and block_set_io_throttle, which gives a device limits.

The names of the limits: ``limits`` of an object is a ThrottleLimits; the older ``x-iops-total`` and so on can be given when it
is made. Limits of an object change with qom-set (``qom_commands.py``). A device is named by its id or path. Source: QEMU
``qapi/block-core.json`` (ThrottleLimits, BlockIOThrottle), ``block/throttle-groups.c``; messages asked from QEMU 10.0.2.

Where we differ: ``id`` may be a device's own id; QEMU 10 wants the path of its backend, /machine/peripheral/ID/virtio-backend.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from livedisk.emulator.block.throttle import Bucket, Limit, Limits, ThrottleGroup, ThrottleGroups
from livedisk.emulator.errors import BlockError, DeviceNotFound, LiveDiskError
from livedisk.emulator.qmp.context import Context
from livedisk.emulator.qmp.object_commands import ObjectOptions, Objects, object_type
from livedisk.emulator.qmp.qapi import UNSET, QapiStruct, UnsetType
from livedisk.emulator.qmp.registry import command

_UINT_MAX: Final = 0xFFFFFFFF


class ThrottleLimits(QapiStruct):
    """Bytes and requests a second; lengths in seconds. What is absent stays as it is."""

    iops_total: int | UnsetType = UNSET
    iops_total_max: int | UnsetType = UNSET
    iops_total_max_length: int | UnsetType = UNSET
    iops_read: int | UnsetType = UNSET
    iops_read_max: int | UnsetType = UNSET
    iops_read_max_length: int | UnsetType = UNSET
    iops_write: int | UnsetType = UNSET
    iops_write_max: int | UnsetType = UNSET
    iops_write_max_length: int | UnsetType = UNSET
    bps_total: int | UnsetType = UNSET
    bps_total_max: int | UnsetType = UNSET
    bps_total_max_length: int | UnsetType = UNSET
    bps_read: int | UnsetType = UNSET
    bps_read_max: int | UnsetType = UNSET
    bps_read_max_length: int | UnsetType = UNSET
    bps_write: int | UnsetType = UNSET
    bps_write_max: int | UnsetType = UNSET
    bps_write_max_length: int | UnsetType = UNSET
    iops_size: int | UnsetType = UNSET

    @classmethod
    def of(cls, limits: Limits) -> ThrottleLimits:
        """All of them."""
        members: dict[str, int] = {"iops_size": limits.iops_size}
        for bucket in Bucket:
            name = bucket.replace("-", "_")
            limit = limits[bucket]
            members |= {name: limit.average, f"{name}_max": limit.maximum, f"{name}_max_length": limit.length}
        return cls(**members)

    def over(self, before: Limits) -> Limits:
        """The limits that these make of ``before``. Raises LiveDiskError if a length cannot be one."""
        found = {}
        for bucket in Bucket:
            old = before[bucket]
            average, maximum = self._pick(bucket, "", old.average), self._pick(bucket, "_max", old.maximum)
            length = self._pick(bucket, "_max_length", old.length)
            if length > _UINT_MAX:
                raise LiveDiskError(f"{bucket}-max-length value must be in the range [0, {_UINT_MAX}]")
            found[bucket] = Limit(average, maximum, length & _UINT_MAX)
        size = self.iops_size if isinstance(self.iops_size, int) else before.iops_size
        return Limits(found, size)

    def _pick(self, bucket: Bucket, suffix: str, otherwise: int) -> int:
        value = getattr(self, bucket.replace("-", "_") + suffix)
        return value if isinstance(value, int) else otherwise


class ThrottleGroupProperties(ObjectOptions, kw_only=True):
    """``limits``, and under the names of before QEMU 2.11, the same one by one."""

    limits: ThrottleLimits | UnsetType = UNSET
    x_iops_total: int | UnsetType = UNSET
    x_iops_total_max: int | UnsetType = UNSET
    x_iops_total_max_length: int | UnsetType = UNSET
    x_iops_read: int | UnsetType = UNSET
    x_iops_read_max: int | UnsetType = UNSET
    x_iops_read_max_length: int | UnsetType = UNSET
    x_iops_write: int | UnsetType = UNSET
    x_iops_write_max: int | UnsetType = UNSET
    x_iops_write_max_length: int | UnsetType = UNSET
    x_bps_total: int | UnsetType = UNSET
    x_bps_total_max: int | UnsetType = UNSET
    x_bps_total_max_length: int | UnsetType = UNSET
    x_bps_read: int | UnsetType = UNSET
    x_bps_read_max: int | UnsetType = UNSET
    x_bps_read_max_length: int | UnsetType = UNSET
    x_bps_write: int | UnsetType = UNSET
    x_bps_write_max: int | UnsetType = UNSET
    x_bps_write_max_length: int | UnsetType = UNSET
    x_iops_size: int | UnsetType = UNSET


@object_type("throttle-group", ThrottleGroupProperties)
def make_throttle_group(options: ThrottleGroupProperties) -> ThrottleGroup:
    """Raises LiveDiskError if the limits contradict each other."""
    old = {
        name.removeprefix("x_"): getattr(options, name)
        for name in ThrottleGroupProperties.__struct_fields__
        if name.startswith("x_")
    }
    for name, value in old.items():
        if isinstance(value, int) and value < 0:
            raise LiveDiskError("Property values cannot be negative")
        if name.endswith("_length") and isinstance(value, int) and value > _UINT_MAX:
            raise LiveDiskError(f"x-{name.replace('_', '-')} value must be in therange [0, {_UINT_MAX}]")
    limits = ThrottleLimits(**old).over(Limits())
    if isinstance(options.limits, ThrottleLimits):
        limits = options.limits.over(limits)
    limits.check()
    return ThrottleGroup(options.id, limits)


def connect(groups: ThrottleGroups, objects: Objects) -> None:
    """Let the graph find groups that users made, and users make none of a name that a device's group has."""

    def check(made: Any) -> None:
        if isinstance(made, ThrottleGroup) and any(group.name == made.name for group in groups):
            raise LiveDiskError("A group with this name already exists")

    groups.named = lambda name: objects.find(name, ThrottleGroup)
    objects.before_add.append(check)


class ThrottleGroupQom:
    """The properties of a group, for qom-get and qom-set."""

    @staticmethod
    def names() -> dict[str, str]:
        """Property and type."""
        single = {f"x-{name.replace('_', '-')}": "int" for name in ThrottleLimits.__struct_fields__}
        return {"limits": "ThrottleLimits", **single}

    @staticmethod
    def get(group: ThrottleGroup, name: str) -> Any:
        """The value of a property that `names` has."""
        limits = ThrottleLimits.of(group.limits)
        if name == "limits":
            return msgspec.to_builtins(limits)
        return getattr(limits, name.removeprefix("x-").replace("-", "_"))

    @staticmethod
    def set(group: ThrottleGroup, name: str, value: ThrottleLimits | None) -> None:
        """Change the limits; the single ones only are given when the object is made. Raises LiveDiskError."""
        if value is None:
            raise LiveDiskError("Property cannot be set after initialization")
        group.set_limits(value.over(group.limits))


# -- a device's limits -------------------------------------------------------------------------------------------------
def _field(name: str) -> Any:
    return msgspec.field(default=UNSET, name=name)


class BlockIOThrottle(QapiStruct, kw_only=True):
    """QEMU's BlockIOThrottle. ``group``: the devices of one group share its limits; without it the device's own."""

    device: str | UnsetType = UNSET
    id: str | UnsetType = UNSET
    bps: int
    bps_rd: int = msgspec.field(name="bps_rd")
    bps_wr: int = msgspec.field(name="bps_wr")
    iops: int
    iops_rd: int = msgspec.field(name="iops_rd")
    iops_wr: int = msgspec.field(name="iops_wr")
    bps_max: int | UnsetType = _field("bps_max")
    bps_rd_max: int | UnsetType = _field("bps_rd_max")
    bps_wr_max: int | UnsetType = _field("bps_wr_max")
    iops_max: int | UnsetType = _field("iops_max")
    iops_rd_max: int | UnsetType = _field("iops_rd_max")
    iops_wr_max: int | UnsetType = _field("iops_wr_max")
    bps_max_length: int | UnsetType = _field("bps_max_length")
    bps_rd_max_length: int | UnsetType = _field("bps_rd_max_length")
    bps_wr_max_length: int | UnsetType = _field("bps_wr_max_length")
    iops_max_length: int | UnsetType = _field("iops_max_length")
    iops_rd_max_length: int | UnsetType = _field("iops_rd_max_length")
    iops_wr_max_length: int | UnsetType = _field("iops_wr_max_length")
    iops_size: int | UnsetType = _field("iops_size")
    group: str | UnsetType = UNSET

    def limits(self) -> Limits:
        """As `Limits`; what is absent is no limit."""
        names = {"bps": Bucket.BPS_TOTAL, "iops": Bucket.IOPS_TOTAL}
        names |= {"bps_rd": Bucket.BPS_READ, "bps_wr": Bucket.BPS_WRITE}
        names |= {"iops_rd": Bucket.IOPS_READ, "iops_wr": Bucket.IOPS_WRITE}
        found = {}
        for name, bucket in names.items():
            maximum, length = getattr(self, f"{name}_max"), getattr(self, f"{name}_max_length")
            found[bucket] = Limit(
                getattr(self, name),
                maximum if isinstance(maximum, int) else 0,
                length & _UINT_MAX if isinstance(length, int) else 1,
            )
        return Limits(found, self.iops_size if isinstance(self.iops_size, int) else 0)


@command("block_set_io_throttle", allow_preconfig=True)
async def block_set_io_throttle(ctx: Context, args: BlockIOThrottle) -> None:
    """Limit a device, from now on; all limits 0: end that."""
    if (args.device is UNSET) is (args.id is UNSET):
        raise BlockError("Need exactly one of 'device' and 'id'")
    name = args.id if isinstance(args.id, str) else args.device
    assert isinstance(name, str)
    device = ctx.daemon.devices.drives.find(name) or ctx.daemon.devices.find(name)
    if device is None:
        raise DeviceNotFound(f"Device '{name}' not found")
    limits = args.limits()
    limits.check()
    backend, groups = device.backend, ctx.daemon.graph.throttle_groups
    if not limits.any:
        backend.set_throttle(None)
    else:
        if isinstance(args.group, str):
            backend.set_throttle(groups.obtain(args.group))
        elif backend.throttle is None:
            backend.set_throttle(groups.obtain(name))
        assert backend.throttle is not None
        backend.throttle.group.set_limits(limits)
    groups.tidy()
