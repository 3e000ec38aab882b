"""Run a recipe against a real SSH server on loopback where there is one, else on this machine."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from edgepipe.cli import main
from edgepipe.testing import LoopbackSshd, find_sshd

RECIPE = Path(__file__).parent / "recipes" / "digits.toml"


def demo(arguments: list[str]) -> int:
    recipe, *options = arguments or [str(RECIPE)]
    if find_sshd() is None:
        print(
            "no sshd on this machine: measuring on the local device, without SSH", file=sys.stderr
        )
        return main(["run", recipe, "--device", "local", *options])
    with LoopbackSshd() as server:
        os.environ.update(server.environment())
        print(
            f"measuring over SSH on a server started for this run: {server.address}",
            file=sys.stderr,
        )
        return main(["run", recipe, "--device", server.address, *options])


if __name__ == "__main__":
    sys.exit(demo(sys.argv[1:]))
