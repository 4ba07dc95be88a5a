"""Operations that XLA compiles to few kernels on a GPU, where each kernel takes microseconds to start."""
