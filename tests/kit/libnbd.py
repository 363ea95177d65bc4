"""libnbd as a client: scripts over its Python binding, nbdinfo and nbdcopy.

Debian builds the binding for its own Python, so a script runs in a process of its own. That process is isolated
(``-I``): neither the working folder nor ours is on its path, where the checkout's ``nbd/`` would hide the binding.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from typing import Any

from kit.peers import SYSTEM_PYTHON, run

_FRAME = """\
import json, sys
import nbd
given = json.load(sys.stdin)
globals().update(given["values"])
h = nbd.NBD()
for name in given["contexts"]:
    h.add_meta_context(name)
result = None
exec(compile(given["before"], "<before>", "exec"), globals())
if given["uri"] is not None:
    h.connect_uri(given["uri"])
exec(compile(given["code"], "<script>", "exec"), globals())
if given["uri"] is not None:
    h.shutdown()
json.dump(result, sys.stdout)
"""


def script(
    uri: str | None, code: str, *, before: str = "", contexts: Sequence[str] = (), timeout: float = 60, **values: Any
) -> Any:
    """Run ``code`` with ``h``, an `nbd.NBD` connected to ``uri``, and return what it leaves in ``result`` (as JSON
    carries it).

    ``before`` runs before the connection is made, ``contexts`` are the meta contexts to ask for, ``values`` become
    variables. With ``uri=None`` the script connects itself. Raises `kit.peers.PeerFailed` with the script's traceback.
    """
    given = {
        "uri": uri,
        "code": textwrap.dedent(code),
        "before": textwrap.dedent(before),
        "contexts": list(contexts),
        "values": values,
    }
    done = run([SYSTEM_PYTHON, "-I", "-c", _FRAME], input=json.dumps(given), timeout=timeout)
    return json.loads(done.stdout)


def nbdinfo(uri: str) -> dict[str, Any]:
    """``nbdinfo --json``: the export's size, flags, block sizes and contexts."""
    exports: list[dict[str, Any]] = json.loads(run(["nbdinfo", "--json", uri]).stdout)["exports"]
    if len(exports) != 1:
        raise AssertionError(f"nbdinfo saw {len(exports)} exports: {exports}")
    return exports[0]


def nbdinfo_list(uri: str) -> list[dict[str, Any]]:
    """``nbdinfo --list``: every export of the server."""
    exports: list[dict[str, Any]] = json.loads(run(["nbdinfo", "--list", "--json", uri]).stdout)["exports"]
    return exports


def nbdinfo_map(uri: str, context: str = "base:allocation") -> list[dict[str, Any]]:
    """``nbdinfo --map``: the extents of a meta context over the whole export."""
    extents: list[dict[str, Any]] = json.loads(run(["nbdinfo", "--json", f"--map={context}", uri]).stdout)
    return extents


def nbdcopy(source: str, target: str, *options: str) -> None:
    """``nbdcopy``; either side may be an NBD URI or a file."""
    run(["nbdcopy", *options, source, target], timeout=120)
