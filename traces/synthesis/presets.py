"""Workloads of published evaluations, by name.

What LoRAServe evaluated is from its first author's public artifact (shashwatj07/S-LoRA), the others
from their papers as far as `source` says. Where lengths are Azure's they come from the table that ships.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

from traces.synthesis.arrivals import Bursty, Gamma
from traces.synthesis.drift import Slide
from traces.synthesis.lengths import Azure, Limits, Lognormal, Production, UniformLengths
from traces.synthesis.popularity import (
    Blocks,
    ByRank,
    Geometric,
    Popularity,
    Power,
    RankPower,
    RankShares,
    Stretched,
    Zipf,
)
from traces.synthesis.ranks import DrawnRanks, EqualRanks, WeightedRanks
from traces.synthesis.spec import WorkloadSpec
from traces.types import TraceError


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """A named workload; `rates` says how many requests per second a number of adapters gets, unless
    another rate is asked for."""

    summary: str
    make: Callable[[], WorkloadSpec]
    rates: tuple[tuple[int, float], ...]
    duration_s: float

    def spec(self, name: str, num_adapters: int | None) -> WorkloadSpec:
        """The workload with so many adapters, or as many as it has by itself."""
        number = num_adapters or self.rates[0][0]
        rate_per_s = max((pair for pair in self.rates if pair[0] <= number), default=self.rates[0])[1]
        return replace(
            self.make(),
            name=name,
            num_adapters=number,
            num_requests=round(rate_per_s * self.duration_s),
            duration_s=self.duration_s,
        )


def _base() -> WorkloadSpec:
    """Number and time are put in by the preset."""
    return WorkloadSpec(num_requests=1, duration_s=1.0)


def _loraserve() -> WorkloadSpec:
    limits = Limits(max_prompt_tokens=1024, max_output_tokens=256, over="redraw")
    return replace(_base(), lengths=Azure(), limits=limits)


def _loraserve_skew() -> WorkloadSpec:
    return replace(_loraserve(), popularity=ByRank(weights_of=((128, 4.0),)))


def _loraserve_skewslide() -> WorkloadSpec:
    return replace(_loraserve_skew(), drift=Slide())


def _loraserve_pareto() -> WorkloadSpec:
    return replace(_loraserve(), popularity=Zipf(exponent=1.5))


def _loraserve_bursty() -> WorkloadSpec:
    return replace(_loraserve(), arrivals=Bursty())


def _loraserve_power(alpha: float) -> WorkloadSpec:
    return replace(_loraserve(), popularity=RankPower(alpha=alpha))


def _loraserve_production() -> WorkloadSpec:
    return replace(
        _base(),
        lengths=Production(),
        ranks=WeightedRanks(weights_of=((8, 16.0), (16, 12.0), (32, 10.0))),
        popularity=RankShares(shares_of=((8, 57.0), (16, 34.0), (32, 9.0))),
    )


def _slora() -> WorkloadSpec:
    return replace(
        _base(),
        arrivals=Gamma(cv=1.0),
        popularity=Power(alpha=1.0),
        lengths=UniformLengths(),
        ranks=EqualRanks(of=(8, 16, 32, 64)),
    )


def _sharegpt() -> Lognormal:
    """Means of 161 and 338 tokens, as the vLLM paper (SOSP'23) has them of ShareGPT; the spread is ours."""
    return Lognormal(prompt_median=68.0, prompt_sigma=1.3, output_median=225.0, output_sigma=0.9)


def _dlora(stride: int) -> WorkloadSpec:
    return replace(
        _base(),
        arrivals=Gamma(cv=1.0),
        popularity=Blocks(functions=1_000, stride=stride),
        lengths=_sharegpt(),
        limits=Limits(max_prompt_tokens=1024, max_output_tokens=1024),
        ranks=EqualRanks(of=(16,)),
    )


def _toppings() -> WorkloadSpec:
    return replace(_base(), popularity=Stretched(), ranks=DrawnRanks(of=(8, 16, 32, 64)))


def _chameleon() -> WorkloadSpec:
    return replace(_base(), popularity=RankPower(alpha=0.0, inside=Zipf(exponent=1.0)))


def _one_rank(popularity: Popularity, rank: int) -> WorkloadSpec:
    return replace(_base(), popularity=popularity, ranks=EqualRanks(of=(rank,)))


_LORASERVE_RATES = ((25, 28.0), (50, 32.0), (100, 58.0), (150, 96.0))
_ALPHA = re.compile(r"loraserve-powerlaw-(-?[0-9]{1,2}(?:\.[0-9]{1,6})?)", re.ASCII)


def _of_loraserve(summary: str, make: Callable[[], WorkloadSpec]) -> Preset:
    return Preset(summary=summary, make=make, rates=_LORASERVE_RATES, duration_s=900.0)


def _powerlaw(alpha: float) -> Preset:
    summary = f"LoRAServe, requests per rank in the ratio k^{alpha:g} for the k-th smallest rank"
    return _of_loraserve(summary, partial(_loraserve_power, alpha))


PRESETS: Mapping[str, Preset] = {
    "loraserve-uniform": _of_loraserve(
        "LoRAServe's default: ranks 8 to 128 in equal parts, all adapters equally popular, Azure lengths up "
        "to 1024 and 256",
        _loraserve,
    ),
    "loraserve-skew": _of_loraserve(
        "LoRAServe, each adapter of rank 128 four times as popular as any other", _loraserve_skew
    ),
    "loraserve-skewslide": _of_loraserve(
        "LoRAServe, popularity slides from rank 128 to rank 8 over the run", _loraserve_skewslide
    ),
    "loraserve-pareto": _of_loraserve(
        "LoRAServe's 'pareto': the k-th adapter weighs k^-1.5, independent of rank", _loraserve_pareto
    ),
    "loraserve-bursty": _of_loraserve(
        "LoRAServe, 65 to 80 % of the requests inside bursts", _loraserve_bursty
    ),
    **{f"loraserve-powerlaw-{alpha}": _powerlaw(alpha) for alpha in (-2, -1, 0, 1, 2)},
    "loraserve-production": Preset(
        summary="like LoRAServe's sanitised production trace: 57 % rank 8, 34 % rank 16, 9 % rank 32",
        make=_loraserve_production,
        rates=((50, 25.0),),
        duration_s=600.0,
    ),
    "slora": Preset(
        summary="S-LoRA's synthetic workload: power law (alpha 1), lengths 8 to 512, ranks 8 to 64",
        make=_slora,
        rates=((200, 2.0),),
        duration_s=300.0,
    ),
    **{
        f"dlora-stride-{stride}": Preset(
            summary=f"dLoRA: functions in blocks of {stride} per adapter, rank 16, lengths about ShareGPT's",
            make=partial(_dlora, stride),
            rates=((8, 4.0), (32, 12.0), (128, 48.0)),
            duration_s=600.0,
        )
        for stride in (4, 8, 16, 32)
    },
    "toppings": Preset(
        summary="Toppings: popularity of Azure functions (fitted), ranks 8 to 64 drawn for each adapter",
        make=_toppings,
        rates=((512, 9.0),),
        duration_s=600.0,
    ),
    "chameleon": Preset(
        summary="Chameleon: five ranks with equal shares, Zipf inside each, Azure lengths",
        make=_chameleon,
        rates=((100, 8.0),),
        duration_s=600.0,
    ),
    "punica": Preset(
        summary="Punica's 'zipf': each adapter 1.5 times as popular as the next, all of rank 16",
        make=partial(_one_rank, Geometric(ratio=1.5), 16),
        rates=((32, 8.0),),
        duration_s=600.0,
    ),
    "infinilora": Preset(
        summary="InfiniLoRA's popularity: 512 adapters under Zipf 1.2, rank 32; lengths are Azure's here",
        make=partial(_one_rank, Zipf(exponent=1.2), 32),
        rates=((512, 25.0),),
        duration_s=600.0,
    ),
}
"""Every preset. `loraserve-powerlaw-A` takes any exponent A from -10 to 10 as well."""


def preset(name: str) -> Preset:
    """The preset of a name; TraceError lists those there are."""
    if name in PRESETS:
        return PRESETS[name]
    match = _ALPHA.fullmatch(name)
    if match:
        return _powerlaw(float(match[1]))
    raise TraceError(f"no preset is called {name[:80]!r}; there are: {', '.join(PRESETS)}")
