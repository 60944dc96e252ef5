"""Triton kernels of FastSTGCMA, importable as ``stgcma_fast.kernels`` only."""

if __name__ != "stgcma_fast.kernels":
    # From the root of a checkout this folder answers to a name that belongs to another package, which libraries probe for.
    # Under that name it is empty and lets them carry on; nothing in it can be loaded twice.
    __path__ = []

    def __getattr__(name: str):
        raise AttributeError(f"no {name!r} here: these kernels are imported as 'stgcma_fast.kernels', not as {__name__!r}")
