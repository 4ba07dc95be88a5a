"""Operations as single kernels in Pallas, for GPUs and TPUs, and the trial that decides whether a device uses them."""
