"""ONNX -> float32 TFLite with onnx2tf 2.x, which writes the flatbuffer itself (no TensorFlow).

Request: ``model`` (file), ``keep_shape`` (inputs whose axes stay as they are; other 4-D and 5-D
inputs become channels-last), ``simplify`` (by onnxsim, before conversion). Answer: ``tflite`` (file, relative).
"""

from child import serve


def convert(request):
    import onnx2tf

    onnx2tf.convert(
        input_onnx_file_path=request["model"],
        output_folder_path="out",
        keep_shape_absolutely_input_names=request["keep_shape"] or None,
        # With custom operators allowed but none on the list, an operator it cannot express is an
        # error that names its node. Else it would write a file that no runtime can run, exit 0.
        flatbuffer_direct_allow_custom_ops=True,
        flatbuffer_direct_custom_op_allowlist=["none"],
        not_use_onnxsim=not request["simplify"],
        verbosity="warn",
    )
    return {"tflite": "out/" + request["model"].removesuffix(".onnx") + "_float32.tflite"}


if __name__ == "__main__":
    serve(convert)
