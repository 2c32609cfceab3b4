"""Groups of values to scales and codes: the reference, and where a GPU has a kernel for it, that."""

from __future__ import annotations

from torch import Tensor

from ..kernels import kernels_for
from .value_formats import Format


def quantize(value_GK: Tensor, format_: Format) -> tuple[Tensor, Tensor]:
    """Local: scales bfloat16 (G,), and the codes of the groups whose scale is not 0, int64, one row of them.

    The values passed `check_sendable`.
    """
    if kernels_for(value_GK) == "triton":
        from ..gpu import values_triton

        if value_GK.shape[1] <= values_triton.MAX_GROUP:
            scale_G, code_GK = values_triton.quantize(value_GK.contiguous(), format_)
            return scale_G, code_GK[scale_G > 0].view(-1).long()
    scale_G = format_.scales(value_GK.abs())
    code_GK = format_.codes(value_GK, scale_G.float()[:, None])
    return scale_G, code_GK[scale_G > 0].view(-1)
