"""Imports point down only, and every outside thing has one owner."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# From the ground up. Blocks of one layer never import each other, unless they are joined by a comma here.
LAYERS = (
    (("errors",),),
    (
        (
            *("protocol", "job", "ports", "broker_url", "declared", "exactness", "party_file", "security"),
            *("user_code", "environment"),
        ),
    ),
    (("roles",), ("transport",), ("compute",), ("storage",), ("data",), ("observe", "http_server")),
    (("launch",),),
)
TOP = len(LAYERS)  # the command, the workers and what only they use: everything else
NARROWER = {  # what these may import of sl_queue, though their layer would allow more
    "sl_queue.protocol": ("sl_queue.protocol", "sl_queue.errors"),
    "sl_queue.ports": ("sl_queue.protocol", "sl_queue.errors"),
    "sl_queue.roles": ("sl_queue.roles", "sl_queue.ports", "sl_queue.protocol", "sl_queue.errors"),
}
OWNERS = {  # beginnings of module names
    "torch": (
        "sl_queue.compute.",
        "sl_queue.data.",
        "sl_queue.launch.party",
        "sl_queue.local.threads",
        "sl_queue.local.demo",
        "workers.entry",
    ),
    "pika": ("sl_queue.transport.rabbitmq", "sl_queue.transport.retry"),
    "tenacity": ("sl_queue.transport.retry",),
    "msgpack": ("sl_queue.protocol.codec",),
    "typer": ("sl_queue.cli.",),
}
IMPURE = ("asyncio", "io", "logging", "os", "pathlib", "random", "secrets", "socket", "subprocess", "threading", "time")


def modules() -> dict[str, ast.Module]:
    """Every module of the product by its dotted name."""
    files = [*ROOT.glob("sl_queue/**/*.py"), *ROOT.glob("workers/*.py")]
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files}
    return {names[path].removesuffix(".__init__"): ast.parse(path.read_text()) for path in files}


def imported(tree: ast.Module) -> Iterator[str]:
    """Every module that is imported, wherever in the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def place(name: str) -> tuple[int, tuple[str, ...]]:
    """The layer of a module of ours, and the block in it."""
    for layer, blocks in enumerate(LAYERS):
        for block in blocks:
            if within(name, tuple(f"sl_queue.{part}" for part in block)):
                return layer, block
    return TOP, ()


def points_down(importer: str, name: str) -> bool:
    """Whether the first may import the second."""
    for package, allowed in NARROWER.items():
        if within(importer, (package,)):
            return within(name, allowed)
    (upper, block), (lower, other) = place(importer), place(name)
    return lower < upper or block == other


def ours() -> list[tuple[str, str]]:
    found = [(name, other) for name, tree in modules().items() for other in imported(tree)]
    return [(name, other) for name, other in found if within(other, ("sl_queue", "workers"))]


def test_imports_point_down_only() -> None:
    assert len(ours()) > 200
    assert [f"{a} imports {b}" for a, b in ours() if a != "sl_queue" and not points_down(a, b)] == []


@pytest.mark.parametrize(
    ("importer", "name"),
    [
        ("sl_queue.errors", "sl_queue.protocol.messages"),
        ("sl_queue.protocol.codec", "sl_queue.ports"),
        ("sl_queue.loops.lifecycle", "sl_queue.transport.link"),
        ("sl_queue.loops.lifecycle", "sl_queue.config.job"),
        ("sl_queue.transport.party_channel", "sl_queue.storage.files"),
        ("sl_queue.compute.base_stage", "sl_queue.data.table"),
        ("sl_queue.storage.checkpoints", "sl_queue.launch"),
        ("sl_queue.launch", "sl_queue.cli.main"),
        ("sl_queue.config.job", "sl_queue.compute.model"),
    ],
)
def test_an_import_that_points_up_or_sideways_would_be_found(importer: str, name: str) -> None:
    assert not points_down(importer, name)


@pytest.mark.parametrize("outside", OWNERS)
def test_every_outside_thing_has_its_owner(outside: str) -> None:
    users = {name for name, tree in modules().items() if any(within(other, (outside,)) for other in imported(tree))}
    assert users
    assert [name for name in users if not name.startswith(OWNERS[outside])] == []


def test_the_protocol_has_no_clock_no_thread_no_file_and_no_chance() -> None:
    impure = [
        (name, other)
        for name, tree in modules().items()
        if within(name, ("sl_queue.protocol",))
        for other in imported(tree)
        if other.split(".")[0] in IMPURE
    ]
    assert impure == []


def test_importing_the_protocol_and_the_roles_loads_neither_torch_nor_pika() -> None:
    names = sorted(name for name in modules() if within(name, ("sl_queue.protocol", "sl_queue.roles")))
    assert len(names) > 12
    program = f"import sys, {', '.join(names)}; print([m for m in ('torch', 'pika') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_scheduler_and_the_operator_need_no_torch() -> None:
    program = (
        "import sys, sl_queue.launch.scheduler, sl_queue.transport.rabbitmq.link, sl_queue.launch.operator\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
