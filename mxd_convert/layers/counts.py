"""Parameters and products of an MxD, and the expert count at which it has as many parameters as a transcoder (paper, section 4.1)."""


def transcoder_parameters(d_in: int, d_out: int, width: int) -> int:
    """Parameters of a transcoder of `width` latents: encoder and decoder with a bias each."""
    return width * (d_in + 1) + width * d_out + d_out


def mxd_parameters(d_in: int, d_hidden: int, d_out: int, n_experts: int, glu: bool = False, skip: bool = False) -> int:
    """Parameters of an MxD layer: encoder(s), decoder, gate, experts, output bias, and the skip path if it has one."""
    encoder = (2 if glu else 1) * d_hidden * (d_in + 1)
    return encoder + d_hidden * d_out + n_experts * (d_in + 1) + n_experts * d_out + d_out + (d_in * d_out if skip else 0)


def mxd_forward_flops(
    d_in: int, d_hidden: int, d_out: int, n_experts: int, k: int, glu: bool = False, skip: bool = False, dense: bool = False
) -> int:
    """Floating point operations of a forward pass for one token: its products. dense: every gate may be positive (L1)."""
    active = n_experts if dense else k
    hidden = 2 * d_in * d_hidden * (2 if glu else 1) + 2 * d_hidden * d_out
    return hidden + 2 * d_in * n_experts + 2 * active * d_out + (2 * d_in * d_out if skip else 0)


def mxd_step_flops(
    d_in: int, d_hidden: int, d_out: int, n_experts: int, k: int, glu: bool = False, skip: bool = False, dense: bool = False
) -> int:
    """Floating point operations of forward and backward for one token, with sparse gradients of gate and experts. dense: as above.

    The layer's input needs no gradient, so what reads it has two products and the rest three.
    """
    active = n_experts if dense else k
    hidden = 4 * d_in * d_hidden * (2 if glu else 1) + 6 * d_hidden * d_out
    return hidden + 2 * d_in * n_experts + 2 * active * d_in + 6 * active * d_out + (4 * d_in * d_out if skip else 0)


def matched_experts(d_in: int, d_hidden: int, d_out: int, glu: bool = False, skip: bool = False, expansion: int = 32) -> int:
    """The largest N at which an MxD has no more parameters than a transcoder of width `expansion` x `d_in`.

    With `skip` both have a linear path, which cancels. Raises ValueError where not even one expert fits.
    """
    width = expansion * d_in
    room = transcoder_parameters(d_in, d_out, width) - mxd_parameters(d_in, d_hidden, d_out, 0, glu)
    n_experts = room // (d_in + d_out + 1)
    if n_experts < 1:
        raise ValueError(
            f"layer.expansion: a transcoder of width {width} has fewer parameters than an MxD without experts;"
            " raise layer.expansion or set layer.experts"
        )
    return n_experts
