"""Every job with an error at each of its steps, under each policy: as documented, as in QEMU, and nothing is lost."""

from __future__ import annotations

import functools
import os
import random
from pathlib import Path

import pytest

from kit.fault_matrix import COMMANDS, FAULTS, FURTHER, HEAD, POLICIES, Fault, row, run_cell
from kit.livedisk import Daemon
from kit.qemu import StorageDaemon

PAGE = Path(__file__).parents[2] / "docs" / "faults.md"


@functools.cache
def documented() -> list[str]:
    return PAGE.read_text().split("<!-- matrix -->\n")[1].split("<!-- end of matrix -->")[0].splitlines()


def test_the_page_has_a_row_for_each_fault() -> None:
    assert "\n".join(documented()[:2]) == HEAD
    assert [line.split(" | ")[0].removeprefix("| ") for line in documented()[2:]] == [fault.title for fault in FAULTS]


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.title)
def test_a_fault_leads_to_what_the_page_says(fault: Fault) -> None:
    seen = [run_cell(Daemon, fault, policy) for policy in POLICIES]
    for policy, one in zip(POLICIES, seen, strict=True):
        assert (one.guest, one.data) == ("goes on", "whole"), policy
    assert row(fault, seen) in documented()


# QEMU flushes where something was written since the last flush, and never the base of a commit: these never happen there.
# And it fails a guest's write where the copy before it fails. Where a header cannot be changed, its stream completes all the same
# and its commit ends in a segmentation fault.
MEANT = [
    fault
    for fault in FAULTS
    if (fault.what == "flush" and fault.step in ("at the end", "when it completes"))
    or fault.step in ("before a guest's write", "when its header is changed")
]


@pytest.mark.slow
@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault not in MEANT], ids=lambda fault: fault.title)
def test_qemu_comes_to_the_same(fault: Fault) -> None:
    assert row(fault, [run_cell(StorageDaemon, fault, policy) for policy in POLICIES]) in documented()


SEED = int(os.environ.get("SOAK_SEED", "1"))


@pytest.mark.slow
@pytest.mark.parametrize("job", COMMANDS)
def test_a_few_further_faults_lose_nothing(job: str) -> None:
    chance = random.Random(SEED)
    for fault in chance.sample([fault for fault in FURTHER if fault.job == job], 3):
        policy = chance.choice(("report", "stop"))
        assert not run_cell(Daemon, fault, policy).lost(fault), (fault, policy)


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("job", COMMANDS)
def test_further_faults_lose_nothing(job: str) -> None:
    for fault in FURTHER:
        if fault.job == job:
            for policy in ("report", "stop", "ignore"):
                assert not run_cell(Daemon, fault, policy).lost(fault), (fault, policy)
