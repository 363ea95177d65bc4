"""``livedisk img``: qemu-img's JSON and exit codes, on the corpus and on damage."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kit.qcow2_corpus import BY_NAME, make
from kit.qcow2_damage import Anatomy
from kit.qemu import qemu_img

MIB = 1 << 20


def img(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the command as a user does."""
    script = "import sys; from livedisk.emulator.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", script, "img", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def as_json(*arguments: str | Path) -> Any:
    done = img(*arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", ["v2", "v3-backing", "zstd", "data-file", "cluster-4096"])
def test_map_info_and_check_are_qemu_imgs(name: str, tmp_path: Path) -> None:
    path = make(BY_NAME[name], tmp_path).path
    assert as_json("map", "--output=json", path) == json.loads(qemu_img("map", "--output=json", path))
    assert as_json("check", "--output=json", path) == json.loads(qemu_img("check", "--output=json", path))
    theirs = json.loads(qemu_img("info", "--output=json", path))
    ours = as_json("info", "--output=json", path)
    if name == "data-file":  # QEMU leaves the data file closed and so does not count it
        assert ours.pop("actual-size") >= theirs.pop("actual-size")
        assert ours["children"].pop()["name"] == "data-file"
    assert ours == theirs


def test_info_of_a_whole_chain(tmp_path: Path) -> None:
    path = make(BY_NAME["v3-backing"], tmp_path).path
    chain = as_json("info", "--output=json", "--backing-chain", path)
    assert [Path(info["filename"]).name for info in chain] == ["v3-backing.qcow2", "v3-backing.base.qcow2"]


def test_create_takes_qemu_imgs_options(tmp_path: Path) -> None:
    base, top = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    assert img("create", "-q", "-f", "qcow2", "-o", "cluster_size=4k,compat=0.10", base, "10M").stdout == ""
    assert img("create", "-b", "base.qcow2", "-F", "qcow2", top).returncode == 0
    info = json.loads(qemu_img("info", "--output=json", top))
    assert (info["virtual-size"], info["backing-filename"]) == (10 * MIB, "base.qcow2")
    assert json.loads(qemu_img("info", "--output=json", base))["cluster-size"] == 4096


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-o", "foo=1", "x", "1M"], "Invalid parameter 'foo'"),
        (["-o", "encrypt.format=luks", "x", "1M"], "'encrypt.format': encryption of qcow2 images is not supported"),
        (["-o", "size=2M", "x", "1M"], "The image size must be specified only once"),
        (["x"], "Image creation needs a size parameter"),
        (["x", "1X"], "Invalid image size specified: '1X'"),
        (["-o", "preallocation=some", "x", "1M"], "preallocation"),
        (["-o", "lazy_refcounts=maybe", "x", "1M"], "Parameter 'lazy_refcounts' expects 'on' or 'off'"),
        (["-b", "base", "x", "1M"], "Backing file specified without backing format"),
    ],
)
def test_create_refuses_and_makes_nothing(arguments: list[str], words: str, tmp_path: Path) -> None:
    arguments = [str(tmp_path / "x") if word == "x" else word for word in arguments]
    done = img("create", *arguments)
    assert done.returncode == 1
    assert words in done.stderr
    assert not (tmp_path / "x").exists()


def test_check_says_by_its_exit_code_what_is_wrong_and_repairs_it(tmp_path: Path) -> None:
    path = make(BY_NAME["v3"], tmp_path).path
    raw = bytearray(path.read_bytes())
    block = Anatomy(raw).blocks[0]
    raw[block + 2 * 100 : block + 2 * 101] = (7).to_bytes(2, "big")
    path.write_bytes(raw[: 120 << 16].ljust(120 << 16, b"\0"))
    assert img("check", path).returncode == 3
    raw[block : block + 2] = bytes(2)
    path.write_bytes(raw)
    assert img("check", path).returncode == 2
    done = img("check", "-r", "all", path)
    assert done.returncode == 0
    assert "No errors were found on the image." in done.stdout
    assert img("check", path).returncode == 0
    qemu_img("check", path)
    assert img("check", tmp_path / "missing").returncode == 1
    assert img("check", "-f", "raw", path).returncode == 63


def test_an_image_in_use_is_not_checked(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, "1M")
    with subprocess.Popen(["qemu-io", "-f", "qcow2", str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as user:
        assert user.stdin is not None
        assert user.stdout is not None
        user.stdin.write(b"length\n")
        user.stdin.flush()
        user.stdout.readline()
        done = img("check", path)
        shared = img("check", "-U", path)
        user.stdin.close()
        user.wait(10)
    assert done.returncode == 1
    assert "lock" in done.stderr
    assert shared.returncode == 0


def test_bitmaps_are_made_and_shown_as_by_qemu_img(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours.qcow2", tmp_path / "theirs.qcow2"
    for path, run in ((ours, img), (theirs, qemu_img)):
        img("create", "-q", path, "8M")
        img("create", "-q", f"{path}.other", "8M")
        run("bitmap", "--add", "-g", "4096", f"{path}.other", "far")
        run("bitmap", "--add", path, "one")
        run("bitmap", "--add", "--disable", "-g", "4096", path, "two words")
        run("bitmap", "--merge", "one", "--enable", path, "two words")
        run("bitmap", "--merge", "far", "-b", f"{path}.other", "-F", "qcow2", path, "one")
        run("bitmap", "--add", path, "gone")
        run("bitmap", "--clear", "--remove", path, "gone")
    shown = [json.loads(qemu_img("info", "--output=json", path))["format-specific"] for path in (ours, theirs)]
    assert shown[0] == shown[1]
    assert [one["name"] for one in shown[0]["data"]["bitmaps"]] == ["one", "two words"]
    assert as_json("info", "--output=json", ours)["format-specific"] == shown[0]
    people = img("info", ours).stdout
    assert people.rstrip("\n") in qemu_img("info", ours)
    assert as_json("check", "--output=json", ours) == json.loads(qemu_img("check", "--output=json", ours))


@pytest.mark.parametrize(
    "arguments",
    [
        ("--add", "IMAGE", "there"),
        ("--remove", "IMAGE", "z"),
        ("--clear", "IMAGE", "z"),
        ("--merge", "z", "IMAGE", "there"),
        ("--merge", "far", "-b", "OTHER", "IMAGE", "there"),
        ("--add", "-g", "1000", "IMAGE", "x"),
        ("IMAGE", "there"),
        ("--clear", "-g", "512", "IMAGE", "there"),
        ("--clear", "-b", "OTHER", "IMAGE", "there"),
    ],
)
def test_bitmaps_are_refused_as_by_qemu_img(arguments: tuple[str, ...], tmp_path: Path) -> None:
    path, other = tmp_path / "image.qcow2", tmp_path / "other.qcow2"
    for each, size, name in ((path, "8M", "there"), (other, "4M", "far")):
        img("create", "-q", each, size)
        qemu_img("bitmap", "--add", each, name)
    before = path.read_bytes()
    words = [{"IMAGE": str(path), "OTHER": str(other)}.get(word, word) for word in arguments]
    done = img("bitmap", *words)
    assert done.returncode in (1, 2)
    assert path.read_bytes() == before
    theirs = subprocess.run(["qemu-img", "bitmap", *words], capture_output=True, text=True, check=False)
    reason = theirs.stderr.strip().splitlines()[0].removeprefix("qemu-img: ")
    assert reason in done.stderr
