"""Write constraints.txt: the version of everything that elastiq needs to be built, run and tested, as tried together.

    make constraints                                             # the newest of everything, from .venv-newest
    python scripts/constraints.py SOME/VENV/bin/python           # what another environment has installed

torch and what only torch needs are left out: TORCH of the Makefile names that, and no constraint may contradict it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "constraints.txt"
EXTRAS = ("all", "report", "gguf", "dev")
BUILD_TOOLS = ("cmake", "ninja")
"""What scikit-build-core asks for besides, where a machine has none."""
HEAD = "# Tested together. Written by scripts/constraints.py; `make constraints` takes the newest of everything.\n"

INSTALLED = """
import json, sys
from importlib.metadata import PackageNotFoundError, distribution
from pip._vendor.packaging.requirements import Requirement
from pip._vendor.packaging.utils import canonicalize_name

found, waiting = {}, [(Requirement(line), "") for line in json.loads(sys.argv[1])]
seen = set()
while waiting:
    requirement, extra = waiting.pop()
    name = canonicalize_name(requirement.name)
    if name in ("torch", "elastiq") or (requirement.marker and not requirement.marker.evaluate({"extra": extra})):
        continue
    try:
        package = distribution(name)
    except PackageNotFoundError:
        continue
    found[name] = package.version
    for chosen in ("", *requirement.extras):
        if (name, chosen) not in seen:
            seen.add((name, chosen))
            waiting += [(Requirement(line), chosen) for line in package.requires or ()]
print(json.dumps([list(sys.version_info[:2]), found]))
"""
"""Run by the other Python: versions of a list of requirements and of all they need, without torch."""


def main() -> None:
    """Write the file from the environment of the Python that the first argument names."""
    python = sys.argv[1] if len(sys.argv) == 2 else sys.exit(__doc__)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wanted = project["project"]["dependencies"] + [
        line for extra in EXTRAS for line in project["project"]["optional-dependencies"][extra]
    ]
    version, found = json.loads(output(python, "-c", INSTALLED, json.dumps(wanted)))
    oldest = project["project"]["requires-python"].removeprefix(">=")
    if ".".join(map(str, version)) != oldest:
        sys.exit(f"{python} is Python {version[0]}.{version[1]}; versions chosen for it need not exist for {oldest}, "
                 f"the oldest allowed: make constraints PYTHON=python{oldest}")  # fmt: skip
    found |= newest(python, [*project["build-system"]["requires"], *BUILD_TOOLS])
    FILE.write_text(HEAD + "".join(f"{name}=={found[name]}\n" for name in sorted(found)), encoding="utf-8")
    print(f"{FILE.name}: {len(found)} versions")


def newest(python: str, requirements: list[str]) -> dict[str, str]:
    """Versions that pip would install today of what builds the package in an environment of its own."""
    report = output(
        python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--dry-run", "--ignore-installed",
        "--report", "-", *requirements,
    )  # fmt: skip
    packages = [entry["metadata"] for entry in json.loads(report)["install"]]
    return {package["name"].lower().replace("_", "-"): package["version"] for package in packages}


def output(*command: str) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


if __name__ == "__main__":
    main()
