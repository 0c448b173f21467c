"""What runs inside vLLM's own processes: the one package that touches vLLM's internals."""
