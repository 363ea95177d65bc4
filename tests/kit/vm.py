"""A virtual machine with Debian's cloud kernel, driven through its serial console.

The guest is as small as a guest can be and still be real: Debian's kernel with its own virtio and ext4 modules,
busybox, and e2fsprogs with the libraries it needs, all in an initramfs that is built here. It boots under TCG in
some seconds, on any machine. Its one disk is ``/dev/vda``, a virtio-blk device that QEMU backs with an NBD export.

The console is QEMU's standard input and output. A command is typed, followed by one that prints a marker with the
exit code; what the guest printed before the marker is the command's output. So a command may run for as long as its
time limit says while the test does something else (`VirtualMachine.begin`).
"""

from __future__ import annotations

import atexit
import functools
import gzip
import lzma
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from kit.peers import DOWNLOADS, peer, run
from kit.process import Process, ProcessFailed

WANTED_MODULES: Final = ("virtio_pci", "virtio_blk", "crc32c_generic", "ext4")
"""What the guest needs; what these depend on is read from the modules. Built-in ones are left out."""

_E2FSPROGS: Final = ("mke2fs", "e2fsck")

_READY: Final = "kit-guest-is-ready"

_INIT: Final = f"""\
#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /mnt /tmp /run
/bin/busybox --install -s /bin
export PATH=/bin:/sbin HOME=/
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
ln -sf /proc/mounts /etc/mtab
while read module; do
    insmod "/modules/$module" || echo "cannot load $module"
done < /modules/order
exec 0</dev/ttyS0 1>/dev/ttyS0 2>&1
stty -F /dev/ttyS0 -echo -onlcr
# The shell takes itself for a person's and greets; what it reads first makes it quiet and says that it listens.
echo 'PS1= PS2=; echo {_READY}' >/etc/shell
ENV=/etc/shell exec setsid sh
"""


class GuestFailed(AssertionError):
    """A command in the guest failed or did not end in time. The text has its output and the console's last lines."""


class Pending:
    """A command that runs in the guest."""

    def __init__(self, machine: VirtualMachine, command: str, start: int, number: int) -> None:
        self._machine = machine
        self._command = command
        self._start = start
        self._marker = re.compile(rf"kit-{number}-exit-(\d+)\n")

    def output(self) -> str:
        """What it has printed so far."""
        text = self._machine.output()[self._start :]
        found = self._marker.search(text)
        return text[: found.start()] if found else text

    def wait(self, *, timeout: float = 60) -> str:
        """Wait for its end and return its output. Raises `GuestFailed` on an exit code other than 0."""
        found: re.Match[str] = self._machine.wait_until(
            lambda: self._marker.search(self._machine.output(), self._start),
            f"end of {self._command!r}",
            timeout=timeout,
        )
        if found.group(1) != "0":
            raise GuestFailed(f"{self._command!r} ended with {found.group(1)} in the guest:\n{self.output()}")
        return self.output()

    def wait_for(self, text: str, *, timeout: float = 60) -> None:
        """Wait until it has printed ``text``."""
        self._machine.wait_until(lambda: text in self.output(), f"{self._command!r} printing {text!r}", timeout=timeout)


class VirtualMachine(Process):
    """A running guest whose ``/dev/vda`` is the NBD export ``export`` of the server at the Unix socket
    ``nbd_socket``.

    ``folder`` takes the console's log. The machine has booted when the constructor returns.
    """

    def __init__(
        self, folder: Path, nbd_socket: Path, *, export: str = "", name: str = "vm", boot_timeout: float = 120
    ) -> None:
        self._boot_timeout = boot_timeout
        self._commands = 0
        disk = f"driver=nbd,node-name=disk,server.type=unix,server.path={nbd_socket},export={export},discard=unmap"
        super().__init__(
            [
                *(
                    peer("qemu-system-x86_64"),
                    "-accel",
                    "tcg",
                    "-M",
                    "q35",
                    "-m",
                    "256",
                    "-nodefaults",
                    "-display",
                    "none",
                ),
                *("-kernel", str(kernel()), "-initrd", str(initramfs())),
                *("-append", "console=ttyS0 quiet loglevel=3 panic=-1 tsc=reliable"),
                *("-blockdev", disk, "-device", "virtio-blk-pci,drive=disk", "-serial", "stdio"),
            ],
            log=folder / f"{name}.log",
            stdin=subprocess.PIPE,
        )
        try:
            self._wait_for_boot(0)
        except BaseException:
            self.kill()
            raise

    def _wait_for_boot(self, start: int) -> None:
        self.wait_until(lambda: _READY in self.output()[start:], "boot", timeout=self._boot_timeout)
        # What is typed while the shell takes the terminal over may be lost: it listens when it has answered.
        deadline = time.monotonic() + self._boot_timeout
        while True:
            asked = self.begin("true")
            try:
                asked.wait(timeout=5)
                return
            except ProcessFailed:
                if time.monotonic() > deadline or not self.running:
                    raise

    def begin(self, command: str) -> Pending:
        """Start a shell command (several lines are fine) and do not wait for it."""
        assert self.child.stdin is not None
        self._commands += 1
        start = len(self.output())
        self.child.stdin.write(f"{command}\necho kit-{self._commands}-exit-$?\n".encode())
        self.child.stdin.flush()
        return Pending(self, command, start, self._commands)

    def do(self, command: str, *, timeout: float = 60) -> str:
        """Run a shell command in the guest; returns its output. Raises `GuestFailed`."""
        return self.begin(command).wait(timeout=timeout)

    def reboot(self) -> None:
        """Reset the guest and wait until it is up again. File systems are to be unmounted before."""
        start = len(self.output())
        self.begin("reboot -f")
        self._wait_for_boot(start)

    def power_off(self) -> None:
        """End the guest in order; QEMU ends with it."""
        self.begin("poweroff -f")
        self.wait(timeout=60)


