"""The parts of ViT and DeiT, in the order the data flows.

Images become tokens in `Patches` and `PatchEncoder`; each `TransformerBlock` is an `Attention` and
an `MLP`, with `LayerScale` or without; `TokenPooling` or `AttentionPooling` makes tokens a vector.

B batch, H x W image of C channels, P patch side, N patches, T tokens (prefix + patches),
D width, h heads of width d = D / h.

Sources: ViT, Dosovitskiy et al. 2021, arXiv:2010.11929; DeiT, Touvron et al. 2021,
arXiv:2012.12877; registers, Darcet et al. 2024, arXiv:2309.16588; attention pooling, Zhai et
al. 2022, arXiv:2106.04560.
"""

import keras
from keras import layers, ops

from .positions import sincos2d

serializable = keras.saving.register_keras_serializable(package="keras_vitnt")


def require(condition, message):
    """Raise ValueError(message) unless the condition holds."""
    if not condition:
        raise ValueError(message)


def check_divisible(height, width, side):
    require(
        height is not None and width is not None and not (height % side or width % side),
        f"An image of {height} x {width} pixels cannot be cut into patches of {side} x {side}: "
        f"both sides must be known and divisible by {side}. Choose another image size or "
        "patch size.",
    )


def check_heads(num_heads, dim):
    require(dim % num_heads == 0, f"num_heads={num_heads} does not divide the width {dim}.")


def cut(x, side):
    """Cut maps (B, H, W, C) into squares (B * N, side, side * C), row by row.

    Written with a transpose of rank 4: edge runtimes know no higher rank.
    """
    _, height, width, channels = x.shape
    check_divisible(height, width, side)
    columns = width // side
    x = ops.reshape(x, (-1, side, columns, side * channels))  # (B*rows, side, columns, side*C)
    x = ops.transpose(x, (0, 2, 1, 3))  # (B*rows, columns, side, side*C)
    return ops.reshape(x, (-1, side, side * channels))


