"""Run the cells of docs/tour.ipynb and keep what they print and draw beside them, as a notebook program does.

    python scripts/make/tour.py [docs/tour.ipynb]

Cells run in one namespace, in order, and need no notebook program: they print, and draw with matplotlib.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TOUR = Path(__file__).resolve().parent.parent.parent / "docs" / "tour.ipynb"
DPI = 75


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebook", nargs="?", type=Path, default=TOUR)
    path = parser.parse_args(argv).notebook
    notebook = json.loads(path.read_text(encoding="utf-8"))
    for number, (cell, outputs) in enumerate(run_cells(notebook), start=1):
        cell.update(execution_count=number, outputs=outputs)
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{path}: {path.stat().st_size:,} bytes")
    return 0


def run_cells(notebook: dict[str, Any]) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Each cell of code with its outputs: what it printed, then its figures."""
    import matplotlib

    matplotlib.use("Agg")
    list(_figures())  # of before are not of the notebook
    scope: dict[str, Any] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("".join(cell["source"]), cell["id"], "exec"), scope)
        text = printed.getvalue()
        stream = [{"name": "stdout", "output_type": "stream", "text": text.splitlines(True)}] if text else []
        yield cell, stream + list(_figures())


def _figures() -> Iterator[dict[str, Any]]:
    """Those that are open, as PNG; closed then."""
    import matplotlib.pyplot as plt

    for number in plt.get_fignums():
        drawn = io.BytesIO()
        plt.figure(number).savefig(drawn, format="png", dpi=DPI, metadata={"Software": None})
        encoded = base64.b64encode(drawn.getvalue()).decode()
        yield {"data": {"image/png": encoded}, "metadata": {}, "output_type": "display_data"}
    plt.close("all")


if __name__ == "__main__":
    raise SystemExit(main())
