"""Writing what a run gave to a folder: records, summary, plots and one HTML page.

The only module here that touches the disk for reports.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from traces.metrics import Summary, formulas
from traces.plots import DARK, LIGHT, plots_of
from traces.records import RequestRecord, write_records
from traces.report_page import PlotImages, page
from traces.summary_json import summary_to_json


def write_report(
    out_dir: str | Path,
    records: Sequence[RequestRecord],
    summary: Summary,
    *,
    title: str,
    command: str,
    environment: Mapping[str, str],
) -> tuple[Path, ...]:
    """Write `records.jsonl`, `summary.json`, one PNG per plot and a self-contained `report.html`.

    Makes the folder, replaces files of these names, leaves others alone; returns the paths, the page
    last. Records that are empty give a page that says so. OSError if the disk refuses.
    """
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "records.jsonl", folder / "summary.json"]
    write_records(paths[0], records)
    tree = {
        "title": title,
        "command": command,
        "environment": dict(environment),
        **summary_to_json(summary),
        "formulas": formulas(),
    }
    paths[1].write_text(json.dumps(tree, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    images = []
    for plot in plots_of(records, summary.slo):
        image = PlotImages(caption=plot.caption, light_png=plot.draw(LIGHT), dark_png=plot.draw(DARK))
        images.append(image)
        paths.append(folder / f"{plot.name}.png")
        paths[-1].write_bytes(image.light_png)
    paths.append(folder / "report.html")
    html = page(summary, records, images, title=title, command=command, environment=environment)
    paths[-1].write_text(html, encoding="utf-8")
    return tuple(paths)