@serializable
class Patches(layers.Layer):
    """Cut images into non-overlapping square patches, losing nothing.

    Args:
        patch_size: P, the side of a patch in pixels; it must divide H and W.

    Call arguments:
        images: tensor (B, H, W, C), any C, H and W static.

    Returns:
        Tensor (B, N, P * P * C): patches row by row, in each the pixels row by row.

    Example:
        >>> Patches(16)(keras.ops.ones((2, 224, 224, 3))).shape
        (2, 196, 768)
    """

    def __init__(self, patch_size, **kwargs):
        super().__init__(**kwargs)
        self.patch_size = patch_size

    def compute_output_shape(self, shape):
        batch, height, width, channels = shape
        side = self.patch_size
        check_divisible(height, width, side)
        return batch, (height // side) * (width // side), side * side * channels

    def call(self, images):
        return ops.reshape(
            cut(images, self.patch_size), (-1, *self.compute_output_shape(images.shape)[1:])
        )


@serializable
class PatchEncoder(layers.Layer):
    """Project patches to the model's width; add prefix tokens and positions.

    The order of tokens is class, distillation, registers, patches.

    Args:
        num_patches: N, or the grid (rows, columns), which 2-D positions need.
        projection_dim: D; None if the patches already have the model's width (TNT).
        positions: "learned" (a table), "sincos2d" (fixed), "factorized2d" (a learned table
            of rows plus one of columns) or "none".
        class_token, distillation_token: whether to put a learned token in front.
        register_tokens: number of learned register tokens.
        prefix_positions: whether the learned table covers the prefix tokens too, as in ViT
            and DeiT; False as in DeiT-3 and big_vision (timm: `no_embed_class=True`). The
            two-dimensional positions never cover them.
        dropout: rate applied to the encoded tokens.

    Call arguments:
        patches: tensor (B, N, features).

    Returns:
        Tensor (B, prefix + N, D).

    Example:
        >>> PatchEncoder((14, 14), 192)(keras.ops.ones((2, 196, 768))).shape
        (2, 197, 192)
    """

    def __init__(
        self,
        num_patches,
        projection_dim=None,
        positions="learned",
        class_token=True,
        distillation_token=False,
        register_tokens=0,
        prefix_positions=True,
        dropout=0.0,
        **kwargs,
    ):
        super().__init__(**kwargs)
        kinds = ("learned", "sincos2d", "factorized2d", "none")
        require(
            positions in kinds, f"`positions` must be one of {kinds}; got positions={positions!r}."
        )
        is_grid = not isinstance(num_patches, int)
        require(
            is_grid or positions in ("learned", "none"),
            f"positions={positions!r} needs the grid as num_patches=(rows, columns); "
            f"got num_patches={num_patches!r}.",
        )
        self.grid = tuple(num_patches) if is_grid else None
        self.num_patches = self.grid[0] * self.grid[1] if is_grid else num_patches
        self.projection_dim = projection_dim
        self.positions = positions
        self.has_class_token = class_token
        self.has_distillation_token = distillation_token
        self.register_tokens = register_tokens
        self.num_prefix_tokens = int(class_token) + int(distillation_token) + register_tokens
        self.prefix_positions = prefix_positions and positions == "learned"
        self.dropout = layers.Dropout(dropout, dtype=self.dtype_policy, name="dropout")

    def build(self, shape):
        require(
            shape[1] == self.num_patches,
            f"{self.name} was made for {self.num_patches} patches and got {shape[1]}.",
        )
        dim = self.projection_dim or shape[-1]
        if self.projection_dim:
            self.projection = layers.Dense(dim, dtype=self.dtype_policy, name="projection")
            self.projection.build(shape)

        def table(name, length):
            return self.add_weight(
                shape=(length, dim), initializer=keras.initializers.RandomNormal(0.02), name=name
            )

        if self.has_class_token:
            self.class_token = table("class_token", 1)
        if self.has_distillation_token:
            self.distillation_token = table("distillation_token", 1)
        if self.register_tokens:
            self.register_token = table("register_tokens", self.register_tokens)
        if self.positions == "learned":
            prefix = self.num_prefix_tokens if self.prefix_positions else 0
            self.position_embedding = table("position_embedding", prefix + self.num_patches)
        elif self.positions == "factorized2d":
            self.row_embedding = table("row_embedding", self.grid[0])
            self.column_embedding = table("column_embedding", self.grid[1])
        elif self.positions == "sincos2d":
            self.position_table = sincos2d(*self.grid, dim)

    def compute_output_shape(self, shape):
        return shape[0], self.num_prefix_tokens + shape[1], self.projection_dim or shape[-1]

    def prefix_tokens(self):
        """The learned prefix tokens without positions: a list of tensors (count, D)."""
        tokens = []
        if self.has_class_token:
            tokens.append(ops.convert_to_tensor(self.class_token))
        if self.has_distillation_token:
            tokens.append(ops.convert_to_tensor(self.distillation_token))
        if self.register_tokens:
            tokens.append(ops.convert_to_tensor(self.register_token))
        return tokens

    def patch_positions(self, dim):
        """The positions of the patches alone: tensor (N, D)."""
        if self.positions == "learned":
            return ops.convert_to_tensor(self.position_embedding)[-self.num_patches :]
        if self.positions == "sincos2d":
            return ops.cast(self.position_table, self.compute_dtype)
        if self.positions == "factorized2d":
            rows = ops.expand_dims(self.row_embedding, 1)  # (rows, 1, D)
            columns = ops.expand_dims(self.column_embedding, 0)  # (1, columns, D)
            return ops.reshape(rows + columns, (self.num_patches, dim))
        return ops.zeros((self.num_patches, dim), dtype=self.compute_dtype)

    def call(self, patches):
        x = self.projection(patches) if self.projection_dim else patches  # (B, N, D)
        table = self.patch_positions(x.shape[-1])
        prefix = self.prefix_tokens()
        if prefix:
            prefix = ops.concatenate(prefix, axis=0)
            if self.prefix_positions:
                prefix = prefix + self.position_embedding[: self.num_prefix_tokens]
            table = ops.concatenate([prefix, table], axis=0)  # (T, D)
            # Prefix tokens are the table's rows over zero padding: one PAD and one ADD,
            # and no tensor of a batch's size is made only to be concatenated.
            x = ops.pad(x, ((0, 0), (self.num_prefix_tokens, 0), (0, 0)))  # (B, T, D)
        return self.dropout(x + ops.expand_dims(table, 0))


def attend(query, key, value, dropout=None):
    """Dot-product attention of heads: (B, h, T, d), (B, h, S, d) twice -> (B, h, T, d)."""
    scores = attention_scores(query, key)
    if dropout is not None:
        scores = dropout(scores)
    return ops.matmul(scores, value)


def attention_scores(query, key):
    """Softmax over the keys, in float32: (B, h, T, d) and (B, h, S, d) -> (B, h, T, S)."""
    query = query * query.shape[-1] ** -0.5  # smaller than the product it would scale
    logits = ops.matmul(query, ops.transpose(key, (0, 1, 3, 2)))
    return ops.cast(ops.softmax(ops.cast(logits, "float32")), query.dtype)


def fuses_attention(tokens):
    """Whether this backend has a faster attention than two products and a softmax.

    TensorFlow has none; for a handful of tokens (TNT's words) no backend has.
    """
    return keras.backend.backend() != "tensorflow" and tokens > 64


def flash_attention():
    """None (Keras decides), but False on TPUs: there Keras 3.15's automatic flash attention
    treats unmasked attention as causal when the length is a multiple of 128."""
    on_tpu = keras.backend.backend() == "jax" and any(
        device.startswith("tpu") for device in keras.distribution.list_devices()
    )
    return False if on_tpu else None


def split_heads(x, num_heads):
    """(B, T, h * d) -> (B, T, h, d)."""
    return ops.reshape(x, (-1, x.shape[1], num_heads, x.shape[2] // num_heads))


def head_major(x):
    """(B, T, h, d) -> (B, h, T, d), and back."""
    return ops.transpose(x, (0, 2, 1, 3))


@serializable
class Attention(layers.Layer):
    """Multi-head self-attention with one fused projection for queries, keys and values.

    Keras' own MultiHeadAttention has one switch for all biases; ViT has biases everywhere
    and TNT only at the output.

    Args:
        num_heads: h; it must divide D.
        qkv_bias: bias of the fused projection D -> 3D (queries, keys, values in this order).
        dropout: rate on the attention scores.

    Call arguments:
        x: tensor (B, T, D), T static.

    Returns:
        Tensor (B, T, D).

    Example:
        >>> Attention(num_heads=3)(keras.ops.ones((2, 197, 192))).shape
        (2, 197, 192)
    """

    def __init__(self, num_heads, qkv_bias=True, dropout=0.0, **kwargs):
        super().__init__(**kwargs)
        self.num_heads = num_heads
        self.qkv_bias = qkv_bias
        self.dropout = layers.Dropout(dropout, dtype=self.dtype_policy, name="dropout")

    def build(self, shape):
        dim = shape[-1]
        check_heads(self.num_heads, dim)
        self.qkv = layers.Dense(
            3 * dim, use_bias=self.qkv_bias, dtype=self.dtype_policy, name="qkv"
        )
        self.proj = layers.Dense(dim, dtype=self.dtype_policy, name="proj")
        self.qkv.build(shape)
        self.proj.build(shape)

    def compute_output_shape(self, shape):
        return shape

    def heads(self, x):
        """Queries, keys and values of all heads, each (B, T, h, d)."""
        parts = ops.split(self.qkv(x), 3, axis=-1)  # 3 x (B, T, D)
        return [split_heads(part, self.num_heads) for part in parts]

    def scores(self, x):
        """The attention scores (B, h, T, T); each row sums to 1."""
        query, key, _ = self.heads(x)
        return attention_scores(head_major(query), head_major(key))

    def call(self, x):
        heads = self.heads(x)
        if fuses_attention(x.shape[1]) and not self.dropout.rate:
            y = ops.dot_product_attention(*heads, flash_attention=flash_attention())
        else:
            y = head_major(attend(*map(head_major, heads), self.dropout))  # (B, T, h, d)
        return self.proj(ops.reshape(y, (-1, *x.shape[1:])))


@serializable
class MLP(layers.Layer):
    """Two dense layers with GELU between them: (..., D) -> (..., mlp_dim) -> (..., D).

    Args:
        mlp_dim: the hidden width.
        gelu: "erf" (exact: timm, DeiT, TNT) or "tanh" (its approximation: Google's JAX code).
        dropout: rate after each dense layer.

    Example:
        >>> MLP(768)(keras.ops.ones((2, 197, 192))).shape
        (2, 197, 192)
    """

    def __init__(self, mlp_dim, gelu="erf", dropout=0.0, **kwargs):
        super().__init__(**kwargs)
        require(gelu in ("erf", "tanh"), f'`gelu` must be "erf" or "tanh"; got gelu={gelu!r}.')
        self.mlp_dim = mlp_dim
        self.gelu = gelu
        self.dropout = layers.Dropout(dropout, dtype=self.dtype_policy, name="dropout")

    def build(self, shape):
        self.fc1 = layers.Dense(self.mlp_dim, dtype=self.dtype_policy, name="fc1")
        self.fc2 = layers.Dense(shape[-1], dtype=self.dtype_policy, name="fc2")
        self.fc1.build(shape)
        self.fc2.build((*shape[:-1], self.mlp_dim))

    def compute_output_shape(self, shape):
        return shape

    def activate(self, x):
        """The hidden activations (..., mlp_dim)."""
        return keras.activations.gelu(self.fc1(x), approximate=self.gelu == "tanh")

    def call(self, x):
        return self.dropout(self.fc2(self.dropout(self.activate(x))))


@serializable
class LayerScale(layers.Layer):
    """Multiply each channel by a learned factor that starts small (CaiT, arXiv:2103.17239).

    Args:
        init_value: the factors' first value, such as 1e-6.
    """

    def __init__(self, init_value, **kwargs):
        super().__init__(**kwargs)
        self.init_value = init_value

    def build(self, shape):
        self.gamma = self.add_weight(
            shape=(shape[-1],),
            initializer=keras.initializers.Constant(self.init_value),
            name="gamma",
        )

    def compute_output_shape(self, shape):
        return shape

    def call(self, x):
        return x * self.gamma


@serializable
class TransformerBlock(layers.Layer):
    """The pre-norm encoder block: x + attention(norm(x)), then x + MLP(norm(x)).

    Args:
        num_heads: h.
        mlp_dim: hidden width of the MLP.
        qkv_bias: bias of queries, keys and values.
        layer_scale: first value of LayerScale on both branches; None for none.
        drop_path: rate of stochastic depth: a whole branch is dropped for a whole sample.
        dropout, attention_dropout: rates after each dense layer and on the scores.
        layer_norm_epsilon: 1e-6 for ViT and DeiT, 1e-5 for TNT.
        gelu: "erf" or "tanh".

    Call arguments:
        x: tensor (B, T, D).

    Returns:
        Tensor (B, T, D).

    Example:
        >>> TransformerBlock(num_heads=3, mlp_dim=768)(keras.ops.ones((2, 197, 192))).shape
        (2, 197, 192)
    """

    def __init__(
        self,
        num_heads,
        mlp_dim,
        qkv_bias=True,
        layer_scale=None,
        drop_path=0.0,
        dropout=0.0,
        attention_dropout=0.0,
        layer_norm_epsilon=1e-6,
        gelu="erf",
        **kwargs,
    ):
        super().__init__(**kwargs)
        dtype = self.dtype_policy
        self.layer_scale = layer_scale
        self.norm1 = layers.LayerNormalization(
            epsilon=layer_norm_epsilon, dtype=dtype, name="norm1"
        )
        self.attention = Attention(
            num_heads, qkv_bias, dropout=attention_dropout, dtype=dtype, name="attention"
        )
        self.norm2 = layers.LayerNormalization(
            epsilon=layer_norm_epsilon, dtype=dtype, name="norm2"
        )
        self.mlp = MLP(mlp_dim, gelu, dropout, dtype=dtype, name="mlp")
        self.dropout = layers.Dropout(dropout, dtype=dtype, name="dropout")
        if layer_scale is not None:
            self.scale1 = LayerScale(layer_scale, dtype=dtype, name="scale1")
            self.scale2 = LayerScale(layer_scale, dtype=dtype, name="scale2")
        # One coin per sample and branch, with the survivors scaled up: stochastic depth.
        coin = dict(noise_shape=(None, 1, 1), dtype=dtype)
        self.drop_path1 = layers.Dropout(drop_path, name="drop_path1", **coin)
        self.drop_path2 = layers.Dropout(drop_path, name="drop_path2", **coin)

    def build(self, shape):
        parts = [self.norm1, self.attention, self.norm2, self.mlp]
        if self.layer_scale is not None:
            parts += [self.scale1, self.scale2]
        for part in parts:
            part.build(shape)

    def compute_output_shape(self, shape):
        return shape

    def attention_scores(self, x):
        """The scores (B, h, T, T) this block computes for its input x (B, T, D)."""
        return self.attention.scores(self.norm1(x))

    def call(self, x):
        y = self.dropout(self.attention(self.norm1(x)))
        x = x + self.drop_path1(y if self.layer_scale is None else self.scale1(y))
        y = self.mlp(self.norm2(x))
        return x + self.drop_path2(y if self.layer_scale is None else self.scale2(y))


@serializable
class TokenPooling(layers.Layer):
    """Reduce tokens (B, T, D) to one vector (B, D).

    Args:
        pooling: "token" takes the token at `index`; "avg" the mean of the patches.
        index: which token (0 class, 1 distillation).
        num_prefix_tokens: leading tokens that the mean leaves out.
    """

    def __init__(self, pooling="token", index=0, num_prefix_tokens=1, **kwargs):
        super().__init__(**kwargs)
        require(pooling in ("token", "avg"), f'pooling is "token" or "avg"; got {pooling!r}.')
        self.pooling = pooling
        self.index = index
        self.num_prefix_tokens = num_prefix_tokens

    def compute_output_shape(self, shape):
        return shape[0], shape[2]

    def call(self, tokens):
        if self.pooling == "token":
            return tokens[:, self.index]
        return ops.mean(tokens[:, self.num_prefix_tokens :], axis=1)


@serializable
class AttentionPooling(layers.Layer):
    """Pool tokens with one learned query, then an MLP (the MAP head of big_vision).

    Args:
        num_heads: h.
        mlp_dim: hidden width of the MLP.
        num_prefix_tokens: leading tokens that are left out.
        layer_norm_epsilon, gelu: as in `TransformerBlock`.

    Call arguments:
        tokens: tensor (B, T, D).

    Returns:
        Tensor (B, D).

    Example:
        >>> AttentionPooling(num_heads=3, mlp_dim=768)(keras.ops.ones((2, 196, 192))).shape
        (2, 192)
    """

    def __init__(
        self,
        num_heads,
        mlp_dim,
        num_prefix_tokens=0,
        layer_norm_epsilon=1e-6,
        gelu="erf",
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.num_heads = num_heads
        self.num_prefix_tokens = num_prefix_tokens
        self.norm = layers.LayerNormalization(
            epsilon=layer_norm_epsilon, dtype=self.dtype_policy, name="norm"
        )
        self.mlp = MLP(mlp_dim, gelu, dtype=self.dtype_policy, name="mlp")

    def build(self, shape):
        dim = shape[-1]
        check_heads(self.num_heads, dim)
        self.query_token = self.add_weight(
            shape=(1, dim), initializer="glorot_uniform", name="query_token"
        )
        self.query = layers.Dense(dim, dtype=self.dtype_policy, name="query")
        self.key_value = layers.Dense(2 * dim, dtype=self.dtype_policy, name="key_value")
        self.proj = layers.Dense(dim, dtype=self.dtype_policy, name="proj")
        for part in (self.query, self.key_value, self.proj, self.norm, self.mlp):
            part.build(shape)

    def compute_output_shape(self, shape):
        return shape[0], shape[2]

    def call(self, tokens):
        tokens = tokens[:, self.num_prefix_tokens :]
        query = ops.expand_dims(self.query(self.query_token), 0)  # (1, 1, D)
        key, value = ops.split(self.key_value(tokens), 2, axis=-1)
        heads = [head_major(split_heads(x, self.num_heads)) for x in (query, key, value)]
        pooled = self.proj(ops.reshape(attend(*heads), (-1, tokens.shape[-1])))  # (B, D)
        return pooled + self.mlp(self.norm(pooled))
