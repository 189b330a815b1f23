"""How the embedded model is made: texts -> voices -> rooms and noise -> network -> ONNX; see README.md beside this."""
