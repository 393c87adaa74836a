"""EncoderModel to deployable module: TIR kernels, lowering, build, artifact. Imports TVM and NumPy only."""
