"""Triton kernels of lejepa_fast, installed and imported as `lejepa_fast.kernels`."""

if __name__ == "kernels":
    raise ImportError(
        "these kernels are imported as 'lejepa_fast.kernels', not as top-level 'kernels' "
        "(that name belongs to another package); install the project with 'pip install -e .'"
    )
