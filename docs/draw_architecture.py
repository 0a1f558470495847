"""Draws docs/img/architecture.svg from the imports as they stand: ``.venv/bin/python docs/draw_architecture.py``.

Belongs here: which module belongs to which box, where boxes stand, the SVG as text. Does not: whether an import is allowed
(``tests/test_rooms.py``). Standard library only, and the same bytes from the same imports. Edges are counted, never typed; only the
ways of the arrows are, so that they cross as little as can be. An edge without a way here becomes a straight line.
"""

import ast
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "docs" / "img" / "architecture.svg"
Edge = tuple[str, str]
WIDTH, HEIGHT = 1400, 1090

BASE = "pipeline.*"
"""The modules at the foot of ``pipeline``, on which its packages stand."""
ROOMS = {  # x, y, width, height, what it is for
    "orchestration": (
        40,
        20,
        1320,
        62,
        "Dagster definitions, jobs, sensors, schedules; the command signalbox; the demo",
    ),
    "assets": (170, 132, 1060, 62, "one Dagster asset a stage: read, call one function, write; resources"),
    "pipeline": (310, 264, 780, 372, "what the stages do, without Dagster"),
    "models": (110, 726, 450, 260, "learners, policies, gate, registry"),
    "data_checks": (640, 726, 160, 260, ""),
    "delivery": (880, 726, 480, 260, "what sends, verifies, reverses"),
    "common": (310, 1030, 780, 44, "errors in words, YAML, the locked DuckDB session, progress"),
}
PARTS = {  # x, y, width; height is 30
    "pipeline.dispatch": (350, 310, 150),
    "pipeline.workflow_validation": (900, 310, 150),
    "pipeline.explain": (730, 310, 130),
    "pipeline.monitoring": (570, 384, 130),
    "pipeline.lifecycle": (350, 444, 180),
    "pipeline.decisions": (570, 514, 290),
    "pipeline.ingest": (920, 514, 130),
    BASE: (350, 590, 700),
    "models.training": (130, 768, 410),
    "models.learners": (195, 826, 285),
    "models.evaluation": (170, 884, 260),
    "models.policies": (130, 940, 200),
    "models.*": (350, 940, 190),
    "delivery.ledger.migrations": (900, 780, 150),
    "delivery.sandbox": (1190, 780, 150),
    "delivery.*": (900, 850, 250),
    "delivery.connectors": (900, 930, 440),
}
TEXT = {
    BASE: "workflow, lake, point_in_time, provenance, settings",
    "models.*": "registry, booster, …",
    "delivery.*": "ledger, push, rollback, …",
}
WAYS: dict[Edge, list[tuple[int, int]]] = {
    ("orchestration", "assets"): [(700, 82), (700, 132)],
    ("orchestration", "pipeline"): [(140, 82), (140, 228), (350, 228), (350, 264)],
    ("orchestration", "models"): [(90, 82), (90, 700), (130, 700), (130, 726)],
    ("orchestration", "common"): [(65, 82), (65, 1052), (310, 1052)],
    ("orchestration", "data_checks"): [(1265, 82), (1265, 690), (770, 690), (770, 726)],
    ("orchestration", "delivery"): [(1320, 82), (1320, 726)],
    ("assets", "pipeline"): [(700, 194), (700, 264)],
    ("assets", "models"): [(210, 194), (210, 726)],
    ("assets", "common"): [(260, 194), (260, 665), (582, 665), (582, 1030)],
    ("assets", "data_checks"): [(1140, 194), (1140, 665), (735, 665), (735, 726)],
    ("assets", "delivery"): [(1200, 194), (1200, 726)],
    ("pipeline", "models"): [(430, 636), (430, 726)],
    ("pipeline", "common"): [(612, 636), (612, 1030)],
    ("pipeline", "data_checks"): [(690, 636), (690, 726)],
    ("pipeline", "delivery"): [(1000, 636), (1000, 726)],
    ("delivery", "common"): [(1000, 986), (1000, 1030)],
    ("pipeline.dispatch", BASE): [(370, 340), (370, 365), (336, 365), (336, 600), (350, 600)],
    ("pipeline.dispatch", "pipeline.lifecycle"): [(410, 340), (410, 444)],
    ("pipeline.dispatch", "pipeline.decisions"): [(480, 340), (480, 365), (550, 365), (550, 522), (570, 522)],
    ("pipeline.monitoring", "pipeline.dispatch"): [(620, 384), (620, 325), (500, 325)],
    ("pipeline.explain", "pipeline.decisions"): [(780, 340), (780, 514)],
    ("pipeline.explain", BASE): [(840, 340), (840, 480), (876, 480), (876, 590)],
    ("pipeline.workflow_validation", "pipeline.ingest"): [(1030, 340), (1030, 514)],
    ("pipeline.workflow_validation", BASE): [(908, 340), (908, 590)],
    ("pipeline.monitoring", "pipeline.lifecycle"): [(600, 414), (600, 452), (530, 452)],
    ("pipeline.lifecycle", "pipeline.monitoring"): [(500, 444), (500, 399), (570, 399)],
    ("pipeline.monitoring", "pipeline.decisions"): [(640, 414), (640, 514)],
    ("pipeline.monitoring", BASE): [(700, 399), (720, 399), (720, 495), (560, 495), (560, 590)],
    ("pipeline.lifecycle", "pipeline.decisions"): [(530, 466), (610, 466), (610, 514)],
    ("pipeline.decisions", "pipeline.lifecycle"): [(570, 536), (480, 536), (480, 474)],
    ("pipeline.lifecycle", BASE): [(400, 474), (400, 590)],
    ("pipeline.decisions", "pipeline.ingest"): [(860, 529), (920, 529)],
    ("pipeline.decisions", BASE): [(700, 544), (700, 590)],
    ("pipeline.ingest", BASE): [(985, 544), (985, 590)],
    ("models.training", "models.learners"): [(330, 798), (330, 826)],
    ("models.training", "models.evaluation"): [(182, 798), (182, 884)],
    ("models.training", "models.*"): [(515, 798), (515, 940)],
    ("models.learners", "models.evaluation"): [(330, 856), (330, 884)],
    ("models.learners", "models.policies"): [(195, 841), (145, 841), (145, 940)],
    ("models.learners", "models.*"): [(455, 856), (455, 940)],
    ("models.evaluation", "models.policies"): [(250, 914), (250, 940)],
    ("models.evaluation", "models.*"): [(390, 914), (390, 940)],
    ("delivery.ledger.migrations", "delivery.*"): [(960, 810), (960, 850)],
    ("delivery.sandbox", "delivery.connectors"): [(1265, 810), (1265, 930)],
    ("delivery.*", "delivery.connectors"): [(1020, 880), (1020, 930)],
}
COUNTS: dict[Edge, tuple[int, int]] = {
    ("pipeline.dispatch", "pipeline.decisions"): (550, 495),
    ("pipeline.monitoring", "pipeline.decisions"): (640, 470),
    ("pipeline.monitoring", "pipeline.lifecycle"): (570, 452),
    ("pipeline.lifecycle", "pipeline.decisions"): (610, 488),
    ("pipeline.decisions", "pipeline.lifecycle"): (515, 536),
    ("pipeline.monitoring", "pipeline.dispatch"): (560, 325),
    ("pipeline.monitoring", "pipeline.*"): (720, 450),
    ("models.training", "models.evaluation"): (182, 822),
}
"""Where a count stands that would hide something in the middle of its way."""
COLOURS = {
    "orchestration": "#b3541e", "assets": "#2b6ca3", "pipeline": "#3b7a3b", "models": "#7a4a9c",
    "data_checks": "#8a6d1a", "delivery": "#a12f4b", "common": "#555555",
}  # fmt: skip


