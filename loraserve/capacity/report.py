"""Writing what was found to a folder: the figures, the plots and one HTML page."""

import json
from pathlib import Path

from loraserve.capacity.answers import Found
from loraserve.capacity.page import capacity_page
from loraserve.capacity.plots import plots_of
from loraserve.capacity.tree import tree_of
from traces.plots import DARK, LIGHT
from traces.report_page import PlotImages

PAGE, FIGURES = "index.html", "capacity.json"


def write_report(folder: Path, found: Found, *, command: str) -> Path:
    """Write `capacity.json`, the plots and `index.html`, and give the page's path; OSError if the disk
    refuses."""
    tree = {**tree_of(found), "command": command}
    text = json.dumps(tree, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    (folder / FIGURES).write_text(text, encoding="utf-8")
    images = []
    for plot in plots_of(found):
        image = PlotImages(caption=plot.caption, light_png=plot.draw(LIGHT), dark_png=plot.draw(DARK))
        (folder / f"{plot.name}.png").write_bytes(image.light_png)
        images.append(image)
    path = folder / PAGE
    path.write_text(capacity_page(found, images, command=command), encoding="utf-8")
    return path
