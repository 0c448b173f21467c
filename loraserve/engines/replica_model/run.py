"""Steps to come, as a batch plans them."""

from loraserve.engines.replica_model.sequence import Sequence


class Run:
    """Steps to come in which nobody joins or leaves: the first takes `step_ps`, each further one
    `growth_ps` more than the one before. `chunks` are (sequence, prompt tokens), in a run of one step."""

    __slots__ = ("chunks", "growth_ps", "max_rank", "prefill_tokens", "step_ps", "steps", "taken")

    def __init__(self) -> None:
        self.steps = 0
        self.step_ps = 0
        self.growth_ps = 0
        self.max_rank = 0
        self.prefill_tokens = 0
        # Blocks of the prefix cache's queue that decoding rows have taken already.
        self.taken = 0
        self.chunks: list[tuple[Sequence, int]] = []
