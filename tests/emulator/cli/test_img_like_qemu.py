"""``livedisk img`` beside qemu-img: the same command lines in two folders alike, and the same output, exit codes and images.

What an error says of opening an image may say more here; `MEANT` has the texts that differ on purpose.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any, Final

import pytest

from kit.livedisk import executable
from kit.peers import peer
from kit.qemu import create, qemu_img, qemu_io

MEANT: Final = (
    # Both say what; QEMU says "Could not open" once for each layer.
    (r"Could not open '[\w.]*': (?=Could not open)", ""),
    # QEMU's usage errors name the command and point to its help.
    (r"\nTry '.*' for more info", ""),
    (r"livedisk img: ", "qemu-img: "),
)

SCRIPTS: Final[dict[str, str]] = {
    "images by their options": """
info --image-opts driver=qcow2,file.filename=a.qcow2
info --image-opts file.filename=a.qcow2
info --object secret,id=s,data=x -b c.qcow2
check --image-opts driver=qcow2,file.filename=a.qcow2
map --image-opts --output json driver=qcow2,file.filename=c.qcow2
map --image-opts driver=raw,offset=64k,size=128k,file.filename=r.raw
compare --image-opts driver=qcow2,file.filename=a.qcow2 driver=qcow2,file.filename=copy.qcow2
convert --image-opts driver=raw,offset=512k,size=1M,file.filename=r.raw part.raw
convert --target-image-opts a.qcow2 driver=raw,file.filename=r.raw
convert -n --target-image-opts a.qcow2 driver=raw,file.driver=file,file.filename=r.raw
compare -F raw a.qcow2 r.raw
resize --image-opts driver=qcow2,file.filename=a.qcow2 8M
rebase --image-opts -b a.qcow2 -F qcow2 driver=qcow2,file.filename=c.qcow2
compare c.qcow2 was.qcow2
snapshot --image-opts -c one driver=qcow2,file.filename=a.qcow2
bitmap --image-opts --add -g 64k driver=qcow2,file.filename=a.qcow2 b
""",
    "an internal snapshot as the source": """
snapshot -c one a.qcow2
commit b.qcow2
convert -l one a.qcow2 o.raw
compare -F raw copy.qcow2 o.raw
convert -l 1 -O qcow2 -c a.qcow2 o.qcow2
compare copy.qcow2 o.qcow2
convert -l snapshot.name=one -n -O raw a.qcow2 o.raw
compare -F raw copy.qcow2 o.raw
convert -l snapshot.id=7 a.qcow2 o.raw
convert -l snapshot.zz=7 a.qcow2 o.raw
convert -l zz a.qcow2 o.raw
measure -O qcow2 -l one a.qcow2
measure -O qcow2 -l zz a.qcow2
""",
    "long names, caches and rates": """
create --quiet --format raw n.raw 1M
create --format qcow2 --options cluster_size=4k --backing a.qcow2 --backing-format qcow2 n.qcow2
convert --source-format qcow2 --output-format raw --source-cache none -t none a.qcow2 o.raw
convert -t directsync --oob-writes --parallel 4 --rate 1G a.qcow2 o.raw
compare --strict --b-format qcow2 --cache none a.qcow2 copy.qcow2
convert -T zz a.qcow2 o.raw
convert -r zz a.qcow2 o.raw
check --cache zz a.qcow2
check --quiet --cache none a.qcow2
check -q --output json a.qcow2
compare -T zz a.qcow2 a.qcow2
amend --cache zz -o lazy_refcounts=on a.qcow2
amend -p --cache writethrough -o lazy_refcounts=on a.qcow2
rebase -t zz -u -b '' c.qcow2
rebase -T zz -u -b '' c.qcow2
rebase -t writethrough --backing-cache none --force-share --backing '' c.qcow2
compare c.qcow2 was.qcow2
commit --cache zz b.qcow2
commit --cache none --rate 1G --drop b.qcow2
snapshot --list a.qcow2
map --format qcow2 --start-offset 1M --max-length 64k a.qcow2
""",
    "compare": """
