"""qcow2 images in every variant, made by qemu-img and qemu-io, with what a guest must read from them.

`CORPUS` lists the variants; `make` makes one in a folder and returns an `Image` whose ``content`` is the model: the guest's
bytes as qemu-io was told to write them. Making is deterministic, so a test may keep the images of one run.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from kit.qemu import qemu_img, qemu_io

KIB = 1024
MIB = 1 << 20


@dataclass(frozen=True)
class Variant:
    """One way to make an image. ``options``: qemu-img's ``-o``; ``size``: virtual size in bytes."""

    name: str
    options: str = ""
    size: int = 4 * MIB
    cluster_size: int = 64 * KIB
    compressed: bool = True
    """Some clusters are written compressed."""
    zeroes: bool = True
    """Zero clusters, plain and allocated (version 3)."""
    snapshots: bool = False
    """Two internal snapshots, with writes before, between and after."""
    bitmap: bool = False
    """A persistent dirty bitmap."""
    backing: bool = False
    """Over a backing file that is shorter than the image."""
    data_file: bool = False

    def __str__(self) -> str:
        return self.name


def _variants() -> list[Variant]:
    found = [
        Variant("v2", "compat=0.10", zeroes=False, snapshots=True),
        Variant("v3", bitmap=True),
        Variant("v3-snapshots", snapshots=True),
        Variant("v3-backing", backing=True),
        Variant("v2-backing", "compat=0.10", backing=True, zeroes=False),
        Variant("zstd", "compression_type=zstd", snapshots=True),
        Variant("lazy", "lazy_refcounts=on"),
        Variant("extended", "extended_l2=on,cluster_size=16k", cluster_size=16 * KIB, snapshots=True),
        Variant("extended-backing", "extended_l2=on", backing=True),
        Variant("data-file", "cluster_size=4k", cluster_size=4 * KIB, compressed=False, data_file=True),
        Variant("data-file-raw", "data_file_raw=on", compressed=False, data_file=True),
        Variant("preallocated", "preallocation=metadata", compressed=False),
        Variant("preallocated-full", "preallocation=full", size=MIB, compressed=False),
    ]
    for bits in range(9, 22):
        size = (1 << bits) * (300 if bits < 12 else 40 if bits < 17 else 16)
        found.append(Variant(f"cluster-{1 << bits}", f"cluster_size={1 << bits}", size, 1 << bits, bitmap=bits == 9))
    found += [
        Variant(f"refcount-{bits}", f"refcount_bits={bits},cluster_size=4k", MIB, 4 * KIB, snapshots=bits > 2)
        for bits in (1, 2, 4, 8, 32, 64)
    ]
    return found


CORPUS = _variants()
BY_NAME = {variant.name: variant for variant in CORPUS}


@dataclass
class Image:
    """A made image: where it is, and what a guest reads from it."""

    variant: Variant
    path: Path
    content: bytearray
    commands: list[str] = field(default_factory=list)

    def write(self, pattern: int, offset: int, length: int) -> None:
        """A plain write, to be made by `run`."""
        self.content[offset : offset + length] = bytes([pattern]) * length
        self.commands.append(f"write -P {pattern} {offset} {length}")

    def write_compressed(self, pattern: int, offset: int, length: int) -> None:
        self.content[offset : offset + length] = bytes([pattern]) * length
        self.commands.append(f"write -c -P {pattern} {offset} {length}")

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        self.content[offset : offset + length] = bytes(length)
        self.commands.append(f"write -z{' -u' if unmap else ''} {offset} {length}")

    def run(self) -> None:
        """Let qemu-io make all that was asked for since the last time."""
        qemu_io(self.path, *self.commands)
        self.commands.clear()


def make(variant: Variant, folder: Path) -> Image:
    """Make the variant's image (and its backing or data file) in ``folder``."""
    path = folder / f"{variant.name}.qcow2"
    cluster, size = variant.cluster_size, variant.size
    options = [variant.options] if variant.options else []
    arguments: list[str] = []
    content = bytearray(size)
    if variant.data_file:
        options.append(f"data_file={folder / (variant.name + '.data')}")
    if variant.backing:
        base = folder / f"{variant.name}.base.qcow2"
        length = size // 2 + 512
        qemu_img("create", "-q", "-f", "qcow2", str(base), str(length))
        qemu_io(base, f"write -P 200 0 {length}")
        content[:length] = bytes([200]) * length
        arguments = ["-b", str(base), "-F", "qcow2"]
    settings = ["-o", ",".join(options)] if options else []
    qemu_img("create", "-q", "-f", "qcow2", *settings, *arguments, str(path), str(size))
    image = Image(variant, path, content)
    _fill(image, cluster)
    if variant.snapshots:
        _snapshot(image, cluster)
    if variant.bitmap:
        qemu_img("bitmap", "--add", str(path), "b0")
        image.write(101, cluster // 2, cluster)
        image.run()
    return image


def _fill(image: Image, cluster: int) -> None:
    size = image.variant.size
    image.write(1, 0, cluster)
    image.write(2, cluster + 512 if cluster > 512 else cluster, cluster)  # two partial clusters
    image.write(3, size // 2 - 512, 1024)
    image.write(4, size - 512, 512)
    image.write(5, 5 * cluster, 2 * cluster)
    if image.variant.compressed:
        image.write_compressed(6, 3 * cluster, cluster)
        image.write_compressed(7, 4 * cluster, cluster)
    if image.variant.zeroes:
        image.write_zeroes(5 * cluster, cluster, unmap=False)
        image.write_zeroes(7 * cluster, cluster, unmap=True)
        image.write_zeroes(6 * cluster, cluster, unmap=True)
    image.run()


def _snapshot(image: Image, cluster: int) -> None:
    qemu_img("snapshot", "-c", "first", str(image.path))
    image.write(51, 0, 512)
    image.run()
    qemu_img("snapshot", "-c", "second snapshot", str(image.path))
    image.write(52, 2 * cluster, cluster)
    image.run()
