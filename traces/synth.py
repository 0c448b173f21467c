"""The small seeded workloads that ship; `traces.synthesis` makes those to evaluate with.

`python -m traces.synth --help` writes one to a file; the bundled traces are made so. The same spec
gives the same trace on every machine, so nothing here may change.
"""

import argparse
import math
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

from traces.assign import AdapterRef, assign_adapters
from traces.types import Trace, TraceError, TraceRequest
from traces.write import write_trace


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """A lognormal number of tokens around `median_tokens`, clipped to a range."""

    median_tokens: float
    sigma: float
    min_tokens: int
    max_tokens: int

    def __post_init__(self) -> None:
        if not 1 <= self.min_tokens <= self.median_tokens <= self.max_tokens or not 0 <= self.sigma <= 10:
            right = "it needs 1 <= min <= median <= max tokens and a sigma from 0 to 10"
            raise TraceError(f"lengths of {self} are not possible; {right}")

    def draw(self, rng: random.Random) -> int:
        """One length."""
        # random() may be 0, where inv_cdf is not defined.
        normal = NormalDist().inv_cdf(max(rng.random(), 2**-53))
        drawn = self.median_tokens * math.exp(self.sigma * normal)
        return round(min(max(drawn, self.min_tokens), self.max_tokens))


@dataclass(frozen=True, slots=True, kw_only=True)
class SynthSpec:
    """A workload to synthesise; adapters in order of popularity, under Zipf's law."""

    num_requests: int
    duration_s: float
    adapters: tuple[AdapterRef, ...]
    prompt: Lengths
    output: Lengths
    arrivals: str = "poisson"
    zipf: float = 1.0
    base_share: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_requests < 1:
            raise TraceError(f"{self.num_requests} requests are no workload; it needs at least 1")
        if not 0 < self.duration_s < math.inf:
            raise TraceError(f"a duration of {self.duration_s} s is not possible; it must be above 0")
        if self.arrivals not in ARRIVALS:
            raise TraceError(f"no arrivals are called {self.arrivals!r}; there are: {', '.join(ARRIVALS)}")


def _poisson(spec: SynthSpec, rng: random.Random) -> Iterator[float]:
    """Given its count, a Poisson process is that many uniform points in order."""
    return iter(sorted(rng.random() * spec.duration_s for _ in range(spec.num_requests)))


def _uniform(spec: SynthSpec, rng: random.Random) -> Iterator[float]:
    return (index * spec.duration_s / spec.num_requests for index in range(spec.num_requests))


ARRIVALS: dict[str, Callable[[SynthSpec, random.Random], Iterator[float]]] = {
    "poisson": _poisson,
    "uniform": _uniform,
}


def synthesise(spec: SynthSpec) -> Trace:
    """The workload of a spec; arrivals are rounded to the microsecond."""
    rng = random.Random(spec.seed)
    arrivals = list(ARRIVALS[spec.arrivals](spec, rng))
    trace = Trace.of(
        (
            TraceRequest(
                index=index,
                arrival_s=round(arrival_s - arrivals[0], 6),
                prompt_tokens=spec.prompt.draw(rng),
                output_tokens=spec.output.draw(rng),
            )
            for index, arrival_s in enumerate(arrivals)
        ),
        source=f"synthetic, seed {spec.seed}",
        format="synthetic",
    )
    return assign_adapters(
        trace, spec.adapters, method="zipf", parameter=spec.zipf, seed=spec.seed, base_share=spec.base_share
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m traces.synth", description="Write a synthetic trace.")
    parser.add_argument("out", type=Path, help="the file to write; .gz compresses it")
    parser.add_argument("--requests", type=int, default=120)
    parser.add_argument("--duration-s", type=float, default=60.0)
    parser.add_argument("--arrivals", default="poisson", help="poisson or uniform")
    parser.add_argument(
        "--ranks", default="8,16,32,64,128", help="one adapter rank-N per rank, popular first"
    )
    parser.add_argument("--zipf", type=float, default=1.0, help="exponent of the adapters' popularity")
    parser.add_argument("--base-share", type=float, default=0.1, help="share of base-model requests")
    parser.add_argument("--prompt", default="40,0.5,16,96", help="median,sigma,min,max tokens")
    parser.add_argument("--output", default="16,0.4,8,32", help="median,sigma,min,max tokens")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def _lengths(text: str) -> Lengths:
    try:
        median, sigma, low, high = text.split(",")
        return Lengths(
            median_tokens=float(median), sigma=float(sigma), min_tokens=int(low), max_tokens=int(high)
        )
    except ValueError as error:
        raise TraceError(f"{text!r} is no length; expected median,sigma,min,max like 40,0.5,16,96") from error


def _adapters(text: str) -> tuple[AdapterRef, ...]:
    try:
        ranks = [int(rank) for rank in text.split(",") if rank]
    except ValueError as error:
        raise TraceError(f"{text!r} are no ranks; expected whole numbers like 8,16,32") from error
    return tuple(AdapterRef(name=f"rank-{rank}", rank=rank) for rank in ranks)


def main(arguments: list[str] | None = None) -> int:
    """The command; 2 on bad input, with one line on stderr."""
    flags = _parser().parse_args(arguments)
    try:
        spec = SynthSpec(
            num_requests=flags.requests,
            duration_s=flags.duration_s,
            adapters=_adapters(flags.ranks),
            prompt=_lengths(flags.prompt),
            output=_lengths(flags.output),
            arrivals=flags.arrivals,
            zipf=flags.zipf,
            base_share=flags.base_share,
            seed=flags.seed,
        )
        write_trace(synthesise(spec), flags.out)
    except (TraceError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
