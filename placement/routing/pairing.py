"""Which routing policy goes with a placement policy, where nobody says: the one its authors meant for it.

LoRAServe draws by its shares. Dynamo's router chooses among an adapter's replicas by load. An adapter of a
static placement has one holder, so that routing matters for the base model alone.
"""

AUTO = "auto"
"""The routing that `routing_for` is asked for."""

_ROUTING = {
    "loraserve": "weighted-share",
    "dlora": "dlora",
    "toppings": "toppings",
    "rank-backlog": "rank-backlog",
    "optimal": "marginal-cost",
    "optimal-from-scratch": "marginal-cost",
}


def routing_for(policy: str, routing: str = AUTO) -> str:
    """`routing` itself, or what goes with this placement policy if it is `AUTO`; for all that make no claim
    on routing that is least-outstanding."""
    return _ROUTING.get(policy, "least-outstanding") if routing == AUTO else routing
