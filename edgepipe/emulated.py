"""What is measured on a board and what is not: an emulated one has no wall time, and not every one counts instructions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgepipe.profile import DeviceProfile

# Kinds of session that measure time or power, of which an emulator's own work is most.
OF_TIME = ("latency", "ops", "sustained", "energy")


def why_emulated(profile: DeviceProfile, facts: Mapping[str, Any]) -> str:
    """What says that a board is emulated: itself, else its profile; "" where neither does.

    ``facts`` are the ``device`` part of what the board says (targets/linux/board.py).
    """
    said = str(facts.get("emulated") or "")
    if said or profile.emulated is None:
        return said
    return f"profile {profile.name}: {profile.emulated.kind}-mode emulation of {profile.emulated.cpu}"  # fmt: skip


def not_measurable(profile: DeviceProfile, facts: Mapping[str, Any], *, threads: int) -> dict[str, str]:  # fmt: skip
    """Kind of session -> why it cannot be measured on this board; those it can are not named.

    With user-mode emulation a process weighs what the emulator weighs, and nothing is counted.
    """
    found: dict[str, str] = {}
    said = why_emulated(profile, facts)
    if said:
        time = f'{profile.name} is emulated: its wall time says nothing; use gate = "instructions"'
        found |= dict.fromkeys(OF_TIME, time)
    if is_user_mode(profile, said):
        own = f"{profile.name} is emulated in user mode: its memory is the emulator's"
        found |= {"memory": own, "instructions": f"{profile.name} is emulated in user mode, which counts no instructions"}  # fmt: skip
    elif threads != 1:
        found["instructions"] = "instructions are counted with one thread only: others spin as they wait"  # fmt: skip
    elif why_not := facts.get("no_instructions", "its runner does not count instructions"):
        found["instructions"] = str(why_not)
    return found


def is_user_mode(profile: DeviceProfile, said: str) -> bool:
    """Whether only programs are emulated (qemu-user), on the kernel of this host."""
    return "qemu-user" in said or (profile.emulated is not None and profile.emulated.kind == "user")
