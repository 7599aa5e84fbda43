// A photo -> a model's input: keras_vitnt/images.py in JavaScript, number for number.
//
// A canvas resizes with another filter than PIL, which moves the logits; so the filter is here.

const MAX_PIXELS = 64_000_000;
const BITS = 22; // PIL computes in integers: weights are multiples of 2 ** -22

const FILTERS = {
  bilinear: { support: 1, weight: (x) => Math.max(0, 1 - Math.abs(x)) },
  bicubic: {
    support: 2,
    weight(x, a = -0.5) {
      x = Math.abs(x);
      if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
      return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
    },
  },
};

/** An image file -> ImageData: upright, colour profile ignored, as PIL reads it. */
export async function decode(file) {
  const bitmap = await createImageBitmap(file, { colorSpaceConversion: "none" }).catch(() => {
    throw new Error(`${file.name} is not an image that this browser can read.`);
  });
  const { width, height } = bitmap;
  if (width * height > MAX_PIXELS) {
    throw new Error(`${file.name} has ${width} × ${height} pixels; at most 64 million.`);
  }
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  return context.getImageData(0, 0, width, height);
}

/** What pixel `at` of `target` is made of, when `length` pixels are resized: {from, weights}. */
function taps(at, length, target, { support, weight }) {
  const scale = length / target;
  const stretch = Math.max(scale, 1); // the filter grows with the reduction: no aliasing
  const center = (at + 0.5) * scale;
  const from = Math.max(0, Math.trunc(center - support * stretch + 0.5));
  const to = Math.min(length, Math.trunc(center + support * stretch + 0.5));
  const weights = [];
  for (let x = from; x < to; x++) weights.push(weight((x - center + 0.5) / stretch));
  const sum = weights.reduce((a, b) => a + b);
  return { from, weights: weights.map((w) => Math.round((w / sum) * 2 ** BITS)) };
}

/** Resize one side of ImageData to `target` pixels, of which `count` are kept, from `first` on. */
function resizeSide(image, side, target, first, count, filter) {
  const { data, width, height } = image;
  const across = side === "width";
  const [length, lines] = across ? [width, height] : [height, width];
  const result = across ? new ImageData(count, height) : new ImageData(width, count);
  // where the next pixel along the side is, and the next line, in the array from and to
  const [step, line] = across ? [4, 4 * width] : [4 * width, 4];
  const [newStep, newLine] = across ? [4, 4 * count] : [4 * width, 4];
  const half = 2 ** (BITS - 1);
  result.data.fill(255); // opaque
  for (let i = 0; i < count; i++) {
    const { from, weights } = taps(first + i, length, target, filter);
    for (let j = 0; j < lines; j++) {
      for (let channel = 0; channel < 3; channel++) {
        let sum = half;
        let at = j * line + from * step + channel;
        for (let k = 0; k < weights.length; k++, at += step) sum += weights[k] * data[at];
        result.data[i * newStep + j * newLine + channel] = sum >> BITS; // clamped to 0..255
      }
    }
  }
  return result;
}

/** n / 2, rounded as Python rounds: a half goes to the even number. */
const halved = (n) => (n % 2 ? 2 * Math.round(n / 4) : n / 2);

/** Resize ImageData as `preprocessing` says and cut the centre: ImageData of its size. */
export function fit(image, { size, crop = 1, interpolation = "bicubic", squash = false }) {
  const [height, width] = size;
  let [rows, columns] = size.map((side) => Math.trunc(side / crop));
  if (!squash) {
    // one side fits, the other exceeds
    if (rows * image.width >= columns * image.height) {
      columns = Math.trunc((rows * image.width) / image.height);
    } else {
      rows = Math.trunc((columns * image.height) / image.width);
    }
  }
  const sides = [
    ["width", columns, halved(columns - width), width],
    ["height", rows, halved(rows - height), height],
  ];
  // Between the two PIL rounds to bytes, so their order counts: since Pillow 13 this is the rule.
  // (Before, the width came first; it moves some pixels of tall photos by one of 255 levels.)
  if (image.height - rows > Math.max(0, 2 * (image.width - columns))) sides.reverse();
  return sides.reduce((im, side) => resizeSide(im, ...side, FILTERS[interpolation]), image);
}

/** ImageData -> RGB as the model takes it: raw bytes, or float32 (x / 255 - mean) / std. */
export function toInput(image, { mean, std }, dtype) {
  const rgb = image.data.filter((_, i) => i % 4 < 3);
  if (dtype === "uint8") return new Uint8Array(rgb);
  return Float32Array.from(rgb, (x, i) => (x / 255 - mean[i % 3]) / std[i % 3]);
}
