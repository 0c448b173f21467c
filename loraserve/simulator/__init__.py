"""The cluster in virtual time: the live cluster's own decisions around the replica model."""
