/**
 * A brush and a box over an image. It needs no server: it takes an image and returns the mask.
 *
 *   const painter = new MaskPainter(document.querySelector("#stage"), { onChange: refresh });
 *   await painter.load(imageBlob, maskBlobOrNull);
 *   const png = await painter.toBlob();  // of the image's own size; 255 = repaint, 0 = keep
 *
 * The mask is painted in the image's own pixels, whatever size it is shown at: a pixel belongs to a stroke where
 * its centre lies at most half the brush's size from the pointer's path, and to a box where the pointer's two corners
 * touch or enclose it. There is no half-transparent edge. Its style is painter.css.
 */
export class MaskPainter {
  tool = "brush"; // or "box"
  erasing = false;
  sizePx = 40; // diameter of the brush, in pixels of the image

  #width = 0;
  #height = 0;
  #mask = new Uint8Array(0); // 1 = repaint, row by row
  #base = new Uint8Array(0); // the mask that the image came with
  #done = []; // what was painted since, in order: undone by painting all but the last again
  #undone = [];
  #painting = null; // the operation under the pointer
  #pointer = null; // where the pointer or the keyboard's cursor is, in pixels of the image
  #unsaved = false;
  #revision = 0; // grows with everything that changes the mask
  #onChange;

  constructor(stage, { onChange = () => {}, label = "Mask: arrow keys move the brush, the space bar paints" } = {}) {
    this.#onChange = onChange;
    stage.classList.add("painter-stage");
    this.image = stage.appendChild(document.createElement("img"));
    this.image.alt = "";
    this.image.draggable = false;
    this.overlay = stage.appendChild(document.createElement("canvas"));
    this.overlay.className = "painter-mask";
    this.overlay.tabIndex = 0;
    this.overlay.setAttribute("role", "application");
    this.overlay.setAttribute("aria-label", label);
    this.cursor = stage.appendChild(document.createElement("div"));
    this.cursor.className = "painter-cursor";
    this.cursor.hidden = true;
    this.overlay.addEventListener("pointerdown", (event) => this.#press(event));
    this.overlay.addEventListener("pointermove", (event) => this.#move(event));
    this.overlay.addEventListener("pointerup", (event) => this.#release(event));
    this.overlay.addEventListener("pointercancel", () => this.#cancel());
    this.overlay.addEventListener("pointerleave", () => { if (!this.#painting) this.cursor.hidden = true; });
    this.overlay.addEventListener("keydown", (event) => this.#key(event));
  }

  /** Show an image (a Blob), and the mask it already has (a Blob, or null). Rejects where one cannot be shown. */
  async load(blob, mask = null) {
    const url = URL.createObjectURL(blob);
    const image = new Image();
    image.src = url;
    let base;
    try {
      await image.decode();
      base = mask ? await readMask(mask, image) : new Uint8Array(image.naturalWidth * image.naturalHeight);
    } catch (error) { // what was shown before stays
      URL.revokeObjectURL(url);
      throw error;
    }
    if (this.image.src) URL.revokeObjectURL(this.image.src);
    this.image.src = url;
    await this.image.decode();
    const { naturalWidth: width, naturalHeight: height } = image;
    [this.#width, this.#height] = [width, height];
    [this.overlay.width, this.overlay.height] = [width, height];
    this.#base = base;
    this.#mask = base.slice();
    [this.#done, this.#undone, this.#painting, this.#pointer, this.#unsaved] = [[], [], null, null, false];
    this.#show(0, 0, width, height);
    this.#onChange();
  }

  get width() { return this.#width; }
  get height() { return this.#height; }
  get canUndo() { return this.#done.length > 0; }
  get canRedo() { return this.#undone.length > 0; }
  get isUnsaved() { return this.#unsaved; }

  /** How many pixels are painted. */
  count() { return this.#mask.reduce((sum, value) => sum + value, 0); }

  /** The box around what is painted, [left, top, right, bottom), or null where nothing is. */
  bounds() {
    let [left, top, right, bottom] = [this.#width, this.#height, 0, 0];
    this.#mask.forEach((value, at) => {
      if (!value) return;
      const [x, y] = [at % this.#width, Math.floor(at / this.#width)];
      [left, top, right, bottom] = [Math.min(left, x), Math.min(top, y), Math.max(right, x + 1), Math.max(bottom, y + 1)];
    });
    return right ? [left, top, right, bottom] : null;
  }

  undo() { if (this.canUndo) { this.#undone.push(this.#done.pop()); this.#again(); } }
  redo() { if (this.canRedo) { this.#done.push(this.#undone.pop()); this.#again(); } }
  clear() { if (this.#width) this.#finish({ kind: "clear" }); }
  get revision() { return this.#revision; }
  /** The mask of a revision is kept; what was painted since is not. */
  markSaved(revision) { if (revision === this.#revision) this.#unsaved = false; this.#onChange(); }

  /** The mask as a PNG of the image's own size: white (255) is to be repainted, black (0) is kept. */
  async toBlob() {
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [this.#width, this.#height];
    const image = new ImageData(this.#width, this.#height);
    const pixels = new Uint32Array(image.data.buffer);
    this.#mask.forEach((value, at) => { pixels[at] = value ? 0xffffffff : 0xff000000; });
    canvas.getContext("2d").putImageData(image, 0, 0);
    return new Promise((resolve, reject) => canvas.toBlob(
      (blob) => blob ? resolve(blob) : reject(new Error("this browser could not write the mask as PNG")), "image/png"));
  }

  // ---- the pointer

  #place(event) {
    const box = this.overlay.getBoundingClientRect();
    return {
      x: (event.clientX - box.left) * this.#width / box.width,
      y: (event.clientY - box.top) * this.#height / box.height,
    };
  }

  #press(event) {
    if (!this.#width || event.button !== 0 || this.#painting) return;
    this.overlay.setPointerCapture(event.pointerId);
    this.#pointer = this.#place(event);
    this.#begin(this.#pointer, event.pointerId);
  }

  #begin(place, pointerId) {
    const value = this.erasing ? 0 : 1;
    if (this.tool === "box") {
      this.#painting = { kind: "box", value, from: place, to: place, pointerId };
    } else {
      this.#painting = { kind: "stroke", value, sizePx: this.sizePx, points: [place], pointerId };
      this.#paint(this.#painting);
    }
    this.#showCursor();
  }

  #move(event) {
    if (!this.#width) return;
    this.#pointer = this.#place(event);
    const painting = this.#painting;
    if (painting && painting.pointerId === event.pointerId) {
      const events = event.getCoalescedEvents?.() ?? [];
      for (const each of events.length ? events : [event]) this.#extend(this.#place(each));
    }
    this.#showCursor();
  }

  #extend(place) {
    const painting = this.#painting;
    if (painting.kind === "box") { painting.to = place; return; }
    painting.points.push(place);
    this.#segment(painting, painting.points.length - 2);
  }

  #release(event) {
    const painting = this.#painting;
    if (!painting || painting.pointerId !== event.pointerId) return;
    this.#extend(this.#place(event));
    this.#painting = null;
    if (painting.kind === "box") this.#finish(painting); else this.#keep(painting);
    this.#showCursor();
  }

  #cancel() {
    if (!this.#painting) return;
    this.#painting = null;
    this.#again();
  }

  // ---- the keyboard: arrows move, space paints or sets a corner

  #key(event) {
    const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    const isPaint = event.key === " " || event.key === "Enter";
    if (!this.#width || event.ctrlKey || event.metaKey || !(event.key in steps || isPaint || event.key === "Escape")) return;
    event.preventDefault();
    const place = this.#pointer ?? { x: this.#width / 2, y: this.#height / 2 };
    if (event.key === "Escape") {
      this.#cancel();
    } else if (event.key in steps) {
      const step = event.shiftKey ? 1 : Math.max(1, this.sizePx / 2);
      place.x = Math.min(this.#width, Math.max(0, place.x + steps[event.key][0] * step));
      place.y = Math.min(this.#height, Math.max(0, place.y + steps[event.key][1] * step));
      if (this.#painting?.kind === "box") this.#painting.to = { ...place };
    } else if (this.#painting?.kind === "box") {
      const painting = this.#painting;
      this.#painting = null;
      this.#finish(painting);
    } else if (!this.#painting) {
      this.#begin({ ...place }, "keyboard");
      if (this.tool !== "box") { this.#keep(this.#painting); this.#painting = null; }
    }
    this.#pointer = place;
    this.#showCursor();
  }

  // ---- painting

  #finish(operation) { this.#paint(operation); this.#keep(operation); }

  #keep(operation) {
    this.#done.push(operation);
    this.#undone = [];
    this.#unsaved = true;
    this.#revision += 1;
    this.#onChange();
  }

  #again() {
    this.#mask.set(this.#base);
    this.#show(0, 0, this.#width, this.#height);
    this.#done.forEach((operation) => this.#paint(operation));
    this.#unsaved = true;
    this.#revision += 1;
    this.#onChange();
  }

  #paint(operation) {
    if (operation.kind === "clear") {
      this.#mask.fill(0);
      this.#show(0, 0, this.#width, this.#height);
    } else if (operation.kind === "box") {
      const { left, top, right, bottom } = this.#boxOf(operation);
      for (let y = top; y < bottom; y++) this.#mask.fill(operation.value, y * this.#width + left, y * this.#width + right);
      this.#show(left, top, right, bottom);
    } else {
      this.#segment(operation, 0, 0);
      for (let n = 0; n + 1 < operation.points.length; n++) this.#segment(operation, n);
    }
  }

  #boxOf({ from, to }) {
    const low = (a, b, limit) => Math.min(limit - 1, Math.max(0, Math.floor(Math.min(a, b))));
    const high = (a, b, limit) => Math.min(limit, Math.max(1, Math.floor(Math.max(a, b)) + 1));
    return {
      left: low(from.x, to.x, this.#width), right: high(from.x, to.x, this.#width),
      top: low(from.y, to.y, this.#height), bottom: high(from.y, to.y, this.#height),
    };
  }

  /** From point n to point n + 1 of a stroke, round at both ends. */
  #segment({ points, sizePx, value }, n, next = n + 1) {
    const [a, b, radius] = [points[n], points[next], sizePx / 2];
    const left = Math.max(0, Math.floor(Math.min(a.x, b.x) - radius)), right = Math.min(this.#width, Math.ceil(Math.max(a.x, b.x) + radius));
    const top = Math.max(0, Math.floor(Math.min(a.y, b.y) - radius)), bottom = Math.min(this.#height, Math.ceil(Math.max(a.y, b.y) + radius));
    const [dx, dy] = [b.x - a.x, b.y - a.y];
    const squared = dx * dx + dy * dy;
    for (let y = top; y < bottom; y++) {
      for (let x = left; x < right; x++) {
        const [px, py] = [x + 0.5 - a.x, y + 0.5 - a.y];
        const along = squared ? Math.min(1, Math.max(0, (px * dx + py * dy) / squared)) : 0;
        const [ex, ey] = [px - along * dx, py - along * dy];
        if (ex * ex + ey * ey <= radius * radius) this.#mask[y * this.#width + x] = value;
      }
    }
    this.#show(left, top, right, bottom);
  }

  #show(left, top, right, bottom) {
    const [width, height] = [right - left, bottom - top];
    if (width <= 0 || height <= 0) return;
    const image = new ImageData(width, height);
    const pixels = new Uint32Array(image.data.buffer);
    for (let y = 0; y < height; y++) {
      for (let x = 0; x < width; x++) {
        if (this.#mask[(top + y) * this.#width + left + x]) pixels[y * width + x] = 0xff6a2ee8; // ABGR: a pink that few things have
      }
    }
    this.overlay.getContext("2d").putImageData(image, left, top);
  }

  #showCursor() {
    if (!this.#pointer) return;
    const shown = this.overlay.getBoundingClientRect();
    const scale = shown.width / this.#width;
    const box = this.#painting?.kind === "box" ? this.#boxOf(this.#painting) : null;
    const size = this.tool === "box" ? 0 : this.sizePx;
    const { left, top, right, bottom } = box ?? {
      left: this.#pointer.x - size / 2, right: this.#pointer.x + size / 2,
      top: this.#pointer.y - size / 2, bottom: this.#pointer.y + size / 2,
    };
    this.cursor.hidden = false;
    this.cursor.classList.toggle("is-box", this.tool === "box");
    Object.assign(this.cursor.style, {
      left: `${left * scale}px`, top: `${top * scale}px`,
      width: `${(right - left) * scale}px`, height: `${(bottom - top) * scale}px`,
    });
  }
}

/** A mask image of the size of another, as 0 and 1 row by row. */
async function readMask(blob, { naturalWidth: width, naturalHeight: height }) {
  const bitmap = await createImageBitmap(blob);
  if (bitmap.width !== width || bitmap.height !== height) {
    throw new Error(`the mask is ${bitmap.width} x ${bitmap.height} px, its image ${width} x ${height} px`);
  }
  const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  const pixels = context.getImageData(0, 0, width, height).data;
  return Uint8Array.from({ length: width * height }, (_, at) => pixels[4 * at] > 128 ? 1 : 0);
}
