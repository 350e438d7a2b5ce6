"""1x1 convolution as one product of matrices, its gate multiplied onto the kernel."""

from jaxtyping import Array, Float


def pointwise_conv(
    x: Float[Array, 'B H W C'],
    kernel: Float[Array, '1 1 C F'],
    bias: Float[Array, 'F'] | None = None,
    gate: Float[Array, 'B 1 1 C'] | None = None,
    train: bool = False,
) -> Float[Array, 'B H W F']:
    """`lax.conv_general_dilated(x * gate, kernel, (1, 1), 'SAME') + bias`, computed in the type of x.

    XLA's convolution is as fast forwards, but its gradients are several times slower on CPU. Inference multiplies the
    gate onto the kernel, which is smaller than x; training is faster with `x * gate`.
    """
    if gate is not None and train:
        x, gate = x * gate, None
    matrix = kernel[0, 0].astype(x.dtype)
    if gate is None:
        rows = x.reshape(-1, x.shape[-1]) @ matrix
    else:
        rows = x.reshape(x.shape[0], -1, x.shape[-1]) @ (gate[:, 0, 0, :, None] * matrix)
    if bias is not None:
        rows += bias.astype(x.dtype)
    return rows.reshape(*x.shape[:-1], kernel.shape[-1])
