"""Whether the three import packages are this distribution's own: their names are common ones."""

import importlib.metadata
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path

OWN_PACKAGES = ("loraserve", "placement", "traces")
VERSION_LINE = re.compile(r"^__version__ = \"([^\"]+)\"$", re.MULTILINE)


def check_own_packages() -> str | None:
    """None if all three carry this distribution's version, else one line for a person."""
    try:
        version = importlib.metadata.version("loraserve")
    except importlib.metadata.PackageNotFoundError:
        return "loraserve is not installed as a package; install it with pip (in a checkout: scripts/setup)"
    return packages_problem(version, package_file)


def package_file(name: str) -> Path | None:
    """The `__init__.py` that `import name` would run; it is not run, for it may be anybody's."""
    spec = importlib.util.find_spec(name)
    return Path(spec.origin) if spec is not None and spec.origin else None


def packages_problem(version: str, find: Callable[[str], Path | None]) -> str | None:
    """What is wrong with the packages that `find` leads to, given the distribution's version."""
    for name in OWN_PACKAGES:
        path = find(name)
        if path is None:
            return f"the package {name} of loraserve {version} is missing; reinstall loraserve"
        match = VERSION_LINE.search(path.read_text(encoding="utf-8", errors="replace"))
        if match is None or match[1] != version:
            found = f"version {match[1]}" if match else "another project's"
            return (
                f"the package {name} in {path.parent} is {found}, where loraserve {version} wants its own;"
                " install loraserve in an environment without another package of that name"
            )
    return None
