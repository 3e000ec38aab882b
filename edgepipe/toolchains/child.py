"""What every converter script does around its own work. Runs in the toolchain's environment.

Usage of a script: ``python SCRIPT request.json answer.json``, in a folder of its own.
"""

from __future__ import annotations

import ctypes
import json
import re
import resource
import signal
import sys
import traceback
from pathlib import Path

# onnx2tf 2.x: "... validation failed: op=DFT node=node__fft_r2c reason_code=x message=y"
_REFUSED = re.compile(r"op=(\S+) node=(\S*) reason_code=(\S+) message=(.*)", re.DOTALL)

# litert-torch: "Lowering not found: aten.linalg_qr.default ... While executing %linalg_qr : ..."; then
# the traceback of the line of PyTorch it came from
_NO_LOWERING = re.compile(r"Lowering not found: (\S+)")
_NOT_LEGAL = re.compile(r"failed to legalize operation '([\w.]+)'")
_EXECUTING = re.compile(r"While executing %(\w+)(?:.*?target=torch\.ops\.([\w.]+))?")
_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)\n\s*(.*)')


def serve(convert) -> None:
    """Answer one request: ``convert(request)`` returns what the answer holds beside ``ok``."""
    request_path, answer_path = map(Path, sys.argv[1:3])
    request = json.loads(request_path.read_text(encoding="utf-8"))
    _limit(request.pop("cpu_limit_s"))
    try:
        answer = {"ok": True, **convert(request)}
    except SystemExit as exc:  # onnx2tf's way to say that it cannot
        answer = {"ok": False, "reason": "invalid-graph", "message": f"the converter gave up (exit {exc.code})"}  # fmt: skip
    except Exception as exc:  # noqa: BLE001  whatever it is, it goes into the answer
        traceback.print_exc()
        answer = {"ok": False, **_explain(exc)}
    partial = answer_path.with_suffix(".part")
    partial.write_text(json.dumps(answer), encoding="utf-8")
    partial.replace(answer_path)


def _explain(error):
    found = _REFUSED.search(str(error))
    if found:
        op, node, code, message = found.groups()
        if code.startswith("custom_op"):
            message = "no built-in TFLite operator computes it"
        return {"reason": "unsupported-op", "op": op, "node": node, "message": f"{message.strip()} ({code})"}  # fmt: skip
    first_line = (str(error).strip().splitlines() or [""])[0]
    lowering = _NO_LOWERING.search(str(error)) or _NOT_LEGAL.search(str(error))
    node = _EXECUTING.search(str(error))
    if lowering or (node and node[2]):
        return {
            "reason": "unsupported-op",
            "op": lowering[1] if lowering else node[2],
            "node": node[1] if node else "",
            "source_line": _source_line(str(error)),
            "message": "no TFLite operator computes it" if lowering else first_line[:300],
        }
    return {"reason": "converter-error", "message": f"{type(error).__name__}: {first_line[:300]}"}


def _source_line(text):
    """``model.py:12 in forward: x = torch.fft.fft(x)`` of a traceback's innermost line outside libraries."""
    frames = [
        f
        for f in _FRAME.findall(text)
        if "/site-packages/" not in f[0] and "/toolchains/" not in f[0]
    ]
    if not frames:
        return ""
    file, line, function, code = frames[-1]
    return f"{Path(file).name}:{line} in {function}: {code.strip()}"


def _limit(cpu_limit_s) -> None:
    """Die with the parent; no more CPU time than allowed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG of <sys/prctl.h>
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_limit_s,) * 2)
