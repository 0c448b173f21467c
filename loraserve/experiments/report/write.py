"""Writing the report of an experiment to a folder, whole or not at all."""

from pathlib import Path

from loraserve.errors import WorkFailedError
from loraserve.experiments.report.aggregate import aggregate
from loraserve.experiments.report.claims import claims_found
from loraserve.experiments.report.page import experiment_page
from loraserve.experiments.report.plots import choose_plots
from loraserve.experiments.results import ExperimentResult
from loraserve.simulator.report import staged
from traces.plots import DARK, LIGHT
from traces.report_page import PlotImages

PAGE, PLOTS = "report.html", "plots"


def write_report(result: ExperimentResult, folder: Path, *, command: str) -> Path:
    """Write `report.html`, which stands by itself, and its plots as PNG files under `plots`.

    The same result and command give the same bytes. Makes the folder, replaces these two in it and leaves
    the rest alone; returns the page's path. WorkFailedError if the disk refuses, with nothing changed.
    """
    data = aggregate(result)
    chosen = choose_plots(data)
    images = []
    files = {}
    for one in chosen.plots:
        light_png, dark_png = one.plot.draw(LIGHT), one.plot.draw(DARK)
        files[one.plot.name] = light_png
        image = PlotImages(caption=one.plot.caption, light_png=light_png, dark_png=dark_png)
        images.append((one.heading, image))
    html = experiment_page(data, claims_found(data), images, chosen.left_out, command=command)
    try:
        with staged(folder) as stage:
            (stage / PLOTS).mkdir()
            for name, png in files.items():
                (stage / PLOTS / f"{name}.png").write_bytes(png)
            (stage / PAGE).write_text(html, encoding="utf-8")
    except OSError as error:
        raise WorkFailedError(f"{folder}: cannot be written: {error.strerror or error}") from error
    return folder / PAGE
