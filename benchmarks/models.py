"""Parameter shapes of the models that are measured, generated from their architectures."""

Shapes = list[tuple[int, ...]]


def vit(dim: int, depth: int, mlp_ratio: int = 4, patch: int = 16, tokens: int = 197, classes: int = 1000) -> Shapes:
    """A vision transformer as timm builds it (arXiv:2010.11929)."""
    hidden = mlp_ratio * dim
    block: Shapes = [
        *[(dim,), (dim,)],  # norm
        *[(3 * dim, dim), (3 * dim,), (dim, dim), (dim,)],  # attention
        *[(dim,), (dim,)],  # norm
        *[(hidden, dim), (hidden,), (dim, hidden), (dim,)],  # mlp
    ]
    stem: Shapes = [(1, 1, dim), (1, tokens, dim), (dim, 3, patch, patch), (dim,)]
    return stem + depth * block + [(dim,), (dim,), (classes, dim), (classes,)]


MODELS: dict[str, Shapes] = {
    "200 small tensors": 100 * [(32, 32), (64,)],
    "ViT-Ti": vit(192, 12),
    "ViT-S": vit(384, 12),
    "ViT-B": vit(768, 12),
    "ViT-L": vit(1024, 24),
}
