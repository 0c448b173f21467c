"""The adapter fabric of a replica: where an adapter's bytes are, and how they come here."""