compare a.qcow2 copy.qcow2
compare a.qcow2 b.qcow2
compare -s a.qcow2 b.qcow2
compare -s a.qcow2 copy.qcow2
compare -s -f raw -F raw r.raw holes.raw
compare -F raw a.qcow2 r.raw
compare -f raw -F raw r.raw long.raw
compare -s -f raw -F raw r.raw long.raw
compare -f raw -F raw r.raw longer.raw
compare -f raw -F raw longer.raw r.raw
compare -f raw -F raw a.qcow2 longer.raw
compare -q a.qcow2 b.qcow2
compare -q a.qcow2 copy.qcow2
compare a.qcow2 none.qcow2
compare -f raw none.raw a.qcow2
compare -U a.qcow2 copy.qcow2
compare -p -q a.qcow2 copy.qcow2
""",
    "map of nothing": """
map -f raw --output=json -s 1G r.raw
map -f raw -s 1G r.raw
""",
    "resize": """
resize a.qcow2 8M
resize a.qcow2 +1M
resize a.qcow2 -1M
resize --shrink a.qcow2 -1M
resize a.qcow2 4M
resize --shrink a.qcow2 4M
resize --preallocation=full a.qcow2 +1M
resize --preallocation=metadata a.qcow2 +1M
resize --preallocation=falloc a.qcow2 +1M
resize --preallocation=foo a.qcow2 +1M
resize --preallocation=full --shrink a.qcow2 1M
resize a.qcow2 foo
resize a.qcow2 +foo
resize a.qcow2 0
resize --shrink a.qcow2 -100M
resize --shrink a.qcow2 1M
resize -q -f raw r.raw 9M
resize -f raw --shrink r.raw 1000
resize -f raw r.raw 1M
resize -f raw none.raw 1M
resize b.qcow2 1G
""",
    "commit": """
commit b.qcow2
commit -q b.qcow2
commit a.qcow2
commit c.qcow2
commit -f raw r.raw
commit -b zz c.qcow2
""",
    "commit, kept": """
commit -d b.qcow2
""",
    "commit, further down": """
commit -b a.qcow2 c.qcow2
compare a.qcow2 c.qcow2
""",
    "commit into a smaller one": """
resize b.qcow2 8M
commit b.qcow2
""",
    "rebase": """
rebase c.qcow2
rebase -b a.qcow2 c.qcow2
rebase -b a.qcow2 -F foo c.qcow2
rebase -b none.qcow2 -F qcow2 c.qcow2
rebase -b a.qcow2 -F qcow2 c.qcow2
compare c.qcow2 was.qcow2
rebase -b r.raw -F raw c.qcow2
compare c.qcow2 was.qcow2
rebase -b short.qcow2 -F qcow2 c.qcow2
compare c.qcow2 was.qcow2
rebase -b '' c.qcow2
compare c.qcow2 was.qcow2
rebase -u -b zz -F qcow2 c.qcow2
rebase -b a.qcow2 -F qcow2 c.qcow2
rebase -u -b a.qcow2 c.qcow2
rebase -u -b a.qcow2 -F qcow2 c.qcow2
compare c.qcow2 was.qcow2
rebase -q -u -b '' -f qcow2 c.qcow2
""",
    "rebase, compressed": """
rebase -c -b '' c.qcow2
compare c.qcow2 was.qcow2
""",
    "measure": """
measure a.qcow2
measure -O qcow2 a.qcow2
measure -O qcow2 --size 1G
measure --size 1G
measure -O qcow2 -o cluster_size=4k,refcount_bits=1 --size 1T
measure -O qcow2 -o preallocation=full --size 1G
measure -O qcow2 -o preallocation=metadata --size 1G
measure -O qcow2 -o extended_l2=on --size 10G
measure -O qcow2 -o compat=0.10 a.qcow2
measure
measure --size 1G a.qcow2
measure -O foo --size 1M
measure -O qcow2 c.qcow2
measure -O qcow2 -o cluster_size=512 c.qcow2
measure -O qcow2 -o cluster_size=2M c.qcow2
measure -O raw c.qcow2
measure -O qcow2 -f raw r.raw
measure -O qcow2 -f raw holes.raw
measure -O qcow2 bits.qcow2
measure -O qcow2 -o cluster_size=512 bits.qcow2
measure -O qcow2 -o backing_file=a.qcow2,backing_fmt=qcow2 b.qcow2
""",
    "convert": """
