"""The map of rooms: who may import whom, which rooms may touch the world, and how large a room may be.

A room is a module of objectcache. A new one needs a line in MAP, below all that it imports.
"""

import ast
import functools
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ENGINES

PACKAGE = Path(__file__).parent.parent / "objectcache"

# From the ground up: a room imports only rooms above its line. Then what of the world it may
# touch; "late" is inside of functions only, so that importing the room does not need it.
MAP: dict[str, str] = {
    "objectcache": "",
    "errors": "",
    # pure: events, bytes and `now` in, answers out
    "admission": "",
    "breaker": "",
    "config": "",
    "curve": "",
    "flow": "",
    "format": "",
    "index": "",
    "keys": "",
    "plan": "",
    "compute": "",
    "lead": "",
    "arrival": "",
    "moment": "",
    "worth": "",
    "wire": "",
    "sharing": "",
    "order": "",
    "timely": "",
    "unsure": "",
    "choosing": "",
    "asked": "",
    "turns": "",
    "tracked": "",
    "trace": "",
    "support": "",
    "ring": "threads",  # one lock
    "shelf": "threads",  # one lock
    "hedge": "threads",  # one lock
    # ways to the world
    "version": "vllm",
    "report": "clock",
    "tracefile": "threads clock files",
    "weights": "files clock",
    "identity": "vllm-late torch-late",
    "loop": "asyncio threads",
    "stores.base": "",
    "stores.sigv4": "",
    "stores.http1": "",
    "stores.stops": "",
    "stores.memory": "threads",
    "stores.outlast": "asyncio",
    "stores.local": "asyncio threads clock files chance",
    "stores.s3_errors": "network",
    "stores.gate": "asyncio",
    "stores.attempts": "asyncio chance",
    "stores.hedged": "asyncio",
    "stores.fill": "",
    "stores.s3": "asyncio network files",
    "stores.s3_obstore": "asyncio network threads clock",
    "stores.receiver": "asyncio network threads clock",
    "stores.asker": "asyncio network",
    "stores.connections": "asyncio network",
    "stores.s3_direct": "asyncio network clock files",
    "stores": "files",
    "slots": "torch files",
    "staging": "torch",
    "runs": "torch",
    "device": "torch",
    "pages": "torch vllm-late",
    "late": "clock",
    # work on a loop
    "lookup": "asyncio threads",
    "reading": "asyncio",
    "through": "asyncio",
    "streamer": "asyncio",
    "saver": "asyncio clock",
    "mover": "threads",
    "mover_process": "threads clock files processes",
    "movers": "threads",
    # the halves and the class that vLLM makes
    "messages": "vllm",
    "metrics": "vllm",
    "parked": "torch vllm",
    "ahead": "torch clock",
    "saves": "vllm",
    "loading": "vllm",
    "scheduler": "clock vllm",
    "worker": "torch vllm files clock",
    "connector": "torch vllm chance",
    "plugin": "vllm-late",
    # the command
    "reference": "vllm-late",
    "admin": "clock files chance",
    "cli": "asyncio files",
    "__main__": "",
}
PURE = {
    *("errors", "admission", "breaker", "config", "curve", "flow", "format", "index"),
    *("keys", "plan"),
    *(
        "compute",
        "lead",
        "arrival",
        "moment",
        "worth",
        "wire",
        "sharing",
        "timely",
        "choosing",
        "asked",
        "turns",
        "order",
        "tracked",
        "unsure",
        "trace",
    ),
    *("support", "ring", "shelf", "hedge", "stores.sigv4", "stores.http1", "stores.stops"),
}
WORLD = {
    "torch": "torch",
    "vllm": "vllm",
    "asyncio": "asyncio",
    **dict.fromkeys(("threading", "_thread", "concurrent", "multiprocessing"), "threads"),
    **dict.fromkeys(("time", "datetime"), "clock"),
    **dict.fromkeys(("random", "secrets", "uuid"), "chance"),
    **dict.fromkeys(("os", "pathlib", "fcntl", "shutil", "tempfile", "glob"), "files"),
    **dict.fromkeys(("socket", "ssl", "http", "aiohttp", "aiobotocore", "botocore"), "network"),
    **dict.fromkeys(("obstore", "boto3", "requests", "httpx", "urllib3", "selectors"), "network"),
    **dict.fromkeys(("subprocess", "ctypes", "cffi"), "processes"),
}
# Where a handler may take any exception, or end a cancellation, without raising it again.
BROAD = {
    ("stores.s3", "_send"): "judge() raises what is no failure of a store",
    ("stores.s3", "_ready"): "judge() raises what is no failure of a store",
    ("stores.s3", "address"): "judge() raises what is no failure of a store",
    ("stores.s3", "credentials"): "judge() raises what is no failure of a store",
    ("stores.receiver", "_step"): "it ends one exchange, and is raised where that is waited for",
    ("stores.receiver", "_outlast"): "a thread may still write to the caller's memory",
    ("streamer", "_run"): "the job ends all the same and gives its slots back",
    ("through", "_run"): "the stream ends all the same and gives its slots back",
    ("reading", "_failure_of"): "the slot is held until its reads have ended",
    ("reading", "_outcomes"): "reads may still write to slots",
    ("stores.s3_obstore", "_take"): "its caller raises it again, on the loop",
    ("stores.hedged", "end"): "a thread may still write to the caller's memory",
    ("stores.outlast", "outlast"): "a thread may still write to the caller's memory",
}
FILE_LINES, FUNCTION_LINES = 500, 70
VAGUE = ("util", "helper", "manager", "common", "misc")