def kernel() -> Path:
    """Debian's kernel, which ``scripts/test`` downloads and unpacks; fails the test if it is not there."""
    path = DOWNLOADS / "kernel" / "vmlinuz"
    if not path.exists():
        pytest.fail(
            f"{path} is missing (Debian's package linux-image-cloud-amd64, unpacked): run scripts/test --setup-only",
            pytrace=False,
        )
    return path


@functools.cache
def initramfs() -> Path:
    """The guest's file system, built once per test process."""
    folder = Path(tempfile.mkdtemp(prefix="ldvm", dir="/tmp"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    root = folder / "root"
    for name in ("bin", "sbin", "modules", "etc"):
        (root / name).mkdir(parents=True)
    shutil.copy(peer("busybox"), root / "bin" / "busybox")
    (root / "init").write_text(_INIT)
    (root / "init").chmod(0o755)
    for name in _E2FSPROGS:
        _copy_with_libraries(Path(peer(name)), root)
    (root / "sbin" / "mkfs.ext4").symlink_to("mke2fs")
    order = []
    for path in _modules_in_order(DOWNLOADS / "kernel"):
        name = path.name.partition(".")[0] + ".ko"
        (root / "modules" / name).write_bytes(_decompressed(path))
        order.append(name)
    (root / "modules" / "order").write_text("".join(f"{name}\n" for name in order))
    names = "".join(f"{path.relative_to(root)}\n" for path in sorted(root.rglob("*")))
    archive = subprocess.run(
        [peer("cpio"), "--quiet", "-o", "-H", "newc", "-R", "0:0"],
        cwd=root,
        input=names.encode(),
        stdout=subprocess.PIPE,
        check=True,
    )
    made = folder / "initramfs.gz"
    made.write_bytes(gzip.compress(archive.stdout, compresslevel=1))
    shutil.rmtree(root)
    return made


def _copy_with_libraries(program: Path, root: Path) -> None:
    """Copy a program to ``/sbin`` and the libraries it is linked with to where the loader looks for them."""
    shutil.copy(program, root / "sbin" / program.name)
    for found in re.finditer(r"(/\S+) \(0x", run(["ldd", program]).stdout):
        library = Path(found.group(1))
        target = root / library.relative_to("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(library, target)


def _modules_in_order(kernel_folder: Path) -> list[Path]:
    """The modules that are not built in, every one after those it depends on."""
    files = {_module_name(path): path for path in (kernel_folder / "modules").rglob("*.ko*")}
    built_in = {_module_name(Path(line)) for line in (kernel_folder / "modules.builtin").read_text().splitlines()}
    order: dict[str, Path] = {}

    def add(name: str) -> None:
        if name in built_in or name in order:
            return
        if name not in files:
            raise AssertionError(f"the kernel has no module {name}, neither built in nor in {kernel_folder}")
        for dependency in _dependencies(_decompressed(files[name])):
            add(dependency)
        order[name] = files[name]

    for name in WANTED_MODULES:
        add(name)
    return list(order.values())


def _module_name(path: Path) -> str:
    return path.name.partition(".")[0].replace("-", "_")


def _dependencies(module: bytes) -> Iterator[str]:
    """What a module's ``.modinfo`` says that it needs."""
    for found in re.finditer(rb"\0?depends=([^\0]*)\0", module):
        yield from (name.replace("-", "_") for name in found.group(1).decode().split(",") if name)


def _decompressed(path: Path) -> bytes:
    """A module's bytes; Debian ships them plain (12) or with xz (13)."""
    data = path.read_bytes()
    return lzma.decompress(data) if path.suffix == ".xz" else data


def debugfs(image: Path, request: str) -> str:
    """Ask e2fsprogs' debugfs about an ext4 image; nothing is mounted and nobody needs to be root."""
    return run([_sibling("debugfs"), "-R", request, image]).stdout


def e2fsck(image: Path) -> None:
    """Replay the journal of an ext4 image and check it: fails if anything is wrong that a crash does not explain."""
    done = run([peer("e2fsck"), "-f", "-p", image], expect=None, timeout=120)
    # 1: repaired what a preen may repair, such as the journal's orphans; 4 and more: real damage.
    if done.returncode not in (0, 1):
        raise AssertionError(f"e2fsck {image}: exit code {done.returncode}\n{done.stdout}{done.stderr}")


def _sibling(name: str) -> str:
    return os.fspath(Path(peer("e2fsck")).with_name(name))
