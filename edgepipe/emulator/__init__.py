"""Virtual boards: arm64 machines of QEMU's that are reached over SSH as a real board is.

`build` makes them from Debian packages, `machine` starts and stops them. What runs inside lies in
``targets/emulator/``.
"""
