"""Single layers, timed against onnxruntime's: the shapes, our programs, the peers', and the clock."""
