"""What the Ray actors and placement groups of a cluster are called: by their names they are found again."""

NAMESPACE = "loraserve"


def actor_name(cluster: str, name: str) -> str:
    """The Ray name of one of a cluster's actors, in NAMESPACE."""
    return f"{cluster}/{name}"


def group_name(cluster: str, name: str) -> str:
    """The Ray name of a replica's placement group; Ray lists those without their namespace."""
    return f"{NAMESPACE}/{cluster}/{name}"
