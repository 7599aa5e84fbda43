"""What a model costs."""

import keras

from . import tnt, vit


def multiply_adds(model):
    """Multiply-adds of one image's forward pass (what papers list as FLOPs).

    Counts every dense layer, convolution and attention product; norms, activations and
    additions are left out, as in the papers' tables.
    """
    total = 0

    def dense(part, rows):
        return rows * part.kernel.shape[0] * part.kernel.shape[1]

    def mlp(part, tokens):
        return dense(part.fc1, tokens) + dense(part.fc2, tokens)

    def block(part, tokens, width):
        attention = part.attention
        products = 2 * tokens * tokens * width
        projections = dense(attention.qkv, tokens) + dense(attention.proj, tokens)
        return products + projections + mlp(part.mlp, tokens)

    for layer in model.layers:
        match layer:
            case vit.PatchEncoder():
                total += dense(layer.projection, layer.num_patches) if layer.projection_dim else 0
            case tnt.PixelEmbedding():
                _, patches, words, _ = layer.output.shape
                kernel = layer.projection.kernel.shape
                total += patches * words * kernel[0] * kernel[1] * kernel[2] * kernel[3]
            case tnt.WordsToPatch():
                total += dense(layer.proj, layer.output.shape[1])
            case vit.TransformerBlock():
                total += block(layer, *layer.input.shape[1:])
            case tnt.TNTBlock():
                _, patches, words, inner = layer.input[0].shape
                total += patches * block(layer.inner, words, inner)
                total += dense(layer.fold.proj, patches)
                total += block(layer.outer, *layer.input[1].shape[1:])
            case vit.AttentionPooling():
                tokens, width = layer.input.shape[1:]
                tokens -= layer.num_prefix_tokens
                total += dense(layer.key_value, tokens) + 2 * tokens * width
                total += dense(layer.query, 1) + dense(layer.proj, 1) + mlp(layer.mlp, 1)
            case keras.layers.Dense():
                total += dense(layer, 1)
    return total
