"""How published bytes get from one process to another: one protocol (`base.py`), several schemes."""
