"""What replicas cost."""

from dataclasses import dataclass

S_PER_HOUR = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """`per_gpu_hour` in whatever currency; a replica has `gpus_per_replica`."""

    per_gpu_hour: float
    gpus_per_replica: int = 1

    def per_hour(self, num_replicas: int) -> float:
        """Of so many replicas."""
        return num_replicas * self.gpus_per_replica * self.per_gpu_hour

    def per_million_tokens(self, num_replicas: int, tokens_per_s: float) -> float | None:
        """Of what they serve at this rate; None for none."""
        if tokens_per_s <= 0:
            return None
        return self.per_hour(num_replicas) / (tokens_per_s * S_PER_HOUR) * 1e6
