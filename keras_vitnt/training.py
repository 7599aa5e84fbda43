"""The recipe for small data: augmentation, Muon, warm-up and cosine; then `model.fit`.

Knows nothing of ViT: everything here is a function of a `keras.Model` and of batches.
"""

import keras
import numpy as np

# Vectors are not decayed (DeiT, timm): biases, norms, tokens, positions.
NO_DECAY = ["bias", "gamma", "beta", "token", "embedding"]
# Muon is for the matrices between layers; tokens and heads are Adam's, as vectors are.
NO_MUON = ["token", "head"]


def augment(pixels, rng, strength=1.0, flip=False):
    """One random projective warp and colour jitter of a photo.

    Turns up to 12 degrees, scales by 0.87 to 1.15, shears and shifts up to 9 %, tilts a
    little; brightness, contrast and the colours' balance vary. One warp instead of a chain
    of them resamples once.

    Args:
        pixels: uint8 array (H, W, 3).
        rng: `numpy.random.Generator`.
        strength: of the warp and the jitter; 0 leaves the photo as it is.
        flip: whether to mirror half of the photos.

    Returns:
        uint8 array (H, W, 3).
    """
    from PIL import Image

    height, width = pixels.shape[:2]
    low_high = rng.uniform(-1, 1, 14) * strength
    angle, scale = np.deg2rad(12) * low_high[0], 1.15 ** low_high[1]
    shear_x, shear_y, shift_x, shift_y = 0.09 * low_high[2:6]
    tilt_x, tilt_y = 0.06 * low_high[6:8]
    mirror = -1.0 if flip and rng.random() < 0.5 else 1.0
    cos, sin = np.cos(angle) / scale, np.sin(angle) / scale
    turn = np.array([[cos, -sin], [sin, cos]]) @ np.array([[1, shear_x], [shear_y, 1]])
    warp = np.eye(3)  # output -> input, both in -1..1
    warp[:2, :2] = turn @ np.diag([mirror, 1.0])
    warp[:2, 2] = 2 * shift_x, 2 * shift_y
    warp[2, :2] = tilt_x, tilt_y
    # The border continues the photo in its mirror: black corners would be a feature to learn.
    margin_y, margin_x = height // 2, width // 2
    padded = np.pad(pixels, ((margin_y,) * 2, (margin_x,) * 2, (0, 0)), "symmetric")
    to_unit = np.array([[2 / width, 0, 1 / width - 1], [0, 2 / height, 1 / height - 1], [0, 0, 1]])
    to_pixels = np.linalg.inv(to_unit)
    to_pixels[:2, 2] += margin_x, margin_y
    matrix = to_pixels @ warp @ to_unit
    # PIL takes the centre of pixel 0 to be 0.5.
    half = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])
    matrix = half @ matrix @ np.linalg.inv(half)
    matrix /= matrix[2, 2]
    warped = Image.fromarray(padded).transform(
        (width, height),
        Image.Transform.PERSPECTIVE,
        tuple(matrix.ravel()[:8]),
        Image.Resampling.BICUBIC,
    )
    x = np.asarray(warped, "float32")
    contrast, brightness, balance = 1.2 ** low_high[8], 24 * low_high[9], 1.06 ** low_high[10:13]
    mean = x.mean()
    x = (x - mean) * contrast * balance + mean * balance + brightness
    return np.clip(x, 0, 255).astype("uint8")


def schedule(lr, steps, warmup_steps):
    """Linear warm-up from 0 to `lr`, then a cosine down to a hundredth of it."""
    return keras.optimizers.schedules.CosineDecay(
        initial_learning_rate=0.0,
        warmup_target=lr,
        warmup_steps=warmup_steps,
        decay_steps=max(steps - warmup_steps, 1),
        alpha=0.01,
    )


def compile_model(
    model, steps, lr=3e-3, weight_decay=0.1, warmup=0.1, label_smoothing=0.1, clip=1.0
):
    """Compile with the recipe: Muon, no decay of vectors, softmax cross-entropy.

    Muon (Jordan et al. 2024; scaled as in arXiv:2502.16982, so that AdamW's rates fit it)
    learns small sets of photos in fewer epochs than AdamW does.

    Args:
        model: a `keras.Model` that returns logits (B, classes) for integer labels.
        steps: batches in the whole training.
        lr: peak learning rate.
        weight_decay: on kernels only.
        warmup: share of the steps in which the rate rises.
        label_smoothing: share of the target spread over all classes.
        clip: largest norm of the gradient.
    """
    classes = model.output_shape[-1]
    optimizer = keras.optimizers.Muon(
        schedule(lr, steps, max(round(warmup * steps), 1)),
        weight_decay=weight_decay,
        adam_weight_decay=weight_decay,
        adam_beta_2=0.99,
        exclude_layers=NO_MUON,
        global_clipnorm=clip,
    )
    optimizer.exclude_from_weight_decay(var_names=NO_DECAY)
    # Built inside the first step, its variables would make TensorFlow trace that step twice.
    optimizer.build(model.trainable_variables)

    def cross_entropy(labels, logits):
        targets = keras.ops.one_hot(keras.ops.reshape(labels, (-1,)), classes)
        return keras.losses.categorical_crossentropy(
            targets, logits, from_logits=True, label_smoothing=label_smoothing
        )

    # XLA on TensorFlow's CPU trains 1.6 times slower than its plain kernels.
    plain = keras.backend.backend() == "tensorflow"
    model.compile(
        optimizer,
        loss=cross_entropy,
        metrics=[keras.metrics.SparseCategoricalAccuracy(name="accuracy")],
        jit_compile=False if plain else "auto",
    )


def fit(model, batches, validation, epochs, folder, seed=0, verbose="auto"):
    """Train with `model.fit`; interrupted or not, leave a state to resume from.

    Args:
        model: a compiled `keras.Model`.
        batches, validation: `datasets.Batches`.
        epochs: in all, those of earlier calls on the same folder included.
        folder: `Path`; `history.csv` grows there, and `backup/` holds the last whole epoch
            until the training is complete. Delete it to start anew.
        seed: of dropout and of all else that Keras draws.
        verbose: as in `model.fit`.

    Returns:
        True if all epochs were done, False if Ctrl-C stopped them.
    """
    keras.utils.set_random_seed(seed)
    parts = [batches, validation]
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        tf.config.experimental.enable_op_determinism()
        parts = [part.tf_dataset() for part in parts]
    callbacks = [
        keras.callbacks.BackupAndRestore(str(folder / "backup")),
        keras.callbacks.CSVLogger(folder / "history.csv", append=True),
        # A resumed run goes on with its own epochs' order and augmentation.
        keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs: batches.go_to(epoch)),
    ]
    try:
        model.fit(
            parts[0],
            validation_data=parts[1],
            epochs=epochs,
            shuffle=False,
            callbacks=callbacks,
            verbose=verbose,
        )
    except KeyboardInterrupt:
        return False
    return True
