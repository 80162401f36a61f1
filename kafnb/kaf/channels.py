"""Tensors of images (N, C, *) beside tables with one row a channel, (C, ...), or one row for all, (1, ...)."""


def column(p, i, x):
    """Column i of a (1 or C, D) parameter, shaped to broadcast along x's channels."""
    return p[:, i].reshape(-1, *[1] * (x.ndim - 2))


def per_channel(v, like):
    """Sum a (N, C, *) tensor to ``like``'s leading size: C, or 1 when all channels share the parameter."""
    v = v.sum(dim=[d for d in range(v.ndim) if d != 1])
    return v if like.shape[0] > 1 else v.sum(0, keepdim=True)


def fold(size, images, tables, in_dims):
    """Fold the mapped dimension into the channels.

    images are (N, C, *), tables (1 or C, ...); in_dims has the mapped dimension of each, None where it is not mapped.
    """
    folded, channels = [], None
    for v, dim in zip(images, in_dims, strict=False):
        v = v.movedim(dim, 1) if dim is not None else v.unsqueeze(1).expand(-1, size, *v.shape[1:])
        channels = v.shape[2]
        folded.append(v.reshape(v.shape[0], size * channels, *v.shape[3:]))
    for v, dim in zip(tables, in_dims[len(images) :], strict=True):
        if dim is None and v.shape[0] == 1:
            folded.append(v)  # shared by all
            continue
        v = v.movedim(dim, 0) if dim is not None else v.expand(size, *v.shape)
        v = v.expand(size, channels, *v.shape[2:])
        folded.append(v.reshape(size * channels, *v.shape[2:]))
    return folded


def unfold_images(v, size):
    return None if v is None else v.reshape(v.shape[0], size, -1, *v.shape[2:])
