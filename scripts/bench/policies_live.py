"""The comparison on the emulated cluster: Ray, controller, router, and replicas that sleep for each step.

Every run has a cluster of its own, started fresh with the contender's placement, routing and forecast, and
is sent the same requests at their times; the simulator runs them too, under the same settings. A run whose
pacing error is above 10 ms at the 99th percentile is void, and is made once more. Bytes are seen by asking
the cluster twice a second what its replicas hold: a copy that comes and goes in between is not seen.
"""

import asyncio
import contextlib
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import Any

import bench_common as common
import policies_cases as cases
import policies_ratios as ratios
from policies_cases import Case, Outcome, Setting

from loraserve.client import Client
from loraserve.cluster.processes import processes_of
from loraserve.errors import LoraServeError
from loraserve.fidelity.live import LiveCluster
from loraserve.folders import cache_dir
from loraserve.profiling.files import find_simulatable, write_profile
from loraserve.samples import build_adapter, build_samples
from placement.profile import Profile
from traces.metrics import summarise

KV_BYTES_PER_TOKEN = 4096
LOOK_EVERY_S = 0.5
ATTEMPTS = 2
LOAD_S = 0.1
"""An adapter of the highest rank takes so long into an engine."""

CONFIG = """
[cluster]
name = "{{cluster}}"
replicas = {replicas}
[model]
path = "{model}"
[engine]
kind = "emulated"
max_lora_rank = {rank}
adapter_slots = {slots}
max_num_seqs = {rows}
max_num_batched_tokens = {batched}
kv_cache_bytes = {kv_bytes}
[emulated]
kernel = "{kernel}"
base_step_ms = {base}
prefill_token_ms = {prefill}
decode_seq_ms = {row}
rank_seq_ms = {rank_row}
rank_token_ms = {rank_token}
load_bytes_per_s = {load_bytes_per_s}
kv_bytes_per_token = {kv_per_token}
speed = {speed}
[placement]
policy = "{policy}"
profile = "{profile}"
max_lora_ranks = "{max_lora_ranks}"
epoch_s = {epoch_s}
window_s = {window_s}
history_s = {history_s}
forecast = "{forecast}"
[router]
port = 0
routers = {routers}
routing = "{routing}"
early_refusal = false
"""


@dataclass(slots=True)
class Held:
    """What replicas were seen to hold over a run, after its warm-up."""

    sizes: dict[str, int] = field(default_factory=dict)
    bytes_moved: int = 0
    resident_bytes: list[int] = field(default_factory=list)
    before: dict[str, frozenset[str]] = field(default_factory=dict)

    async def watch(self, addresses: Sequence[str], warmup_s: float) -> None:
        """Look again and again, until cancelled."""
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        async with Client(addresses) as client:
            while True:
                with contextlib.suppress(LoraServeError):
                    await self._look(client, counts=loop.time() - began_s >= warmup_s)
                await asyncio.sleep(LOOK_EVERY_S)

    async def _look(self, client: Client, *, counts: bool) -> None:
        status = await client.status()
        self.sizes |= {one.version: one.size_bytes for one in status.adapters}
        held = {one.replica_id: frozenset(one.resident) for one in status.replicas}
        if counts:
            self.resident_bytes.append(sum(self.sizes.get(one, 0) for own in held.values() for one in own))
            self.bytes_moved += sum(
                self.sizes.get(one, 0)
                for replica, own in held.items()
                for one in own - self.before.get(replica, own)
            )
        self.before = held


def live(
    setting: Setting,
    workload: cases.Workload,
    contenders: Sequence[cases.Contender],
    rates: Sequence[float],
    seeds: Sequence[int],
    note: Callable[[str], None],
) -> dict[str, Any]:
    """The comparison at these rates; every run on a cluster of its own."""
    runs: list[Outcome] = []
    simulated: list[Outcome] = []
    void: list[str] = []
    with tempfile.TemporaryDirectory(prefix="loraserve-policies-") as folder:
        ground = _Ground(Path(folder), setting)
        for rate in rates:
            for seed in seeds:
                for one in contenders:
                    case = Case(contender=one, workload=workload, rate_per_s=rate, seed=seed, setting=setting)
                    outcome, why_void = ground.run(case, note)
                    runs.append(outcome)
                    simulated.append(cases.run_case(case))
                    void += [f"{one.name} at {rate:g}, seed {seed}: {why_void}"] if why_void else []
    return {
        "fluid_rate_per_s": cases.fluid_rate_per_s(setting, workload),
        "runs": runs,
        "simulated": simulated,
        "void": void,
        "against_best": ratios.against_best(runs),
        "bytes": ratios.bytes_ratios(runs),
    }


