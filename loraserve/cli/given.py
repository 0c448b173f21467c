"""What `simulate` and `capacity` read from their command lines alike, and the folder that both write into."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loraserve.cli.common import ended_by_sigterm
from loraserve.errors import BadInputError, WorkFailedError


def names_of(text: str, option: str) -> tuple[str, ...]:
    """The names between commas, each once; BadInputError if there is none."""
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise BadInputError(f"{option}: {text!r}; expected one or more names with commas between")
    return names


def seeds_of(text: str, most: int) -> tuple[int, ...]:
    """The seeds between commas, each once; BadInputError if they are none, or more than `most`."""
    try:
        seeds = tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        seeds = (-1,)
    if min(seeds) < 0 or max(seeds) >= 2**63 or len(seeds) > most:
        raise BadInputError(
            f"--seeds: {text[:80]!r}; expected up to {most:,} whole numbers from 0, with commas between"
        )
    return seeds


@contextmanager
def staged_out(out: Path | None) -> Iterator[Path | None]:
    """A folder to write into that becomes `out` only if all went well, also when a signal ends us."""
    from loraserve.simulator.report import staged

    with ended_by_sigterm():
        if out is None:
            yield None
            return
        has_begun = False
        try:
            with staged(out) as stage:
                has_begun = True
                yield stage
        except OSError as error:
            kind = WorkFailedError if has_begun else BadInputError
            raise kind(f"--out: {out}: cannot be written: {error.strerror or error}") from error
