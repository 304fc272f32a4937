"""Print what kimia and some of its extras require, one requirement a line.

    python deploy/dependencies.py serve model < pyproject.toml

An image installs these in a layer of their own, below the code: editing the code then rebuilds a few megabytes.
"""

from __future__ import annotations

import sys
import tomllib


def requirements(pyproject: str, extras: list[str]) -> list[str]:
    """Requirements of the project and of the named extras, without the project's own name (`kimia[serve]`).

    Raises KeyError for an extra that pyproject.toml does not have.
    """
    project = tomllib.loads(pyproject)["project"]
    lists = [project["dependencies"], *(project["optional-dependencies"][extra] for extra in extras)]
    return [line for lines in lists for line in lines if not line.startswith(f"{project['name']}[")]


if __name__ == "__main__":
    print("\n".join(requirements(sys.stdin.read(), sys.argv[1:])))
