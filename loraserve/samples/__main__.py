"""`python -m loraserve.samples DIR [--json]`: build the sample set and say where it is."""

import argparse
import json
import sys
from pathlib import Path

from loraserve.errors import BadInputError, LoraServeError
from loraserve.samples.build import DEFAULT_RANKS, build_samples


def main(arguments: list[str] | None = None) -> int:
    """Run the command; 0 done, 1 failed, 2 bad input."""
    parser = argparse.ArgumentParser(prog="python -m loraserve.samples", description=__doc__)
    parser.add_argument("directory", type=Path, help="folder to build in; made if absent, reused if current")
    parser.add_argument("--seed", type=int, default=0, help="seed of all weights (default 0)")
    parser.add_argument("--ranks", type=int, nargs="+", default=list(DEFAULT_RANKS), help="one adapter each")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    try:
        samples = build_samples(options.directory, ranks=options.ranks, seed=options.seed)
    except LoraServeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, BadInputError) else 1
    adapters = {name: str(path) for name, path in samples.adapters.items()}
    if options.json:
        print(json.dumps({"model": str(samples.model), "adapters": adapters}))
    else:
        print(f"model    {samples.model}")
        for name, path in adapters.items():
            print(f"adapter  {name:10} {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
