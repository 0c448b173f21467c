"""What crosses the wire: generated messages, their translation to values, statuses, servers."""
