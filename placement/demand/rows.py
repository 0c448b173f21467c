"""Numbers per adapter in numpy columns: adapters that are new are put in, those that are silent taken out."""

from collections.abc import Mapping, Sequence
from itertools import compress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from placement.types import VersionId

Floats = NDArray[np.float64]
Plain = Any
"""What JSON has: text, numbers, lists and objects of them."""


class Rows:
    """One row per adapter, in the order in which they came, those of one window by their names: the order of
    a window's own entries makes no difference.

    A column is float64 of shape (rows,), or (rows, width) where its width is above 1; a new row is all
    zeros. `num_windows` counts what was taken in.
    """

    def __init__(self, widths: Mapping[str, int], patience: int) -> None:
        self.num_windows = 0
        self._widths = dict(widths)
        self._patience = patience
        self._ids: list[VersionId] = []
        self._places: dict[VersionId, int] = {}
        self._silent = np.zeros(0, dtype=np.int64)
        self._columns = {name: self._zeros(name, 0) for name in widths}

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, column: str) -> Floats:
        return self._columns[column]

    def __setitem__(self, column: str, values: Floats) -> None:
        if values.shape != self._columns[column].shape:
            raise AssertionError(f"{column}: shape {values.shape} for {self._columns[column].shape}")
        self._columns[column] = values

    def take(self, window: Mapping[VersionId, float]) -> Floats:
        """One window more: its tokens per second, row by row.

        ValueError, with everything as it was, for what is no finite number from 0.
        """
        rates = np.fromiter(window.values(), dtype=np.float64, count=len(window))
        if not (np.isfinite(rates).all() and (rates >= 0).all()):
            version = next(one for one, rate in window.items() if not 0 <= rate < float("inf"))
            raise ValueError(f"{version}: {window[version]} tokens/s; expected a number from 0")
        places = self._places
        self._add(sorted(version for version, rate in window.items() if rate > 0 and version not in places))
        spare = len(self._ids)
        tokens = np.zeros(spare + 1)
        # One place more for the silent ones that are not kept.
        tokens[np.fromiter((places.get(one, spare) for one in window), np.int64, count=len(window))] = rates
        tokens = tokens[:spare]
        self._silent = np.where(tokens > 0, 0, self._silent + 1)
        self.num_windows += 1
        return self._forget(tokens)

    def named(self, values: Floats) -> dict[VersionId, float]:
        """The values by their adapters."""
        return dict(zip(self._ids, values.tolist(), strict=True))

    def export(self) -> dict[str, Plain]:
        """Everything as JSON has it."""
        return {
            "windows": self.num_windows,
            "versions": list(self._ids),
            "silent": self._silent.tolist(),
            "columns": {name: column.tolist() for name, column in self._columns.items()},
        }

    def restore(self, state: Mapping[str, Plain]) -> None:
        """What `export` gave; ValueError if the columns are others, or not as long as there are adapters."""
        try:
            ids = [VersionId(str(version)) for version in state["versions"]]
            silent = np.array(state["silent"], dtype=np.int64)
            columns = {
                name: np.array(values, dtype=np.float64).reshape(self._shape(name, len(ids)))
                for name, values in state["columns"].items()
            }
            num_windows = int(state["windows"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"not the state of these rows: {error}") from error
        if columns.keys() != self._columns.keys() or silent.shape != (len(ids),):
            raise ValueError(f"columns {', '.join(columns)}; expected {', '.join(self._columns)}")
        self.num_windows, self._ids, self._silent, self._columns = num_windows, ids, silent, columns
        self._places = {version: place for place, version in enumerate(ids)}

    def _add(self, new: Sequence[VersionId]) -> None:
        if not new:
            return
        for version in new:
            self._places[version] = len(self._ids)
            self._ids.append(version)
        self._silent = np.concatenate((self._silent, np.zeros(len(new), dtype=np.int64)))
        for name, column in self._columns.items():
            self._columns[name] = np.concatenate((column, self._zeros(name, len(new))))

    def _forget(self, tokens: Floats) -> Floats:
        kept = self._silent <= self._patience
        if kept.all():
            return tokens
        self._ids = list(compress(self._ids, kept.tolist()))
        self._places = {version: place for place, version in enumerate(self._ids)}
        self._silent = self._silent[kept]
        self._columns = {name: column[kept] for name, column in self._columns.items()}
        return tokens[kept]

    def _zeros(self, name: str, num_rows: int) -> Floats:
        return np.zeros(self._shape(name, num_rows))

    def _shape(self, name: str, num_rows: int) -> tuple[int, ...]:
        width = self._widths[name]
        return (num_rows,) if width == 1 else (num_rows, width)
