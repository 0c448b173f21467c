"""One engine instance as a service: adapter pool, request accounting, gRPC server. No Ray in it."""
