"""The parts of TNT, in the order the data flows; its blocks are made of ViT's.

B batch, H x W image of C channels, P patch side, N patches, T tokens (prefix + patches),
D width; M words per patch, of inner width c.

Source: TNT, Han et al. 2021, arXiv:2103.00112.
"""

import keras
from keras import layers, ops

from .vit import TransformerBlock, check_divisible, cut, require, serializable


@serializable
class PixelEmbedding(layers.Layer):
    """TNT's words: each patch becomes M vectors of width c that describe its pixels.

    A 7 x 7 convolution with stride `pixel_stride` and padding 3. In the official layout it
    runs inside every patch, so nothing crosses a patch's border; in the legacy layout (the
    file that timm served until 2025) it runs over the whole image, which is cut afterwards.

    Args:
        patch_size: P.
        inner_dim: c.
        pixel_stride: s; a patch has M = ceil(P / s) ** 2 words.
        layout: "official" or "legacy".
        positions: whether to add a learned position to each word, shared by all patches.

    Call arguments:
        images: tensor (B, H, W, C), H and W static.

    Returns:
        Tensor (B, N, M, c).

    Example:
        >>> PixelEmbedding(16, 24)(keras.ops.ones((2, 224, 224, 3))).shape
        (2, 196, 16, 24)
    """

    def __init__(
        self, patch_size, inner_dim, pixel_stride=4, layout="official", positions=True, **kwargs
    ):
        super().__init__(**kwargs)
        check_layout(layout)
        require(
            layout == "official" or patch_size % pixel_stride == 0,
            f"The legacy layout needs a patch size divisible by the pixel stride; got "
            f"patch_size={patch_size}, pixel_stride={pixel_stride}.",
        )
        self.patch_size = patch_size
        self.inner_dim = inner_dim
        self.layout = layout
        self.positions = positions
        self.word_side = -(-patch_size // pixel_stride)
        # Images are channels-last here, whatever a user's Keras is set to.
        given = dict(data_format="channels_last", dtype=self.dtype_policy)
        self.pad = layers.ZeroPadding2D(3, name="pad", **given)
        self.projection = layers.Conv2D(
            inner_dim, 7, strides=pixel_stride, name="projection", **given
        )

    def build(self, shape):
        self.projection.build((None, None, None, shape[-1]))
        if self.positions:
            self.position_embedding = self.add_weight(
                shape=(self.word_side**2, self.inner_dim),
                initializer=keras.initializers.RandomNormal(0.02),
                name="position_embedding",
            )

    def compute_output_shape(self, shape):
        batch, height, width, _ = shape
        check_divisible(height, width, self.patch_size)
        patches = (height // self.patch_size) * (width // self.patch_size)
        return batch, patches, self.word_side**2, self.inner_dim

    def call(self, images):
        if self.layout == "official":
            side = self.patch_size
            x = ops.reshape(cut(images, side), (-1, side, side, images.shape[-1]))
            x = self.projection(self.pad(x))  # (B*N, m, m, c), m = sqrt(M)
        else:
            x = cut(self.projection(self.pad(images)), self.word_side)  # (B*N, m, m*c)
        x = ops.reshape(x, (-1, *self.compute_output_shape(images.shape)[1:]))
        return x + self.position_embedding if self.positions else x


def check_layout(layout):
    require(
        layout in ("official", "legacy"),
        f'`layout` must be "official" or "legacy"; got layout={layout!r}.',
    )


@serializable
class WordsToPatch(layers.Layer):
    """Fold a patch's words into one vector of the patch stream: (B, N, M, c) -> (B, N, D).

    Official layout: norm over all M * c numbers, dense, norm. Legacy: norm over each
    word's c numbers, dense.

    Args:
        dim: D.
        use_bias: bias of the dense layer (official blocks have none).
        layout: "official" or "legacy".
        layer_norm_epsilon: TNT uses 1e-5.
    """

    def __init__(self, dim, use_bias=True, layout="official", layer_norm_epsilon=1e-5, **kwargs):
        super().__init__(**kwargs)
        check_layout(layout)
        dtype = self.dtype_policy
        self.dim = dim
        self.layout = layout
        self.norm1 = layers.LayerNormalization(
            epsilon=layer_norm_epsilon, dtype=dtype, name="norm1"
        )
        self.proj = layers.Dense(dim, use_bias=use_bias, dtype=dtype, name="proj")
        if layout == "official":
            self.norm2 = layers.LayerNormalization(
                epsilon=layer_norm_epsilon, dtype=dtype, name="norm2"
            )

    def build(self, shape):
        batch, patches, words, width = shape
        flat = (batch, patches, words * width)
        self.norm1.build(flat if self.layout == "official" else shape)
        self.proj.build(flat)
        if self.layout == "official":
            self.norm2.build((batch, patches, self.dim))

    def compute_output_shape(self, shape):
        return (*shape[:2], self.dim)

    def call(self, words):
        _, patches, count, width = words.shape
        flat = (-1, patches, count * width)
        if self.layout == "official":
            return self.norm2(self.proj(self.norm1(ops.reshape(words, flat))))
        return self.proj(ops.reshape(self.norm1(words), flat))


@serializable
class TNTBlock(layers.Layer):
    """Transformer in Transformer: attention among a patch's words, then among patches.

    The inner block attends within each patch, its words are folded into their patch's
    token, the outer block attends among the tokens. Prefix tokens receive no words.

    Args:
        num_heads, mlp_dim: of the outer block.
        inner_num_heads, inner_mlp_dim: of the inner block.
        layout: "official" or "legacy" (see `WordsToPatch`).
        drop_path: rate of stochastic depth; on the inner stream each patch draws its own.
        qkv_bias, layer_scale, dropout, attention_dropout, layer_norm_epsilon, gelu: as in
            `TransformerBlock`, for both blocks.

    Call arguments:
        pixels: tensor (B, N, M, c), the words of every patch.
        patches: tensor (B, prefix + N, D).

    Returns:
        The new (pixels, patches), shapes unchanged.

    Example:
        >>> block = TNTBlock(6, 1536, inner_num_heads=4, inner_mlp_dim=96)
        >>> pixels, patches = keras.ops.ones((2, 196, 16, 24)), keras.ops.ones((2, 197, 384))
        >>> [y.shape for y in block(pixels, patches)]
        [(2, 196, 16, 24), (2, 197, 384)]
    """

    def __init__(
        self,
        num_heads,
        mlp_dim,
        inner_num_heads,
        inner_mlp_dim,
        layout="official",
        qkv_bias=False,
        layer_scale=None,
        drop_path=0.0,
        dropout=0.0,
        attention_dropout=0.0,
        layer_norm_epsilon=1e-5,
        gelu="erf",
        **kwargs,
    ):
        super().__init__(**kwargs)
        shared = dict(
            qkv_bias=qkv_bias,
            layer_scale=layer_scale,
            drop_path=drop_path,
            dropout=dropout,
            attention_dropout=attention_dropout,
            layer_norm_epsilon=layer_norm_epsilon,
            gelu=gelu,
            dtype=self.dtype_policy,
        )
        check_layout(layout)
        self.layout = layout
        self.layer_norm_epsilon = layer_norm_epsilon
        self.inner = TransformerBlock(inner_num_heads, inner_mlp_dim, name="inner", **shared)
        self.outer = TransformerBlock(num_heads, mlp_dim, name="outer", **shared)

    def build(self, pixels_shape, patches_shape):
        self.fold = WordsToPatch(
            patches_shape[-1],
            use_bias=self.layout == "legacy",
            layout=self.layout,
            layer_norm_epsilon=self.layer_norm_epsilon,
            dtype=self.dtype_policy,
            name="fold",
        )
        self.inner.build((None, *pixels_shape[2:]))
        self.fold.build(pixels_shape)
        self.outer.build(patches_shape)

    def compute_output_shape(self, pixels_shape, patches_shape):
        return pixels_shape, patches_shape

    def run_inner(self, pixels):
        """The inner block on every patch's words: (B, N, M, c) -> (B, N, M, c).

        Patches join the batch: one coin of stochastic depth each, and rank 4 inside.
        """
        words = self.inner(ops.reshape(pixels, (-1, *pixels.shape[2:])))  # (B*N, M, c)
        return ops.reshape(words, (-1, *pixels.shape[1:]))

    def fuse(self, pixels, patches):
        """Add the folded words to their patches' tokens: -> (B, prefix + N, D)."""
        prefix = patches.shape[1] - pixels.shape[1]
        return patches + ops.pad(self.fold(pixels), ((0, 0), (prefix, 0), (0, 0)))

    def attention_scores(self, pixels, patches):
        """Inner scores (B * N, h, M, M) and outer scores (B, h, T, T) for these inputs."""
        inner = self.inner.attention_scores(ops.reshape(pixels, (-1, *pixels.shape[2:])))
        return inner, self.outer.attention_scores(self.fuse(self.run_inner(pixels), patches))

    def call(self, pixels, patches):
        pixels = self.run_inner(pixels)
        return pixels, self.outer(self.fuse(pixels, patches))


def blocks(model):
    """The model's blocks, first to last."""
    return [x for x in model.layers if isinstance(x, TransformerBlock | TNTBlock)]
