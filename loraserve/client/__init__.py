"""The asyncio client of a LoRAServe cluster: generate, manage adapters, ask for the state.

    async with Client("127.0.0.1:50051") as client:
        stream = client.generate("Hello", adapter="support")
        async for step in stream:
            print(step.text, end="", flush=True)

Given several routers it uses another one when one is lost. It asks a router where a request should go
and sends it to that replica itself where it can (look-aside), else through the router. A stream whose
replica or router dies goes on elsewhere, unseen by its reader, whenever that can be done exactly.

Knows the public protocol only. Every failure is one of `loraserve.errors`.
"""

from loraserve.client.client import Client
from loraserve.client.stream import Completion, GenerationStream

__all__ = ["Client", "Completion", "GenerationStream"]
