"""Parameter shapes of real models, generated from their architectures, and lists of tensors to sweep over."""

Shapes = list[tuple[int, ...]]


def linear(inputs: int, outputs: int) -> Shapes:
    """A matrix and its bias."""
    return [(outputs, inputs), (outputs,)]


def norm(dim: int) -> Shapes:
    """Scale and shift."""
    return [(dim,), (dim,)]


def conv(inputs: int, outputs: int, size: int) -> Shapes:
    """A square convolution with its bias."""
    return [(outputs, inputs, size, size), (outputs,)]


def transformer_block(dim: int, mlp_ratio: int = 4) -> Shapes:
    """Pre-norm attention and MLP, as in ViT and GPT-2."""
    attention = norm(dim) + linear(dim, 3 * dim) + linear(dim, dim)
    return attention + norm(dim) + linear(dim, mlp_ratio * dim) + linear(mlp_ratio * dim, dim)


def vit(dim: int, depth: int, patch: int = 16, tokens: int = 197, classes: int = 1000) -> Shapes:
    """A vision transformer as timm builds it (arXiv:2010.11929)."""
    stem: Shapes = [(1, 1, dim), (1, tokens, dim), *conv(3, dim, patch)]
    return stem + depth * transformer_block(dim) + norm(dim) + linear(dim, classes)


def gpt2(dim: int, depth: int, vocabulary: int = 50257, context: int = 1024) -> Shapes:
    """GPT-2, whose head is its embedding."""
    return [(vocabulary, dim), (context, dim), *(depth * transformer_block(dim)), *norm(dim)]


def llama(dim: int, depth: int, hidden: int, key_value_dim: int, vocabulary: int = 32000) -> Shapes:
    """Llama (arXiv:2302.13971) with grouped-query attention and a head of its own."""
    attention: Shapes = [(dim, dim), (key_value_dim, dim), (key_value_dim, dim), (dim, dim)]
    block: Shapes = [*attention, (hidden, dim), (hidden, dim), (dim, hidden), (dim,), (dim,)]
    return [(vocabulary, dim), *(depth * block), (dim,), (vocabulary, dim)]


def resnet50(classes: int = 1000) -> Shapes:
    """ResNet-50 (arXiv:1512.03385): four stages of bottlenecks. Its convolutions have no bias."""
    shapes: Shapes = [(64, 3, 7, 7), *norm(64)]
    inputs = 64
    for width, depth in ((64, 3), (128, 4), (256, 6), (512, 3)):
        outputs = 4 * width
        for block in range(depth):
            shapes += [(width, inputs, 1, 1), *norm(width), (width, width, 3, 3), *norm(width)]
            shapes += [(outputs, width, 1, 1), *norm(outputs)]
            if block == 0:
                shapes += [(outputs, inputs, 1, 1), *norm(outputs)]
            inputs = outputs
    return shapes + linear(inputs, classes)


def unet(dim: int = 128, multipliers: tuple[int, ...] = (1, 2, 2, 2), attends: int = 1) -> Shapes:
    """The diffusion UNet of DDPM for CIFAR-10 (arXiv:2006.11239), with attention at the second resolution."""
    time_dim = 4 * dim

    def resnet(inputs: int, outputs: int) -> Shapes:
        shapes = norm(inputs) + conv(inputs, outputs, 3) + linear(time_dim, outputs) + norm(outputs)
        return shapes + conv(outputs, outputs, 3) + (conv(inputs, outputs, 1) if inputs != outputs else [])

    def attention(channels: int) -> Shapes:
        return norm(channels) + 4 * linear(channels, channels)

    widths = [dim * multiplier for multiplier in multipliers]
    shapes = linear(dim, time_dim) + linear(time_dim, time_dim) + conv(3, dim, 3)
    skips, inputs = [dim], dim
    for level, width in enumerate(widths):
        for _ in range(2):
            shapes += resnet(inputs, width) + (attention(width) if level == attends else [])
            inputs = width
            skips.append(width)
        if level < len(widths) - 1:
            shapes += conv(width, width, 3)
            skips.append(width)
    shapes += resnet(inputs, inputs) + attention(inputs) + resnet(inputs, inputs)
    for level, width in reversed(list(enumerate(widths))):
        for _ in range(3):
            shapes += resnet(inputs + skips.pop(), width) + (attention(width) if level == attends else [])
            inputs = width
        if level > 0:
            shapes += conv(width, width, 3)
    return shapes + norm(dim) + conv(dim, 3, 3)


MODELS: dict[str, Shapes] = {
    "1,000 small tensors": 500 * [(32, 32), (64,)],
    "ViT-Ti": vit(192, 12),
    "ViT-S": vit(384, 12),
    "ResNet-50": resnet50(),
    "DDPM UNet": unet(),
    "ViT-B": vit(768, 12),
    "GPT-2": gpt2(768, 12),
    "ViT-L": vit(1024, 24),
    "TinyLlama 1.1B": llama(2048, 22, hidden=5632, key_value_dim=256),
    "GPT-2 XL": gpt2(1600, 48),
}

# Lists to sweep over: the same elements in ever more tensors, and as many tensors of ever more elements.
SWEEP_NUMEL, SWEEP_TENSORS = 2**22, 100
BY_TENSORS: dict[int, Shapes] = {n: n * [(SWEEP_NUMEL // n,)] for n in (1, 16, 128, 1024, 4096)}
BY_SIZE: dict[int, Shapes] = {n: SWEEP_TENSORS * [(n,)] for n in (2**6, 2**9, 2**12, 2**15, 2**18)}


def numel(shapes: Shapes) -> int:
    """Elements of all tensors together."""
    total = 0
    for shape in shapes:
        count = 1
        for size in shape:
            count *= size
        total += count
    return total
