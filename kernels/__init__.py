"""Triton kernels of FastSTGCMA, importable as ``stgcma_fast.kernels`` only."""

if __name__ != "stgcma_fast.kernels":
    raise ImportError(f"these kernels were imported as {__name__!r}; import them as 'stgcma_fast.kernels'")
