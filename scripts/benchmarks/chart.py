"""Draws the run as two pictures, of reads and of writes: bars in an SVG for light and dark pages.

There is one panel for each workload and remote, with hpcfs and each peer at its best options. The
lengths compare within a panel only, since milliseconds and minutes have no common scale.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape

from scripts.benchmarks.goals import best_peer, is_ours
from scripts.benchmarks.results import HPCFS, HPCFS_BACK, READ, TCP, WRITE, Results
from scripts.benchmarks.workloads import titles

RTT_MS = 20.0
SHOWN = {
    READ: ("sequential", "cached", "first", "random", "copy", "walk", "eight-readers"),
    WRITE: ("write", "copy-in", "rsync-in", "append", "git-clone"),
}
HEADINGS = {READ: "Reading, in seconds", WRITE: "Writing, in seconds until the remote has all"}
OURS = {READ: (HPCFS,), WRITE: (HPCFS, HPCFS_BACK)}
PEERS = {"sftp": ("sshfs", "rclone"), "s3": ("s3fs", "rclone")}
TITLES = {"sftp": "SSH (SFTP)", "s3": "S3"}

WIDTH, COLUMN, MARGIN = 860, 430, 16
TOP, LABEL, BAR, GAP = 66, 22, 15, 16
NAME_WIDTH, BAR_WIDTH = 76, 240
STYLE = """
text { font: 13px -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif; fill: #57606a }
.title { font-weight: 600; font-size: 16px; fill: #24292f }
.head { font-weight: 600; fill: #24292f }
.ours { fill: #0969da } .peer { fill: #afb8c1 } .line { stroke: #24292f; stroke-dasharray: 3 2 }
@media (prefers-color-scheme: dark) {
  text { fill: #9198a1 } .title, .head { fill: #f0f6fc }
  .ours { fill: #4493f8 } .peer { fill: #545d68 } .line { stroke: #f0f6fc }
}
"""


@dataclass(frozen=True)
class Bar:
    """One bar: `seconds` are its length, `text` stands beside it."""

    program: str
    seconds: float
    text: str


def svg(results: Results, kind: str = READ, rtt_ms: float = RTT_MS) -> str:
    if rtt_ms not in results.delays:
        rtt_ms = max(results.delays)
    body, bottom = [], 0
    for column, remote in enumerate(results.remotes):
        x, y = MARGIN + column * COLUMN, TOP
        body.append(_text(x, y, TITLES[remote], "head"))
        for workload in SHOWN[kind]:
            programs = (*OURS[kind], *PEERS[remote])
            if bars := _bars(results, remote, rtt_ms, workload, programs):
                y += GAP
                tcp = results.seconds(remote, rtt_ms, TCP, workload)
                body += _panel(x, y, titles(results.size)[workload], bars, tcp)
                y += LABEL + BAR * len(bars)
        bottom = max(bottom, y)
    link = f"at {rtt_ms:g} ms and {results.rate_mbits:g} Mbit/s"
    title = f"{HEADINGS[kind]}, {link}: shorter is better"
    note = "Peers at their best options. Dashed: one plain TCP stream over the same link."
    head = [_text(MARGIN, 24, title, "title"), _text(MARGIN, 44, note)]
    height = bottom + MARGIN
    size = f'width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}"'
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">'
    return "\n".join([opening, f"<style>{STYLE}</style>", *head, *body, "</svg>"]) + "\n"


def _bars(
    results: Results, remote: str, rtt_ms: float, workload: str, programs: tuple[str, ...]
) -> list[Bar]:
    bars = []
    for program in programs:
        if is_ours(program):
            seconds = results.seconds(remote, rtt_ms, program, workload)
        else:
            seconds = best_peer(results, remote, rtt_ms, workload, program)
        if seconds is not None:
            text = f"{seconds:.3g}" if seconds < results.timeout else f"> {results.timeout:g}"
            bars.append(Bar(program, seconds, text))
    return bars


def _panel(x: int, y: int, title: str, bars: list[Bar], tcp: float | None) -> Iterator[str]:
    longest = max(bar.seconds for bar in bars)
    yield _text(x, y + 13, title, "head")
    left, top = x + NAME_WIDTH, y + LABEL
    for number, bar in enumerate(bars):
        at = top + BAR * number
        width = max(1.0, BAR_WIDTH * bar.seconds / longest)
        kind = "ours" if is_ours(bar.program) else "peer"
        yield _text(x, at + 11, bar.program)
        yield f'<rect class="{kind}" x="{left}" y="{at}" width="{width:.1f}" height="{BAR - 3}"/>'
        yield _text(left + round(width) + 6, at + 11, bar.text)
    if tcp is not None and tcp <= longest:
        at_x = left + BAR_WIDTH * tcp / longest
        ends = f'y1="{top - 2}" y2="{top + BAR * len(bars)}"'
        yield f'<line class="line" x1="{at_x:.1f}" x2="{at_x:.1f}" {ends}/>'


def _text(x: int, y: int, text: str, kind: str = "") -> str:
    chosen = f' class="{kind}"' if kind else ""
    return f'<text x="{x}" y="{y}"{chosen}>{escape(text)}</text>'
