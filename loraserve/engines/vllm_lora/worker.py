"""What a replica calls in vLLM's workers, by `collective_rpc`: plain values in, plain values out.

vLLM mixes this class into its worker (`worker_extension_cls`). Each call runs between two engine steps, so
each one is short: what takes long happens in the pool's thread, or piece by piece.
"""

from typing import Any

from loraserve.adapters.segment import SegmentError, SegmentRef

PREPARING, READY, ACTIVE, FAILED = "preparing", "ready", "active", "failed"


class WorkerExtension:
    """Methods that LoRAServe adds to vLLM's worker."""

    model_runner: Any

    @property
    def loraserve_manager(self) -> Any:
        """Our LoRA manager; RuntimeError if vLLM made its own, as it does when it did not find our plugin."""
        manager = self.model_runner.lora_manager
        if not hasattr(manager, "pool"):
            raise RuntimeError(
                f"vLLM made its own {type(manager).__name__}: it did not find loraserve's entry point in "
                "vllm.general_plugins; install loraserve again"
            )
        return manager

    def loraserve_open(
        self, lora_id: int, pid: int, fd: int, size_bytes: int, head_sha256: str, is_busy: bool
    ) -> None:
        """Begin to map an adapter's segment and to prepare it; `loraserve_advance` tells how that went.

        `is_busy`: requests run, for which this makes room.
        """
        pool = self.loraserve_manager.pool
        pool.is_busy = is_busy
        pool.open(lora_id, SegmentRef(pid=pid, fd=fd, size_bytes=size_bytes, head_sha256=head_sha256))

    def loraserve_advance(self, lora_id: int, activate: bool, is_busy: bool) -> tuple[str, str]:
        """Bring an adapter one piece further: checked and prepared, then, if `activate`, into a slot.

        `is_busy` as for `loraserve_open`, as it is now. The state the adapter is in now, and the reason if
        that is FAILED.
        """
        manager = self.loraserve_manager
        manager.pool.is_busy = is_busy
        try:
            if not manager.pool.begin(lora_id):
                return PREPARING, ""
            if activate and manager.write_piece(lora_id):
                return ACTIVE, ""
        except (SegmentError, ValueError, RuntimeError, KeyError) as error:
            return FAILED, f"{type(error).__name__}: {error}"
        return READY, ""

    def loraserve_deactivate(self, lora_id: int) -> None:
        """Free the adapter's slot; one without a slot is no error. Its prepared form goes as well."""
        self.loraserve_manager.deactivate(lora_id)

    def loraserve_close(self, lora_id: int) -> None:
        """Free the adapter's slot and its mapping; one that is not here is no error."""
        manager = self.loraserve_manager
        manager.deactivate(lora_id)
        manager.pool.close(lora_id)

    def loraserve_report(self) -> dict[str, Any]:
        """The pool's adapters with their bytes, the active ones with their slots, and the slots' memory."""
        manager = self.loraserve_manager
        slots = manager.model_manager.lora_index_to_id
        return {
            "pool": dict(manager.pool.sizes_bytes()),
            "active": {lora_id: slot for slot, lora_id in enumerate(slots) if lora_id is not None},
            **manager.model_manager.slot_memory(),
        }
