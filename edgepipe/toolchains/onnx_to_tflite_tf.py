"""ONNX -> float32 TFLite with onnx2tf 1.x, through TensorFlow's own converter.

Request and answer as in ``onnx_to_tflite_direct.py``.
"""

from child import serve

# onnx2tf 1.x fetches a file of this name from the internet for every model with a 4-D input of
# three channels, unless it lies in the working directory; it only looks at its values to compare
# its own intermediate results.
SAMPLES = "calibration_image_sample_data_20x128x128x3_float32.npy"


def convert(request):
    import numpy
    import onnx2tf

    generator = numpy.random.default_rng(0)
    numpy.save(SAMPLES, generator.random((20, 128, 128, 3), dtype=numpy.float32))
    onnx2tf.convert(
        input_onnx_file_path=request["model"],
        output_folder_path="out",
        keep_shape_absolutely_input_names=request["keep_shape"] or None,
        copy_onnx_input_output_names_to_tflite=True,
        replace_to_pseudo_operators=["erf"],  # TFLite has no Erf: without it GELU needs Flex
        verbosity="warn",
    )
    return {"tflite": "out/" + request["model"].removesuffix(".onnx") + "_float32.tflite"}


if __name__ == "__main__":
    serve(convert)