convert a.qcow2 o.raw
convert -O qcow2 c.qcow2 o1.qcow2
compare c.qcow2 o1.qcow2
convert -n -O raw c.qcow2 o.raw
compare -F raw c.qcow2 o.raw
convert -n -O qcow2 a.qcow2 none.qcow2
convert -c -O qcow2 c.qcow2 o2.qcow2
convert -c -O raw c.qcow2 o2.raw
convert none.qcow2 o
convert -O foo a.qcow2 o
convert -f raw -O qcow2 -o cluster_size=4k r.raw o3.qcow2
convert -f raw -O qcow2 holes.raw o4.qcow2
convert -f raw -O qcow2 -S 0 holes.raw o5.qcow2
convert -S 100 a.qcow2 o7.raw
convert -m 0 -W a.qcow2 o7.raw
convert -n -O raw a.qcow2 short.raw
convert --target-is-zero -O raw a.qcow2 o7.raw
convert -n -o size=1 -O raw a.qcow2 o.raw
convert -O qcow2 -B a.qcow2 -F qcow2 b.qcow2 o8.qcow2
compare b.qcow2 o8.qcow2
convert -c -O qcow2 -o cluster_size=512k -B a.qcow2 -F qcow2 b.qcow2 o9.qcow2
compare b.qcow2 o9.qcow2
convert -O qcow2 -B a.qcow2 b.qcow2 o10.qcow2
convert -C -S 4k a.qcow2 o13.raw
convert -C c.qcow2 o14.raw
convert -O qcow2 -S 4k -W -m 4 c.qcow2 o15.qcow2
convert --bitmaps -O qcow2 bits.qcow2 o16.qcow2
convert -n --bitmaps -O raw bits.qcow2 o.raw
convert -O qcow2 -o compat=0.10 c.qcow2 o17.qcow2
convert -o preallocation=full a.qcow2 o20.raw
convert -f raw -O qcow2 odd.raw o21.qcow2
convert -O qcow2 -o compression_type=zstd -c a.qcow2 o22.qcow2
""",
}


@pytest.mark.parametrize(
    "line",
    [
        "create -f qcow2 -o help x",
        "create -f raw -o help x",
        "create -f raw -o ?",
        "create -o cluster_size=4k,help -f qcow2",
        "convert -O qcow2 -o help",
        "amend -o help a.qcow2",
        "amend -f raw -o help r.raw",
    ],
)
def test_options_are_listed_as_by_qemu_img_but_for_those_that_are_not_there(line: str, tmp_path: Path) -> None:
    prepare(tmp_path / "folder")
    theirs = play([peer("qemu-img")], line, tmp_path / "folder").splitlines()
    wanted = [one for one in theirs if not re.match(r"  (encrypt|extent_size_hint)", one)]
    assert play([executable(), "img"], line, tmp_path / "folder").splitlines() == wanted


def test_an_option_that_is_wrong_leaves_the_output_as_it_was(tmp_path: Path) -> None:
    """qemu-img reads -t after it has made the output anew."""
    prepare(tmp_path / "folder")
    before = (tmp_path / "folder" / "odd.raw").read_bytes()
    assert "Invalid cache option: zz" in play(
        [executable(), "img"], "convert -t zz a.qcow2 odd.raw", tmp_path / "folder"
    )
    assert (tmp_path / "folder" / "odd.raw").read_bytes() == before


def test_an_internal_snapshot_has_the_size_that_it_was_taken_with(tmp_path: Path) -> None:
    """qemu-img gives it that of the image now: what the image was cut by since would be missing."""
    path = create(tmp_path / "a.qcow2", "4M")
    qemu_io(path, "write -P 7 3M 1M")
    qemu_img("snapshot", "-c", "one", path)
    for size in ("1M", "9M"):
        qemu_img("resize", "--shrink", path, size)
        play([executable(), "img"], "convert -l one a.qcow2 o.raw", tmp_path)
        assert (tmp_path / "o.raw").read_bytes() == bytes(3 << 20) + b"\7" * (1 << 20)


def test_a_rate_holds_back_what_is_written_and_not_what_need_not_be(tmp_path: Path) -> None:
    prepare(tmp_path / "folder")
    took = []
    for name in ("r.raw", "empty.raw"):
        with open(tmp_path / "folder" / name, "ab") as file:
            file.truncate(64 << 20)
        started = time.monotonic()
        play([executable(), "img"], f"convert -f raw -r 500k {name} o.raw", tmp_path / "folder")
        took.append(time.monotonic() - started)
    assert took[0] > took[1] + 2


def prepare(folder: Path) -> None:
    folder.mkdir()
    create(folder / "a.qcow2", "4M")
    qemu_io(folder / "a.qcow2", "write -P 1 0 1M", "write -P 9 3M 5000")
    shutil.copy(folder / "a.qcow2", folder / "copy.qcow2")
    for name, below, command in (("b", "a", "write -P 2 512k 1M"), ("c", "b", "write -z 640k 128k")):
        qemu_img("create", "-q", "-f", "qcow2", "-b", f"{below}.qcow2", "-F", "qcow2", folder / f"{name}.qcow2", "4M")
        qemu_io(folder / f"{name}.qcow2", command)
    qemu_img("convert", "-O", "qcow2", folder / "c.qcow2", folder / "was.qcow2")
    create(folder / "short.qcow2", "1M")
    qemu_io(folder / "short.qcow2", "write -P 2 768k 128k")
    create(folder / "bits.qcow2", "4M")
    qemu_img("bitmap", "--add", folder / "bits.qcow2", "one")
    qemu_img("bitmap", "--add", "-g", "512", folder / "bits.qcow2", "fine")
    qemu_io(folder / "bits.qcow2", "write -P 5 1M 128k")
    qemu_img("bitmap", "--add", "--disable", folder / "bits.qcow2", "off")
    (folder / "r.raw").write_bytes(b"\1" * (1 << 20) + bytes(3 << 20))
    with open(folder / "holes.raw", "wb") as file:
        file.write(b"\1" * (1 << 20))
        file.truncate(4 << 20)
    for name, size in (("long", 5 << 20), ("longer", 5 << 20)):
        with open(folder / f"{name}.raw", "wb") as file:
            file.write((folder / "r.raw").read_bytes())
            file.truncate(size)
    with open(folder / "longer.raw", "r+b") as file:
        file.seek(4500000)
        file.write(b"x")
    (folder / "short.raw").write_bytes(bytes(1 << 20))
    (folder / "odd.raw").write_bytes(b"\3" * 70000)


def play(program: list[str], line: str, folder: Path) -> str:
    done = subprocess.run(
        [*program, *shlex.split(line)], cwd=folder, capture_output=True, text=True, timeout=60, check=False
    )
    text = done.stdout + done.stderr
    for pattern, instead in MEANT:
        text = re.sub(pattern, instead, text)
    # Of how far a command has come both tell at least the beginning and the end.
    text = re.sub(r"(\s+\([\d.]+/100%\)\r)+", "<progress>", text)
    return f"{line}\n{text.rstrip()}\n= {done.returncode}"


def describe(path: Path) -> str:
    """What an image reads as and refers to; of what it holds itself, where its layers have data."""
    fmt = "raw" if path.suffix == ".raw" else "qcow2"
    shown = qemu_img("info", "-f", fmt, path)
    wanted = [
        line
        for line in shown.splitlines()
        if re.match(r"virtual size|cluster_size|backing|    compat|    compr|            ", line)
    ]
    if "zz" not in shown and fmt == "qcow2":
        wanted += runs(path)
        qemu_img("check", "-q", path)
    return "\n".join(re.sub(r" \(actual path.*", "", line) for line in wanted)


def runs(path: Path) -> list[str]:
    """What qemu-img maps, without the places in the file, which -W leaves to chance."""
    found: list[dict[str, Any]] = []
    for run in json.loads(qemu_img("map", "--output=json", path)):
        run.pop("offset", None)
        start, length = run.pop("start"), run.pop("length")
        if found and found[-1]["kind"] == run:
            found[-1]["end"] = start + length
        else:
            found.append({"start": start, "end": start + length, "kind": run})
    return [str(run) for run in found]


@pytest.mark.parametrize("name", SCRIPTS)
def test_output_exit_codes_and_images_are_those_of_qemu_img(name: str, tmp_path: Path) -> None:
    lines = [line for line in SCRIPTS[name].splitlines() if line]
    told, left = [], []
    for who, program in (("theirs", [peer("qemu-img")]), ("ours", [executable(), "img"])):
        folder = tmp_path / who
        prepare(folder)
        told.append([play(program, line, folder) for line in lines])
        left.append({path.name: describe(path) for path in sorted(folder.iterdir()) if path.suffix})
    assert told[1] == told[0]
    for image in left[0]:
        assert f"{image}\n{left[1].get(image)}" == f"{image}\n{left[0][image]}"
    for path in sorted((tmp_path / "theirs").iterdir()):
        if "zz" not in left[0].get(path.name, "zz"):
            fmt = "raw" if path.suffix == ".raw" else "qcow2"
            qemu_img("compare", "-f", fmt, "-F", fmt, path, tmp_path / "ours" / path.name)
