"""Contenders: a placement policy with the routing policy and the forecast that its authors meant for it, as
one name."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from loraserve.errors import BadInputError
from placement.demand import DEFAULT_FORECASTER, FORECASTERS
from placement.policies import POLICIES
from placement.routing.chooser import ROUTING_POLICIES


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """Names of a placement policy, a routing policy and a forecaster, and of a migration, see `Scenario`."""

    name: str
    policy: str
    routing: str
    forecast: str = DEFAULT_FORECASTER
    migration: str = "off"


CONTENDERS = (
    Contender(name="optimal", policy="optimal", routing="marginal-cost"),
    Contender(name="optimal-from-scratch", policy="optimal-from-scratch", routing="marginal-cost"),
    Contender(name="loraserve", policy="loraserve", routing="weighted-share", forecast="loraserve"),
    Contender(name="least-loaded", policy="least-loaded", routing="least-outstanding"),
    Contender(name="everywhere-marginal", policy="least-loaded", routing="marginal-cost"),
    Contender(name="slora-random", policy="slora-random", routing="least-outstanding"),
    Contender(name="slora-contiguous", policy="slora-contiguous", routing="least-outstanding"),
    Contender(name="rendezvous", policy="rendezvous", routing="least-outstanding", forecast="ema"),
    Contender(name="dlora", policy="dlora", routing="dlora"),
    Contender(name="toppings", policy="toppings", routing="toppings"),
    Contender(name="rank-backlog", policy="rank-backlog", routing="rank-backlog"),
)
"""`optimal-from-scratch` is no rival: it shows what keeping to the present plan costs."""

MIGRATING = Contender(name="dlora-migrating", policy="dlora", routing="dlora", migration="dlora")
"""dLoRA with its reactive step, which `dlora` leaves to the cluster's settings."""

_BY_NAME: Mapping[str, Contender] = {one.name: one for one in (*CONTENDERS, MIGRATING)}


def contenders(names: Iterable[str], where: str = "--policy") -> tuple[Contender, ...]:
    """The contenders asked for; `POLICY/ROUTING[/FORECAST]` makes one.

    BadInputError begins with `where` and lists those there are.
    """
    return tuple(_contender(name, where) for name in names)


def _contender(name: str, where: str) -> Contender:
    if name in _BY_NAME:
        return _BY_NAME[name]
    policy, _, rest = name.partition("/")
    routing, _, named = rest.partition("/")
    forecast = named or DEFAULT_FORECASTER
    if policy in POLICIES and routing in ROUTING_POLICIES and forecast in FORECASTERS:
        return Contender(name=name, policy=policy, routing=routing, forecast=forecast)
    there = ", ".join([*_BY_NAME, "or POLICY/ROUTING[/FORECAST]"])
    raise BadInputError(f"{where}: {name!r}; expected of {there}")
