/**
 * A mask of the size of its image, and what was painted on it. It does not depend on a page.
 *
 * A pixel belongs to a stroke where its centre lies at most half the brush's size from the pointer's path, and to a box
 * where the pointer's two corners touch or enclose it. There is no half-painted pixel. Strokes are filled row by row, so
 * the cost of one depends on the size of the brush and not on that of the image.
 *
 * An operation is {kind: "stroke", value, sizePx, points} or {kind: "box", value, from, to} or {kind: "clear"} or
 * {kind: "invert"}; places are {x, y} in pixels of the image. A rectangle is [left, top, right, bottom).
 */
export class Mask {
  /** `data` holds 1 (repaint) or 0 (keep), row by row. */
  constructor(width, height, data = new Uint8Array(width * height)) {
    [this.width, this.height, this.data] = [width, height, data];
  }

  get all() { return [0, 0, this.width, this.height]; }
  get isEmpty() { return !this.data.includes(1); }

  /** Paint an operation, and return the rectangle that it may have changed. */
  paint(operation) {
    if (operation.kind === "clear") { this.data.fill(0); return this.all; }
    if (operation.kind === "invert") { for (let n = 0; n < this.data.length; n++) this.data[n] ^= 1; return this.all; }
    if (operation.kind === "box") {
      const [left, top, right, bottom] = this.boxOf(operation);
      for (let y = top; y < bottom; y++) this.#fill(y, left, right, operation.value);
      return [left, top, right, bottom];
    }
    let changed = this.segment(operation, 0, 0);
    for (let n = 0; n + 1 < operation.points.length; n++) changed = around(changed, this.segment(operation, n, n + 1));
    return changed;
  }

  /** The pixels of a box. */
  boxOf({ from, to }) {
    const low = (a, b, limit) => Math.min(limit - 1, Math.max(0, Math.floor(Math.min(a, b))));
    const high = (a, b, limit) => Math.min(limit, Math.max(1, Math.floor(Math.max(a, b)) + 1));
    return [
      low(from.x, to.x, this.width), low(from.y, to.y, this.height),
      high(from.x, to.x, this.width), high(from.y, to.y, this.height),
    ];
  }

  /** From one point of a stroke to another, round at both ends. */
  segment({ points, sizePx, value }, from, to) {
    const [a, b, radius] = [points[from], points[to], sizePx / 2];
    const top = Math.max(0, Math.floor(Math.min(a.y, b.y) - radius)), bottom = Math.min(this.height, Math.ceil(Math.max(a.y, b.y) + radius));
    const [dx, dy] = [b.x - a.x, b.y - a.y];
    const squared = dx * dx + dy * dy, reach = radius * Math.sqrt(squared);
    const isInside = (x, y) => {
      const [px, py] = [x + 0.5 - a.x, y + 0.5 - a.y];
      const along = squared ? Math.min(1, Math.max(0, (px * dx + py * dy) / squared)) : 0;
      return (px - along * dx) ** 2 + (py - along * dy) ** 2 <= radius * radius;
    };
    for (let y = top; y < bottom; y++) {
      // What is painted has no dent, so in each row it is one interval: that of both round ends and of what lies between.
      const py = y + 0.5 - a.y;
      let [low, high] = [Infinity, -Infinity];
      for (const [x, off] of [[0, py], [dx, py - dy]]) {
        const half = radius * radius - off * off;
        if (half >= 0) [low, high] = [Math.min(low, x - Math.sqrt(half)), Math.max(high, x + Math.sqrt(half))];
      }
      if (squared) {
        const across = between(dy, reach - py * dx, reach + py * dx), along = between(dx, py * dy, squared - py * dy);
        const [left, right] = [Math.max(across[0], along[0]), Math.min(across[1], along[1])];
        if (left <= right) [low, high] = [Math.min(low, left), Math.max(high, right)];
      }
      if (low > high) continue;
      let first = Math.ceil(a.x + low - 0.5), last = Math.floor(a.x + high - 0.5);
      while (isInside(first - 1, y)) first--; // rounding
      while (first <= last && !isInside(first, y)) first++;
      while (isInside(last + 1, y)) last++;
      while (last >= first && !isInside(last, y)) last--;
      this.#fill(y, Math.max(0, first), Math.min(this.width, last + 1), value);
    }
    const left = Math.max(0, Math.floor(Math.min(a.x, b.x) - radius)), right = Math.min(this.width, Math.ceil(Math.max(a.x, b.x) + radius));
    return [left, top, right, bottom];
  }

