"""What scripts/setup asks of pip's reports and of installed metadata; needs nothing but pip itself.

usage: lib_setup.py cuda REPORT          names of the CUDA packages that pip would install, one per line
       lib_setup.py alone PROJECT        those of its requirements that are to be installed without their own
       lib_setup.py needs PROJECT...     the requirements of installed projects, less what is left out
       lib_setup.py resolved REPORT      the report as exact requirements, but for loraserve
       lib_setup.py trim SITE_PACKAGES   removes what nothing reads of UCX, and prints the bytes given back
"""

import filecmp
import json
import re
import shutil
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
UCX_PACKAGES = ("libucx", "libucxx", "librmm", "ucxx")
# Static libraries, headers and programs: most of what the wheels of UCX unpack.
UNREAD = (
    "libucx/lib/**/*.a",
    "libucx/lib/**/*.la",
    "libucx/bin/*",
    *(f"{name}/include" for name in UCX_PACKAGES),
)
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


def trim(site_packages: Path) -> int:
    """Remove what only compilers read of UCX's packages, store equal libraries once; bytes given back."""
    before = _disk_bytes(site_packages)
    for pattern in UNREAD:
        for path in list(site_packages.glob(pattern)):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
    # A wheel has no links: each library is there under three names.
    for path in list(site_packages.glob("libucx/lib/**/*.so.*")):
        plain = path.with_name(path.name.partition(".so")[0] + ".so")
        if plain.exists() and not plain.samefile(path) and filecmp.cmp(plain, path, shallow=False):
            spare = path.with_name(path.name + ".new")
            spare.hardlink_to(plain)
            spare.replace(path)
    return before - _disk_bytes(site_packages)


def _disk_bytes(site_packages: Path) -> int:
    """What UCX's packages take, each file once however many names it has."""
    paths = [path for name in UCX_PACKAGES for path in site_packages.glob(f"{name}/**/*")]
    found = [path.stat() for path in paths if path.is_file()]
    return sum({entry.st_ino: entry.st_size for entry in found}.values())


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
        case ["trim", site_packages]:
            lines = [str(trim(Path(site_packages)))]
        case _:
            print(__doc__, file=sys.stderr)
            return 2
    for line in lines:
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