def room_of(path: Path, package: Path) -> str:
    parts = list(path.relative_to(package).with_suffix("").parts)
    if parts[-1] == "__init__":
        parts.pop()
    return ".".join(parts) or "objectcache"


def imports(tree: ast.AST, late: bool = False) -> Iterator[tuple[str, bool, int]]:
    """(module or module.name, whether inside of a function, line); not those for type checkers."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            for other in node.orelse:
                yield from imports(other, late)
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, late, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from ((f"{module}.{alias.name}", late, node.lineno) for alias in node.names)
        function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        yield from imports(node, late or function)


def imported_room(name: str) -> str | None:
    """The room of `objectcache.a.b` or `objectcache.a.b.something`, or None if it is none of ours."""
    if name.split(".")[0] != "objectcache":
        return None
    inner = name.removeprefix("objectcache").removeprefix(".")
    while inner and inner not in MAP:
        inner = inner.rpartition(".")[0]
    return inner or "objectcache"


def powers(tree: ast.AST, room: str) -> Iterator[tuple[str, int]]:
    for name, late, line in imports(tree):
        power = WORLD.get(name.split(".")[0])
        if name.startswith("urllib.request"):
            power = "network"
        if power is not None:
            yield f"{power}-late" if late else power, line
    # What a room imports at once, it needs as well.
    for name, late, line in imports(tree):
        other = imported_room(name)
        if other is None or other not in MAP:
            continue
        for heavy in ("torch", "vllm"):
            if heavy in MAP[other].split():
                yield f"{heavy}-late" if late else heavy, line


def check_imports(room: str, tree: ast.AST) -> Iterator[str]:
    order = list(MAP)
    for name, _, line in imports(tree):
        if name.startswith("."):
            yield f"{room}:{line} imports {name}: write objectcache in full"
        other = imported_room(name)
        if other is not None and order.index(other) >= order.index(room):
            yield f"{room}:{line} imports {other}, which is not above it on the map"
    allowed = set(MAP[room].split())
    allowed |= {f"{power}-late" for power in allowed}
    for power, line in powers(tree, room):
        if power not in allowed:
            yield f"{room}:{line} may not touch {power}"
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)):
            continue
        where = f"{room}:{node.lineno}"
        if node.value.id == "os" and node.attr in ("environ", "environb", "getenv", "putenv"):
            yield f"{where} reads the environment: options come by config.py"
        if node.value.id == "threading" and node.attr != "Lock" and room in PURE:
            yield f"{where} uses threading.{node.attr}; a pure room may have a lock"
        if node.value.id == "asyncio" and node.attr == "run" and room != "cli":
            yield f"{where} runs a loop of its own: see loop.py"


def check_sizes(room: str, tree: ast.AST, text: str) -> Iterator[str]:
    lines = text.count("\n") + 1
    if lines >= FILE_LINES:
        yield f"{room} has {lines} lines, not less than {FILE_LINES}"
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = (node.end_lineno or 0) - node.lineno + 1
            if lines >= FUNCTION_LINES:
                yield f"{room}.{node.name} has {lines} lines, not less than {FUNCTION_LINES}"


def check_words(room: str, tree: ast.Module) -> Iterator[str]:
    first, *rest = (ast.get_docstring(tree) or "").split("\n")
    if not first.endswith((".", ":")) or (rest and rest[0].strip()):
        yield f"{room} must begin with one line that says what belongs there"
    if any(word in room for word in VAGUE):
        yield f"{room} has a name that says nothing"
    for node in ast.walk(tree):
        called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        if called == "print" and room != "cli":
            yield f"{room}:{getattr(node, 'lineno', 0)} prints: see report.py"


def check_handlers(room: str, tree: ast.AST, function: str = "") -> Iterator[str]:
    for node in ast.iter_child_nodes(tree):
        inner = function
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            inner = node.name
        where = f"{room}.{function}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.ExceptHandler) and takes_all(node.type):
            raises = any(isinstance(n, ast.Raise) and n.exc is None for n in ast.walk(node))
            if not raises and (room, function) not in BROAD:
                yield f"{where} takes every exception and does not raise it again"
        suppresses = isinstance(node, ast.Call) and ast.unparse(node.func).endswith("suppress")
        if suppresses and any(map(takes_all, node.args)):
            yield f"{where} suppresses every exception"
        yield from check_handlers(room, node, inner)


def takes_all(caught: ast.expr | None) -> bool:
    if caught is None:
        return True
    kinds = caught.elts if isinstance(caught, ast.Tuple) else [caught]
    names = {ast.unparse(kind).rpartition(".")[2] for kind in kinds}
    return bool(names & {"Exception", "BaseException", "CancelledError"})


@functools.cache
def faults_in(room: str, text: str) -> tuple[str, ...]:
    tree = ast.parse(text)
    found = [*check_words(room, tree), *check_sizes(room, tree, text), *check_handlers(room, tree)]
    if room in MAP:
        return (*found, *check_imports(room, tree))
    return (*found, f"{room} is not on the map: give it a line in tests/test_rooms.py")


def faults(package: Path) -> list[str]:
    """All that is against the map in a copy of the package."""
    texts = {room_of(path, package): path.read_text() for path in sorted(package.rglob("*.py"))}
    found = [fault for room, text in texts.items() for fault in faults_in(room, text)]
    return found + [f"{room} is on the map but not there" for room in MAP if room not in texts]


def test_the_rooms_are_as_the_map_says() -> None:
    assert faults(PACKAGE) == []


def test_the_map_gives_no_room_more_than_it_uses() -> None:
    """Otherwise the map would stop telling the truth."""
    unused = []
    for room, allowed in MAP.items():
        path = PACKAGE / Path(*room.split(".")) if room != "objectcache" else PACKAGE
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        used = {power for power, _ in powers(ast.parse(path.read_text()), room)}
        unused += [f"{room}: {power}" for power in set(allowed.split()) - used]
    assert unused == []


def test_pure_rooms_touch_nothing() -> None:
    assert {room: MAP[room] for room in PURE if MAP[room]} == {
        "ring": "threads",
        "shelf": "threads",
        "hedge": "threads",
    }


def outside(root: Path) -> list[Path]:
    """What is no room, but code all the same."""
    return [path for at in ("tests", "benchmarks", ".") for path in (root / at).glob("*.py")]


def sizes_outside(root: Path) -> list[str]:
    return [
        fault
        for path in outside(root)
        for fault in check_sizes(path.name, ast.parse(path.read_text()), path.read_text())
    ]


def test_names_outside_the_package_say_something_too() -> None:
    files = outside(PACKAGE.parent)
    assert [path.name for path in files if any(word in path.stem for word in VAGUE)] == []


def test_files_and_functions_outside_the_package_are_as_short() -> None:
    assert sizes_outside(PACKAGE.parent) == []


def test_whole_engines_run_one_after_the_other() -> None:
    """One that is not named would run beside them, and a bound on time would fail for it."""
    texts = {path.name: path.read_text() for path in PACKAGE.parent.glob("tests/test_*.py")}
    starting = "\nfrom benchmarks.engine import run_engines"
    assert {name for name, text in texts.items() if starting in text} <= set(ENGINES) <= set(texts)


# ---- the tester, tested

IMPORT = "import logging\n"
LONG = "\n\ndef long() -> None:\n" + "    pass\n" * 70
SWALLOW = "\n\ndef swallow() -> None:\n    try:\n        pass\n    except {}:\n        pass\n"


@pytest.mark.parametrize(
    ("room", "addition", "says"),
    [
        ("errors", "\nfrom objectcache import worker\n", "imports worker"),
        ("errors", "\nimport objectcache.keys\n", "imports keys"),
        ("streamer", "\nfrom objectcache.saver import Saver\n", "imports saver"),
        ("format", "\nfrom objectcache.format import checksum\n", "imports format"),
        ("keys", "\n\ndef f():\n    from objectcache import scheduler\n", "imports scheduler"),
        ("keys", "\nfrom .errors import Corrupt\n", "in full"),
        ("admission", "\nimport time\n", "touch clock"),
        ("index", "\nfrom time import monotonic\n", "touch clock"),
        ("breaker", "\n\ndef f():\n    import random\n", "touch chance-late"),
        ("config", "\nimport socket\n", "touch network"),
        ("keys", "\nimport urllib.request\n", "touch network"),
        ("format", "\nimport torch\n", "touch torch"),
        ("ring", "\nimport asyncio\n", "touch asyncio"),
        ("ring", "\nEVENT = threading.Event()\n", "threading.Event"),
        ("streamer", "\n\ndef f():\n    import vllm\n", "touch vllm-late"),
        ("identity", "\nimport torch\n", "touch torch"),
        ("admin", "\nfrom objectcache.messages import Staged\n", "touch vllm"),
        ("saver", "\nimport os\nX = os.environ.get('X')\n", "environment"),
        ("weights", "\nX = os.getenv('X')\n", "environment"),
        ("lookup", "\nasyncio.run(search(0, bool))\n", "loop of its own"),
        ("saver", SWALLOW.format("Exception"), "takes every exception"),
        ("saver", SWALLOW.format("(OSError, BaseException)"), "takes every exception"),
        ("saver", SWALLOW.format("asyncio.CancelledError"), "takes every exception"),
        ("saver", SWALLOW.replace(" {}", ""), "takes every exception"),
        ("stores.s3", SWALLOW.format("Exception"), "takes every exception"),
        ("stores.local", "\nwith contextlib.suppress(Exception):\n    pass\n", "suppresses every"),
        ("index", LONG, "long has 71 lines"),
        ("index", "# a line\n" * 450, "lines, not less than 500"),
        ("index", "\nprint('here')\n", "prints"),
    ],
)
def test_a_planted_fault_is_seen(tmp_path: Path, room: str, addition: str, says: str) -> None:
    package = copied(tmp_path)
    path = package / Path(*room.split(".")).with_suffix(".py")
    path.write_text(path.read_text() + addition)
    found = set(faults(package)) - set(faults(PACKAGE))
    assert any(says in fault and fault.startswith(room) for fault in found), found


def copied(tmp_path: Path) -> Path:
    return Path(shutil.copytree(PACKAGE, tmp_path / "objectcache"))


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("utils.py", '"""Things."""\n', "says nothing"),
        ("stores/s3_helpers.py", '"""Things."""\n', "says nothing"),
        ("attic.py", '"""Old things."""\n', "not on the map"),
        ("ring.py", "import threading\n", "one line that says"),
        ("ring.py", '"""Who holds which\nslot of memory."""\n', "one line that says"),
        ("ring.py", '"""Who holds which slot"""\n', "one line that says"),
    ],
)
def test_a_wrong_file_is_seen(tmp_path: Path, name: str, text: str, says: str) -> None:
    package = copied(tmp_path)
    (package / name).write_text(text)
    assert any(says in fault for fault in set(faults(package)) - set(faults(PACKAGE)))


@pytest.mark.parametrize("folder", ["tests", "benchmarks", "."])
def test_what_is_too_long_outside_is_seen(tmp_path: Path, folder: str) -> None:
    (tmp_path / folder).mkdir(exist_ok=True)
    (tmp_path / folder / "long.py").write_text("# a line\n" * 450 + LONG)
    file, function = sizes_outside(tmp_path)
    assert "long.py has" in file and "long.py.long has 71 lines" in function


def test_a_room_that_went_away_is_seen(tmp_path: Path) -> None:
    package = copied(tmp_path)
    (package / "ring.py").unlink()
    assert "ring is on the map but not there" in faults(package)
