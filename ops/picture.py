"""Draw docs/house.svg: the packages of sl_queue on their floors, from what they import: `make picture`.

A package stands on the floor above the highest that it imports; an import that is part of a circle is red. `--check`
draws nothing, and fails if the picture is not that of the code.
"""

import ast
import sys
from collections.abc import Iterator
from functools import cache
from html import escape
from pathlib import Path

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "house.svg"
WIDTH, BOX_W, BOX_H, FLOOR_H, MARGIN = 1180, 142, 46, 104, 70
SAYS = {
    "cli": "the command",
    "workers": "a process a role",
    "local": "all roles here",
    "checking": "sl-queue check",
    "planning": "sl-queue plan",
    "testing": "broker, chaos",
    "launch": "puts roles together",
    "deployment": "certificates, logins",
    "observe": "logs, metrics, status",
    "loops": "one line an action",
    "compute": "torch",
    "cut": "what crosses",
    "data": "rows and columns",
    "storage": "state folders",
    "transport": "channels, RabbitMQ",
    "security": "sealing",
    "privacy": "defences",
    "config": "job and party files",
    "ports": "the seams",
    "protocol": "pure",
    "errors": "and exit codes",
    "split_model": "for a notebook",
}


def room_of(module: str) -> str:
    """Return the package of a module: the second part of its name, or `workers`."""
    parts = module.split(".")
    return parts[1] if parts[0] == "sl_queue" and len(parts) > 1 else parts[0]


def imported(tree: ast.Module) -> Iterator[str]:
    """Yield every module that is imported, wherever in the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def graph() -> dict[str, set[str]]:
    """Return what each package imports of the others."""
    found: dict[str, set[str]] = {}
    for path in sorted([*ROOT.glob("sl_queue/**/*.py"), *ROOT.glob("workers/*.py")]):
        here = room_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
        if here == "__init__":
            continue
        others = {room_of(name) for name in imported(ast.parse(path.read_text())) if name.startswith("sl_queue.")}
        found.setdefault(here, set()).update(others - {here})
    return {room: others & set(found) for room, others in found.items()}


def reached(imports: dict[str, set[str]]) -> dict[str, set[str]]:
    """Return what each package imports on whatever way."""
    reach = {room: set(others) for room, others in imports.items()}
    for between in imports:
        for others in reach.values():
            if between in others:
                others |= reach[between]
    return reach


def floors(imports: dict[str, set[str]]) -> list[list[str]]:
    """Return the packages of each floor, the ground first; packages that import each other share one."""
    reach = reached(imports)

    @cache
    def level(room: str) -> int:
        return max((level(other) + 1 for other in reach[room] if room not in reach[other]), default=0)

    return [sorted(room for room in imports if level(room) == floor) for floor in range(max(map(level, imports)) + 1)]


def direct(imports: dict[str, set[str]]) -> Iterator[tuple[str, str, bool]]:
    """Yield the imports that no longer way stands for, each with True if it is part of a circle."""
    reach = reached(imports)
    for room, others in sorted(imports.items()):
        for other in sorted(others):
            circle = room in reach[other]
            if circle or not any(other in reach[between] for between in others - {other}):
                yield room, other, circle


def draw(imports: dict[str, set[str]]) -> str:
    """Return the picture as SVG."""
    storeys = floors(imports)
    height = MARGIN + FLOOR_H * len(storeys)
    place: dict[str, tuple[float, float]] = {}
    for number, rooms in enumerate(storeys):
        step = WIDTH / len(rooms)
        for index, room in enumerate(rooms):
            place[room] = (step * (index + 0.5), height - FLOOR_H * (number + 0.5) - MARGIN / 4)
    title = f"{len(imports)} packages on {len(storeys)} floors; imports that a longer way stands for are left out"
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="20" y="32" font-size="18">{title}</text>',
    ]
    for room, other, circle in direct(imports):
        (x1, y1), (x2, y2) = place[room], place[other]
        top, bottom = y1 + BOX_H / 2, y2 - BOX_H / 2
        curve = f"M{x1:.0f} {top:.0f} C{x1:.0f} {top + 40:.0f} {x2:.0f} {bottom - 40:.0f} {x2:.0f} {bottom:.0f}"
        lines.append(f'<path d="{curve}" fill="none" stroke="{"#cc3311" if circle else "#9fb3c8"}"/>')
    for room, (x, y) in sorted(place.items()):
        box = f'x="{x - BOX_W / 2:.0f}" y="{y - BOX_H / 2:.0f}" width="{BOX_W}" height="{BOX_H}"'
        lines.append(f'<rect {box} rx="6" fill="#eef4fa" stroke="#33658a"/>')
        lines.append(f'<text x="{x:.0f}" y="{y - 3:.0f}" font-size="15" text-anchor="middle">{escape(room)}</text>')
        says = escape(SAYS.get(room, ""))
        lines.append(f'<text x="{x:.0f}" y="{y + 15:.0f}" font-size="11" text-anchor="middle">{says}</text>')
    return "\n".join([*lines, "</svg>", ""])


def main() -> None:
    picture = draw(graph())
    if "--check" not in sys.argv[1:]:
        PICTURE.write_text(picture)
    elif not PICTURE.exists() or PICTURE.read_text() != picture:
        sys.exit(f"{PICTURE} is not the picture of this code: make picture")


if __name__ == "__main__":
    main()
