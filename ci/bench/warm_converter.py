"""onnx2tf kept warm for `node_cases.py`: its imports cost ten times what a model of one operator does.

Runs in the onnx2tf toolchain's environment: ``python warm_converter.py SOCKET SCRIPT``. It imports all
that a conversion imports, then answers each connection, which sends ``{"cwd": ..., "env": ..., "log": ...}``
as a line, with two lines: the process id of a fork that runs SCRIPT there, and its exit code (negative: a
signal). onnxsim, which onnx2tf starts three times, runs in forks as well. It ends when its standard
input closes.
"""

import functools
import gc
import json
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path


def forked(work, told=lambda pid: None):
    """Exit code of ``work()`` in a fork, whose process id is ``told`` at once."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except SystemExit as exc:
            code = exc.code if isinstance(exc.code, int) else int(exc.code is not None)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    told(pid)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def warm_up():
    """Import what a conversion and onnxsim import, found in a fork that does both."""
    with tempfile.TemporaryDirectory() as folder:

        def listed():
            from onnx import TensorProto, helper, save
            from onnx2tf import convert

            os.chdir(folder)
            kinds = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 2]) for n in "xy"]
            graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", kinds[:1], kinds[1:])  # fmt: skip
            save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), "m.onnx")  # fmt: skip
            convert(input_onnx_file_path="m.onnx", output_folder_path="out", not_use_onnxsim=True, verbosity="error")  # fmt: skip
            Path("modules").write_text("\n".join(sys.modules), encoding="utf-8")

        forked(listed)
        names = Path(folder, "modules").read_text(encoding="utf-8").split("\n")
        compile_schema(folder)
    for name in (*names, "onnxsim.onnx_simplifier"):
        try:
            __import__(name)
        except Exception:  # noqa: BLE001  a conversion imports it itself, then
            continue


def compile_schema(folder):
    """TFLite's schema, which onnx2tf compiles for each model, once for all."""
    from onnx2tf.tflite_builder import schema_loader

    compiled = functools.cache(lambda source: compile(source, "schema_generated.py", "exec"))
    schema_loader.exec = lambda source, names: exec(compiled(source), names)
    schema_loader.load_schema_module(folder)


def check_output(argv, **options):
    """`subprocess.check_output`, with onnxsim in a fork."""
    global simplified
    if argv[0] != "onnxsim":
        return real_check_output(argv, **options)

    def simplify():
        from onnxsim import main

        sys.argv = argv
        main()

    before = Path(argv[1]).read_bytes()
    if before == simplified:  # by the last run: this one changes nothing either
        Path(argv[2]).write_bytes(before)
        return b""
    code = forked(simplify)
    if code:
        raise subprocess.CalledProcessError(code, argv)
    after = Path(argv[2]).read_bytes()
    simplified = before if after == before else b""
    return b""


simplified = b""
real_check_output = subprocess.check_output


def answer(connection, script):
    request = json.loads(connection.makefile().readline())

    def serve():
        os.setsid()
        log = os.open(request["log"], os.O_WRONLY | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.chdir(request["cwd"])
        os.environ.clear()
        os.environ.update(request["env"])
        tempfile.tempdir = None
        subprocess.check_output = check_output
        sys.argv = [script, "request.json", "answer.json"]
        runpy.run_path(script, run_name="__main__")

    say = lambda number: connection.sendall(f"{number}\n".encode())  # noqa: E731
    say(forked(serve, say))


def main():
    path, script = sys.argv[1:3]
    sys.path.insert(0, str(Path(script).parent))
    warm_up()
    gc.freeze()  # lest a fork that collects garbage copies all of this
    server = socket.socket(socket.AF_UNIX)
    server.bind(path)
    server.listen()
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    print("ready", flush=True)
    while True:
        connection, _ = server.accept()
        with connection:
            answer(connection, script)


if __name__ == "__main__":
    main()
