"""A network as an ONNX file that onnxruntime runs, and that computes what torch does."""