def imports(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """(module that is meant, else the package) of every import that is ever done; not those for type checkers alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((f"{node.module}.{alias.name}", str(node.module)) for alias in node.names)
        elif isinstance(node, ast.If) and ast.unparse(node.test).split(".")[-1] == "TYPE_CHECKING":
            yield from imports(ast.Module(node.orelse, []))
        else:
            yield from imports(node)


def boxes(module: str) -> tuple[str, str]:
    """A module's room, and its box in there."""
    room, _, rest = module.partition(".")
    part = f"{room}.{rest.split('.')[0]}"
    return room, part if part in PARTS else f"{room}.*"


def edges(root: Path = ROOT) -> dict[Edge, int]:
    """(box, box) → in how many pairs of modules the one imports the other: between rooms, and within a room between its parts."""
    files = {
        ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): file
        for room in ROOMS
        for file in sorted((root / room).rglob("*.py"))
    }
    counted: Counter[Edge] = Counter()
    for name, file in files.items():
        wanted = {one if one in files else other for one, other in imports(ast.parse(file.read_text()))}
        for other in wanted & files.keys():
            (room, part), (its_room, its_part) = boxes(name), boxes(other)
            if room != its_room:
                counted[room, its_room] += 1
            elif part != its_part:
                counted[part, its_part] += 1
    return dict(sorted(counted.items()))


