"""The onnxruntime target: ONNX with contrib operators, written directly from the lowered program."""
