"""The stateless gRPC front: admits a request, chooses a replica, passes bytes both ways.

`loraserve.router.router.Router` is the class; `python -m loraserve.router` runs one by itself.
"""
