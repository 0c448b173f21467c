"""Writing a comparison of simulations to a folder: plots and one HTML page, beside the runs' own files.

Also owns that a folder is there whole or not at all.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loraserve.simulator.figures import RunFigures
from loraserve.simulator.page import comparison_page
from loraserve.simulator.plots import comparison_plots, run_plots
from traces.plots import DARK, LIGHT, Plot
from traces.report_page import PlotImages
from traces.summary_json import summary_to_json

PAGE, SUMMARY = "index.html", "summary.json"
MAX_RUNS_DRAWN = 12


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder` to write into, whose entries are put there in the end.

    What is written under an error or an interrupt goes, and `folder` stays as it was; of what it held
    before, only entries of the same names are replaced. OSError if the disk refuses.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(20, "is a file; expected a folder", str(folder))
    stage = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield stage
        folder.mkdir(exist_ok=True)
        for entry in sorted(stage.iterdir()):
            _put(entry, folder / entry.name)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _put(entry: Path, place: Path) -> None:
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place)
    os.replace(entry, place)


def write_comparison(
    folder: Path,
    runs: Mapping[str, RunFigures],
    names: Mapping[str, str],
    *,
    title: str,
    command: str,
    workload: Mapping[str, str],
) -> Path:
    """Write `summary.json`, the plots and `index.html`; `names` are the folders of the runs, by label.

    The first MAX_RUNS_DRAWN runs get plots of their own. Returns the page's path; OSError if the disk
    refuses.
    """
    tree = {
        "title": title,
        "command": command,
        "runs": [{"label": label, "folder": names[label], **run_to_json(run)} for label, run in runs.items()],
    }
    text = json.dumps(tree, indent=2, allow_nan=False) + "\n"
    (folder / SUMMARY).write_text(text, encoding="utf-8")
    comparison = [_draw(plot, folder) for plot in comparison_plots(runs)]
    images = {}
    for label, run in list(runs.items())[:MAX_RUNS_DRAWN]:
        place = folder / names[label]
        place.mkdir(exist_ok=True)
        images[label] = [_draw(plot, place) for plot in run_plots(run)]
    html = comparison_page(runs, comparison, images, title=title, command=command, workload=workload)
    path = folder / PAGE
    path.write_text(html, encoding="utf-8")
    return path


def run_to_json(run: RunFigures) -> dict[str, Any]:
    """A run's figures, with the keys of `vllm bench serve` where it has one; no time of this machine."""
    return {
        "policy": run.policy,
        "routing": run.routing,
        "seed": run.seed,
        "requests": run.num_requests,
        "utilisation": run.utilisation,
        "copies": run.copies,
        "bytes_moved": run.bytes_moved,
        "cold_misses": run.cold_misses,
        "events": run.num_events,
        **summary_to_json(run.summary),
        "scenario": dict(run.scenario),
    }


def _draw(plot: Plot, folder: Path) -> PlotImages:
    image = PlotImages(caption=plot.caption, light_png=plot.draw(LIGHT), dark_png=plot.draw(DARK))
    (folder / f"{plot.name}.png").write_bytes(image.light_png)
    return image