def listed(found: dict[Edge, int]) -> list[str]:
    """The edges as the drawing holds them, in a comment."""
    return [f"{one} > {other}: {count}" for (one, other), count in found.items()]


def straight(one: str, other: str) -> list[tuple[int, int]]:
    """From the middle of a box's foot to the middle of another's head."""
    (x, y, width, height), (its_x, its_y, its_width) = place(one), place(other)[:3]
    return [(x + width // 2, y + height), (its_x + its_width // 2, its_y)]


def place(box: str) -> tuple[int, int, int, int]:
    return ROOMS[box][:4] if box in ROOMS else (*PARTS[box], 30)


def longest(way: list[tuple[int, int]]) -> tuple[float, float]:
    """The middle of the longest piece of a way."""
    (x, y), (u, v) = max(pairwise(way), key=lambda p: abs(p[0][0] - p[1][0]) + abs(p[0][1] - p[1][1]))
    return (x + u) / 2, (y + v) / 2


def drawn(found: dict[Edge, int]) -> str:
    """The SVG."""
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="Helvetica, Arial, sans-serif">',
        "<title>Rooms, their parts and the imports between them</title>",
        "<!-- made by docs/draw_architecture.py; box > box: pairs of modules",
        *listed(found),
        "-->",
        "<defs>",
        *(
            f'<marker id="{room}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="9" markerHeight="9" '
            f'markerUnits="userSpaceOnUse" orient="auto"><path d="M0,0 L10,5 L0,10 z" fill="{colour}"/></marker>'
            for room, colour in COLOURS.items()
        ),
        "</defs>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for room, (x, y, width, height, what) in ROOMS.items():
        colour = COLOURS[room]
        lines.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" fill="{colour}" fill-opacity="0.07" stroke="{colour}"/>'
        )
        lines.append(
            f'<text x="{x + 14}" y="{y + 26}" font-size="19" font-weight="bold" fill="{colour}">{room}/'
            f'<tspan dx="12" font-size="14" font-weight="normal" fill="#333">{escape(what)}</tspan></text>'
        )
    for n, text in enumerate(("contract", "guardrails", "drift", "performance", "regression guard")):
        x, y = ROOMS["data_checks"][:2]
        lines.append(f'<text x="{x + 14}" y="{y + 62 + 24 * n}" font-size="14" fill="#333">{text}</text>')
    for part, (x, y, width) in PARTS.items():
        colour = COLOURS[part.split(".")[0]]
        text = TEXT.get(part, part.split(".")[1])
        lines.append(f'<rect x="{x}" y="{y}" width="{width}" height="30" rx="4" fill="white" stroke="{colour}"/>')
        lines.append(
            f'<text x="{x + width // 2}" y="{y + 20}" font-size="14" text-anchor="middle" fill="#222">{escape(text)}</text>'
        )
    marks = []
    for (one, other), count in found.items():
        room = one.split(".")[0]
        way = WAYS.get((one, other)) or straight(one, other)
        path = " L".join(f"{x},{y}" for x, y in way)
        thick = "1.8" if one in ROOMS else "1.3"
        lines.append(
            f'<path d="M{path}" fill="none" stroke="{COLOURS[room]}" stroke-width="{thick}" marker-end="url(#{room})"/>'
        )
        x, y = COUNTS.get((one, other)) or longest(way)
        if len(way) == 2 and way[1][1] - way[0][1] < 45:
            x += 12  # beside a short arrow, which it would hide
        half = 5 + 4 * len(str(count))
        marks.append(f'<rect x="{x - half:g}" y="{y - 8:g}" width="{2 * half}" height="16" fill="white"/>')
        marks.append(
            f'<text x="{x:g}" y="{y + 4.5:g}" font-size="12" text-anchor="middle" fill="{COLOURS[room]}">{count}</text>'
        )
    return "\n".join([*lines, *marks, "</svg>", ""])


if __name__ == "__main__":
    TARGET.write_text(drawn(edges()))
