"""Write the measured rows of benchmarks/results/*.json into the table of README.md."""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- measured: made by benchmarks/table.py -->", "<!-- /measured -->"


def table(results: Path = ROOT / "benchmarks" / "results") -> str:
    """Markdown, a line a row, files in the order of their names."""
    lines = [
        "| machine | dtype | model | phase | implementation | p50 ms | clips/s | peak MB | speedup | matmul peak |",
        "|---|---|---|---|---|--:|--:|--:|--:|--:|",
    ]
    for path in sorted(results.glob("*.json")):
        for row in json.loads(path.read_text()):
            cells = [
                f"{row['versions']['device']}, commit {row['commit']}",
                row["dtype"],
                f"{row['arch']} {row['adapters']}, batch {row['batch_size']}",
                row["phase"],
                row["impl"],
                f"{row['p50_ms']:.0f}" if row["p50_ms"] > 100 else f"{row['p50_ms']:.2f}",
                f"{row['clips_per_s']:.3g}",
                "-" if row["peak_mb"] is None else f"{row['peak_mb']:.0f}",
                "-" if row["speedup"] is None else f"{row['speedup']:.2f}x",
                f"{row['peak_share']:.0%}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def with_table(readme: str, text: str) -> str:
    """``readme`` with ``text`` between the two marks."""
    return re.sub(f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: f"{BEGIN}\n{text}\n{END}", readme, flags=re.DOTALL)


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(with_table(path.read_text(), table()))
