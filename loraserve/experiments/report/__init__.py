"""The report of an experiment: tables for a terminal, plots, and one HTML page.

`aggregate` takes the seeds together, `claims` holds ours against what was published, `grids` are tables
before they are drawn, `tables` draws them for a terminal; `against`, `overviews` and `maps` are the plots, in
`looks`, and `plots` says which there are; `page` is the page, and `write` puts it all into a folder.
"""
