"""Virtual boards: arm64 machines of QEMU's that are reached over SSH as a real board is.

`build` makes them from Debian packages, `machine` starts and stops them, `user_mode` is the variant
without a kernel of its own. What runs inside lies in ``targets/emulator/``.
"""