  #fill(y, left, right, value) {
    if (left < right) this.data.fill(value, y * this.width + left, y * this.width + right);
  }

  /** The rectangle around what is painted, or null where nothing is. */
  bounds() {
    let found = null;
    for (let y = 0; y < this.height; y++) {
      const row = this.data.subarray(y * this.width, (y + 1) * this.width);
      const left = row.indexOf(1);
      if (left >= 0) found = around(found, [left, y, row.lastIndexOf(1) + 1, y + 1]);
    }
    return found;
  }

  /** A PNG of the image's own size: white is to be repainted, black is kept. A canvas would take 32 times the memory. */
  async toBlob() {
    const bytes = Math.ceil(this.width / 8);
    const rows = new Uint8Array((bytes + 1) * this.height); // each begins with its filter, 0: none
    for (let y = 0, n = 0; y < this.height; y++) {
      const start = y * (bytes + 1) + 1;
      for (let x = 0; x < this.width; x++, n++) if (this.data[n]) rows[start + (x >> 3)] |= 0x80 >> (x & 7);
    }
    const packed = await new Response(new Blob([rows]).stream().pipeThrough(new CompressionStream("deflate"))).arrayBuffer();
    const header = new DataView(new ArrayBuffer(13));
    header.setUint32(0, this.width);
    header.setUint32(4, this.height);
    header.setUint8(8, 1); // a bit a pixel, grey
    const start = new Uint8Array([0x89, 0x50, 0x4e, 0x47, 0x0d, 0x0a, 0x1a, 0x0a]);
    return new Blob(
      [start, chunk("IHDR", new Uint8Array(header.buffer)), chunk("IDAT", new Uint8Array(packed)), chunk("IEND", new Uint8Array())],
      { type: "image/png" });
  }

  /** The mask of an image file (a Blob) of the size of another. */
  static async read(blob, width, height) {
    const bitmap = await createImageBitmap(blob);
    if (bitmap.width !== width || bitmap.height !== height) {
      throw new Error(`the mask is ${bitmap.width} x ${bitmap.height} px, but the image is ${width} x ${height} px; choose a mask of the same size`);
    }
    const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
    context.drawImage(bitmap, 0, 0);
    const pixels = context.getImageData(0, 0, width, height).data;
    const mask = new Mask(width, height);
    for (let n = 0; n < mask.data.length; n++) mask.data[n] = pixels[4 * n] > 128 ? 1 : 0;
    return mask;
  }
}

/** The rectangle around two. */
export function around(one, other) {
  if (!one || !other) return one ?? other;
  return [Math.min(one[0], other[0]), Math.min(one[1], other[1]), Math.max(one[2], other[2]), Math.max(one[3], other[3])];
}

/** The x for which -below <= factor * x <= above. */
function between(factor, below, above) {
  if (factor === 0) return below >= 0 && above >= 0 ? [-Infinity, Infinity] : [Infinity, -Infinity];
  return factor > 0 ? [-below / factor, above / factor] : [above / factor, -below / factor];
}

function chunk(name, data) {
  const bytes = new Uint8Array(12 + data.length);
  const view = new DataView(bytes.buffer);
  view.setUint32(0, data.length);
  bytes.set([...name].map((letter) => letter.charCodeAt(0)), 4);
  bytes.set(data, 8);
  view.setUint32(8 + data.length, checksum(bytes.subarray(4, 8 + data.length)));
  return bytes;
}

/** CRC-32, as PNG has it. */
function checksum(bytes) {
  let crc = 0xffffffff;
  for (const byte of bytes) {
    crc ^= byte;
    for (let bit = 0; bit < 8; bit++) crc = crc & 1 ? (crc >>> 1) ^ 0xedb88320 : crc >>> 1;
  }
  return (crc ^ 0xffffffff) >>> 0;
}
