"""What scripts/setup asks of pip's reports and of installed metadata; needs nothing but pip itself.

usage: lib_setup.py cuda REPORT          names of the CUDA packages that pip would install, one per line
       lib_setup.py alone PROJECT        those of its requirements that are to be installed without their own
       lib_setup.py needs PROJECT...     the requirements of installed projects, less what is left out
       lib_setup.py resolved REPORT      the report as exact requirements, but for loraserve
"""

import json
import re
import sys
from collections.abc import Iterator
from importlib.metadata import requires
from pathlib import Path

from pip._vendor.packaging.requirements import Requirement

# The torch family is installed on its own: another build of torchvision breaks `import transformers`.
TORCH_FAMILY = frozenset({"torch", "torchvision", "torchaudio", "torchcodec"})
# It asks for triton, a gigabyte of GPU compiler that nothing uses on the CPU.
ALONE = frozenset({"xgrammar"})
LEFT_OUT = TORCH_FAMILY | ALONE | {"triton"}
CUDA_NAMES = re.compile(r"^(nvidia-.*|cuda-.*|triton)$")


def normal(name: str) -> str:
    """A project's name as registries compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def report_versions(path: Path) -> Iterator[tuple[str, str]]:
    """(name, version) of everything that the dry run would install."""
    for item in json.loads(path.read_text(encoding="utf-8"))["install"]:
        yield normal(item["metadata"]["name"]), item["metadata"]["version"]


def cuda_packages(path: Path) -> list[str]:
    """The CUDA packages among them, and torch itself if it is a CUDA build."""
    found = [
        f"{name} {version}"
        for name, version in report_versions(path)
        if CUDA_NAMES.match(name) or (name == "torch" and "+cu" in version)
    ]
    # triton alone is no CUDA stack: a CPU build of torch may bring it too.
    return found if any(not entry.startswith("triton ") for entry in found) else []


def requirements(project: str) -> Iterator[Requirement]:
    """The project's own requirements that apply to this machine, without their markers."""
    for text in requires(project) or ():
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            requirement.marker = None
            yield requirement


def alone(project: str) -> list[str]:
    """Its requirements that go in with `pip install --no-deps`."""
    return [str(wanted) for wanted in requirements(project) if normal(wanted.name) in ALONE]


def needs(projects: list[str]) -> list[str]:
    """All requirements of these projects but those left out."""
    wanted = {
        str(one) for project in projects for one in requirements(project) if normal(one.name) not in LEFT_OUT
    }
    return sorted(wanted)


def resolved(path: Path) -> list[str]:
    """Exact requirements for `pip install --no-deps`; our own package is installed apart, editable."""
    return [f"{name}=={version}" for name, version in report_versions(path) if name != "loraserve"]


def main(arguments: list[str]) -> int:
    """Print one line per entry of what was asked for."""
    match arguments:
        case ["cuda", report]:
            lines = cuda_packages(Path(report))
        case ["alone", project]:
            lines = alone(project)
        case ["needs", *projects]:
            lines = needs(projects)
        case ["resolved", report]:
            lines = resolved(Path(report))
        case _:
            print(__doc__, file=sys.stderr)
            return 2
    for line in lines:
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
