"""Which requests of an overloaded replica go where, with which adapters."""