class _Ground:
    """What all runs of a setting share: the model, its adapters, and the profile."""

    def __init__(self, folder: Path, setting: Setting) -> None:
        self._folder = folder
        self._setting = setting
        self._model = build_samples(cache_dir() / "samples").model
        self._adapters: dict[str, Path] = {}

    def run(self, case: Case, note: Callable[[str], None]) -> tuple[Outcome, str]:
        """One run, made again if it is void; why it is void, '' if it is not."""
        why = ""
        for _ in range(ATTEMPTS):
            outcome, why = asyncio.run(self._run(case, note))
            if not why:
                break
        return outcome, why

    async def _run(self, case: Case, note: Callable[[str], None]) -> tuple[Outcome, str]:
        setting = case.setting
        trace = cases.draw(case.workload, case.rate_per_s, case.seed, setting.duration_s, setting.adapters)
        adapters = {one.name: self._adapter(one.name, one.rank or 0) for one in trace.adapters}
        with common.cluster("policies", self._config(case)) as (running, _):
            cluster = LiveCluster(
                running.router_addresses,
                lambda: {"cluster": processes_of(running.run_id)},
                look_aside=False,
                max_others=1.0,
                seed=case.seed,
            )
            await cluster.register(adapters)
            held = Held()
            watching = asyncio.create_task(held.watch(running.router_addresses, setting.warmup_s))
            done = await cluster.run(trace)
            watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watching
        records = [replace(one, warmup=one.scheduled_s < setting.warmup_s) for one in done.records]
        summary = summarise(records, slo=setting.slo)
        outcome = cases.outcome_from(
            case,
            summary.overall,
            bytes_moved=held.bytes_moved,
            resident_bytes=mean(held.resident_bytes) if held.resident_bytes else 0.0,
        )
        paced_ms = summary.pacing.p99_ms if summary.pacing else 0.0
        note(
            f"{case.contender.name} at {case.rate_per_s:g}/s, seed {case.seed}: TTFT p95"
            f" {outcome.ttft_p95_ms:.0f} ms, {outcome.failed} failed, pacing p99 {paced_ms:.1f} ms"
            f"{', void: ' + summary.void_reason if summary.void else ''}"
        )
        return outcome, summary.void_reason

    def _adapter(self, name: str, rank: int) -> Path:
        if name not in self._adapters:
            self._adapters[name] = build_adapter(
                self._folder / name, self._model, rank=rank, seed=len(self._adapters)
            )
        return self._adapters[name]

    def _config(self, case: Case) -> str:
        setting = case.setting
        # Policies know the replicas as the simulator's know them: this kernel, this speed.
        known: Profile = next(iter(cases.scenario(case).profiles.values()))
        engine, latency = known.engine, find_simulatable(setting.profile).latency
        assert latency is not None
        path = self._folder / f"{known.name}.toml"
        write_profile(path, known)
        largest = max(_bytes_of(one) for one in self._adapters.values())
        return CONFIG.format(
            replicas=setting.replicas,
            model=self._model,
            rank=engine.max_lora_rank,
            slots=engine.adapter_slots,
            rows=engine.max_num_seqs,
            batched=engine.max_num_batched_tokens,
            kv_bytes=engine.kv_tokens * KV_BYTES_PER_TOKEN,
            kernel=setting.kernel,
            base=float(latency.base_ms),
            prefill=latency.prefill_token_ms,
            row=float(latency.row_ms),
            rank_row=latency.decode_rank_ms,
            rank_token=latency.prefill_rank_ms,
            load_bytes_per_s=largest / LOAD_S,
            kv_per_token=KV_BYTES_PER_TOKEN,
            speed=setting.speed,
            policy=case.contender.policy,
            profile=path,
            max_lora_ranks="planned" if setting.fleet.endswith(cases.PLANNED) else "fixed",
            epoch_s=setting.epoch_s,
            window_s=setting.window_s or setting.epoch_s,
            history_s=5 * setting.epoch_s,
            forecast=case.contender.forecast,
            routers=setting.routers,
            routing=case.contender.routing,
        )


def _bytes_of(folder: Path) -> int:
    return sum(os.path.getsize(path) for path in folder.iterdir())
