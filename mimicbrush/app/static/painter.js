/**
 * A brush and a box over an image. It needs no server: it takes an image and returns the mask.
 *
 *   const painter = new MaskPainter(document.querySelector("#stage"), { onChange: refresh });
 *   await painter.load(imageBlob, maskBlobOrNull);
 *   const png = await painter.toBlob();  // of the image's own size; 255 = repaint, 0 = keep
 *
 * The mask is painted in the image's own pixels, whatever size it is shown at (mask.js). What is seen of it is a canvas
 * of the stage's size: a stroke costs as much over 24 megapixels as over one. Its style is painter.css.
 */
import { Mask, around } from "./mask.js";
import { View } from "./view.js";

const COLOUR = 0xff6a2ee8; // ABGR: a pink that few things have
const WHEEL_STEP = 1.1;

export class MaskPainter {
  tool = "brush"; // or "box"
  erasing = false;
  isSingle; // a new box takes the place of the old

  #mask = new Mask(0, 0);
  #base = null; // the mask that the image came with (a Blob), and its pixels
  #basePixels = null;
  #done = []; // what was painted since, in order: undone by painting all but the last again
  #undone = [];
  #painting = null; // the operation under the pointer
  #pointer = null; // where the pointer or the keyboard's cursor is, in pixels of the image
  #unsaved = false;
  #revision = 0; // grows with everything that changes the mask
  #sizePx = 40; // diameter of the brush, in pixels of the image
  #changed = null; // the rectangle that must be shown again
  #onChange;

  /** `label` is what a screen reader calls the canvas; `onChange` is called when mask or tool changed. */
  constructor(stage, { onChange = () => {}, label = "Mask. Arrow keys move the brush, and the space bar paints.", isSingle = false } = {}) {
    [this.#onChange, this.isSingle, this.stage] = [onChange, isSingle, stage];
    stage.classList.add("painter-stage");
    this.view = new View(stage, { onChange: () => this.#showAll(), onGesture: () => this.#cancel() });
    this.image = this.view.content.appendChild(document.createElement("img"));
    this.image.alt = "";
    this.image.draggable = false;
    this.image.hidden = true;
    this.overlay = stage.appendChild(document.createElement("canvas"));
    this.overlay.className = "painter-mask";
    this.overlay.tabIndex = -1; // until there is something to paint on
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
    this.overlay.addEventListener("wheel", (event) => this.#wheel(event), { passive: false });
  }

  /**
   * Show an image (a Blob), and the mask it already has (a Blob, or null). Rejects where one cannot be shown.
   * `painted` is what `painting` was earlier: the same strokes, which can be undone, over the same mask.
   */
  async load(blob, mask = null, painted = null) {
    const url = URL.createObjectURL(blob);
    const image = new Image();
    image.src = url;
    let base;
    try {
      await image.decode();
      base = mask ? await Mask.read(mask, image.naturalWidth, image.naturalHeight) : null;
    } catch (error) { // what was shown before stays
      URL.revokeObjectURL(url);
      throw error;
    }
    if (this.image.src) URL.revokeObjectURL(this.image.src);
    this.image.src = url;
    await this.image.decode();
    const { naturalWidth: width, naturalHeight: height } = image;
    this.image.hidden = false;
    this.overlay.tabIndex = 0;
    [this.#base, this.#basePixels] = [mask, base?.data ?? null];
    [this.#done, this.#undone, this.#painting, this.#pointer] = [painted?.done ?? [], painted?.undone ?? [], null, null];
    this.#revision = painted?.revision ?? this.#revision + 1;
    this.#unsaved = false;
    this.#mask = new Mask(width, height);
    this.#repaint();
    this.view.setSize(width, height);
    this.#onChange();
  }

  /** Show nothing. */
  unload() {
    if (this.image.src) URL.revokeObjectURL(this.image.src);
    this.image.removeAttribute("src");
    this.image.hidden = this.cursor.hidden = true;
    this.overlay.tabIndex = -1;
    this.#mask = new Mask(0, 0);
    [this.#base, this.#basePixels, this.#done, this.#undone, this.#painting, this.#unsaved] = [null, null, [], [], null, false];
    this.#revision += 1;
    this.view.setSize(0, 0);
    this.overlay.getContext("2d").clearRect(0, 0, this.overlay.width, this.overlay.height);
    this.#onChange();
  }

  get width() { return this.#mask.width; }
  get height() { return this.#mask.height; }
  get canUndo() { return this.#done.length > 0; }
  get canRedo() { return this.#undone.length > 0; }
  get isUnsaved() { return this.#unsaved; }
  get isEmpty() { return this.#mask.isEmpty; }
  get sizePx() { return this.#sizePx; }
  get maxSizePx() { return Math.max(20, Math.round(Math.max(this.width, this.height) / 3)); }
  set sizePx(sizePx) {
    this.#sizePx = Math.min(this.maxSizePx, Math.max(1, Math.round(sizePx)));
    this.#showCursor();
    this.#onChange();
  }

  /** The box around what is painted, [left, top, right, bottom), or null where nothing is. */
  bounds() { return this.#mask.bounds(); }
  /** What was painted, to be kept and given to `load`. */
  get painting() { return { base: this.#base, done: this.#done, undone: this.#undone, revision: this.#revision }; }

  undo() { if (this.canUndo) { this.#undone.push(this.#done.pop()); this.#again(); } }
  redo() { if (this.canRedo) { this.#done.push(this.#undone.pop()); this.#again(); } }
  clear() { if (this.width) this.#finish({ kind: "clear" }); }
  invert() { if (this.width) this.#finish({ kind: "invert" }); }
  get revision() { return this.#revision; }
  /** The mask of a revision is kept; what was painted since is not. */
  markSaved(revision) { if (revision === this.#revision) this.#unsaved = false; this.#onChange(); }

  /** The mask as a PNG of the image's own size: white (255) is to be repainted, black (0) is kept. */
  toBlob() { return this.#mask.toBlob(); }

  // ---- the pointer

  #press(event) {
    if (!this.width || event.button !== 0 || this.#painting) return;
    this.overlay.setPointerCapture(event.pointerId);
    this.#pointer = this.view.toImage(event);
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
    if (!this.width) return;
    this.#pointer = this.view.toImage(event);
    const painting = this.#painting;
    if (painting && painting.pointerId === event.pointerId) {
      const events = event.getCoalescedEvents?.() ?? [];
      for (const each of events.length ? events : [event]) this.#extend(this.view.toImage(each));
    }
    this.#showCursor();
  }

  #extend(place) {
    const painting = this.#painting;
    if (painting.kind === "box") { painting.to = place; return; }
    painting.points.push(place);
    this.#show(this.#mask.segment(painting, painting.points.length - 2, painting.points.length - 1));
  }

  #release(event) {
    const painting = this.#painting;
    if (!painting || painting.pointerId !== event.pointerId) return;
    this.#extend(this.view.toImage(event));
    this.#painting = null;
    if (painting.kind === "box") this.#finish(painting); else this.#keep(painting);
    this.#showCursor();
  }

  #cancel() {
    if (!this.#painting) return;
    this.#painting = null;
    this.#again();
  }

  #wheel(event) {
    if (event.ctrlKey || this.tool !== "brush" || !this.width) return;
    event.preventDefault();
    const size = event.deltaY < 0 ? this.sizePx * WHEEL_STEP + 1 : this.sizePx / WHEEL_STEP - 1;
    this.#pointer = this.view.toImage(event);
    this.sizePx = size;
  }

  // ---- the keyboard: arrows move, space paints or sets a corner

  #key(event) {
    const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    const isPaint = event.key === " " || event.key === "Enter";
    if (!this.width || event.ctrlKey || event.metaKey || !(event.key in steps || isPaint || event.key === "Escape")) return;
    event.preventDefault();
    const place = this.#pointer ?? { x: this.width / 2, y: this.height / 2 };
    if (event.key === "Escape") {
      this.#cancel();
    } else if (event.key in steps) {
      const step = event.shiftKey ? 1 : Math.max(1, this.sizePx / 2);
      place.x = Math.min(this.width, Math.max(0, place.x + steps[event.key][0] * step));
      place.y = Math.min(this.height, Math.max(0, place.y + steps[event.key][1] * step));
      if (this.#painting?.kind === "box") this.#painting.to = { ...place };
      this.view.reveal(place);
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

  #finish(operation) {
    if (this.isSingle && operation.kind === "box") this.#show(this.#mask.paint({ kind: "clear" }));
    this.#paint(operation);
    this.#keep(operation);
  }

  #keep({ pointerId, ...operation }) {
    this.#done = this.isSingle ? [operation] : [...this.#done, operation];
    this.#undone = [];
    this.#unsaved = true;
    this.#revision += 1;
    this.#onChange();
  }

  #again() {
    this.#repaint();
    this.#unsaved = true;
    this.#revision += 1;
    this.#onChange();
  }

  #repaint() {
    if (this.#basePixels) this.#mask.data.set(this.#basePixels); else this.#mask.data.fill(0);
    this.#done.forEach((operation) => this.#mask.paint(operation));
    this.#show(this.#mask.all);
  }

  #paint(operation) { this.#show(this.#mask.paint(operation)); }

  // ---- what is seen

  #showAll() {
    const ratio = window.devicePixelRatio || 1;
    const [width, height] = [Math.round(this.stage.clientWidth * ratio), Math.round(this.stage.clientHeight * ratio)];
    if (this.overlay.width !== width || this.overlay.height !== height) [this.overlay.width, this.overlay.height] = [width, height];
    this.#show(null, true);
    this.#showCursor();
  }

  /** Show a rectangle of the mask again, before the next frame; with `isAll` the whole stage. */
  #show(rectangle, isAll = false) {
    if (!this.#changed) requestAnimationFrame(() => this.#draw());
    this.#changed = isAll || this.#changed?.isAll ? { isAll: true } : { rectangle: around(this.#changed?.rectangle ?? null, rectangle) };
  }

  #draw() {
    const { isAll, rectangle } = this.#changed;
    this.#changed = null;
    if (!this.width || !this.overlay.width) return;
    // One pixel of the canvas is 1 / step pixels of the image; what lies outside of the image is left empty.
    const step = this.overlay.width / this.stage.clientWidth * this.view.scale;
    const { x, y } = this.view.toStage({ x: 0, y: 0 });
    const [startX, startY] = [x, y].map((each) => each * this.overlay.width / this.stage.clientWidth);
    const inside = (at, limit) => Math.min(limit, Math.max(0, at));
    const [left, top, right, bottom] = isAll ? this.#mask.all : rectangle;
    const [low, high] = [inside(Math.floor(left * step + startX), this.overlay.width), inside(Math.ceil(right * step + startX), this.overlay.width)];
    const [first, last] = [inside(Math.floor(top * step + startY), this.overlay.height), inside(Math.ceil(bottom * step + startY), this.overlay.height)];
    const context = this.overlay.getContext("2d");
    if (isAll) context.clearRect(0, 0, this.overlay.width, this.overlay.height);
    if (high <= low || last <= first) return;
    const image = new ImageData(high - low, last - first);
    const pixels = new Uint32Array(image.data.buffer);
    const columns = Int32Array.from({ length: high - low }, (_, n) => inside(Math.floor((low + n + 0.5 - startX) / step), this.width - 1));
    const { data, width } = this.#mask;
    for (let row = 0, at = 0; row < last - first; row++) {
      const start = inside(Math.floor((first + row + 0.5 - startY) / step), this.height - 1) * width;
      for (let n = 0; n < columns.length; n++, at++) if (data[start + columns[n]]) pixels[at] = COLOUR;
    }
    context.putImageData(image, low, first);
  }

  #showCursor() {
    if (!this.#pointer || !this.width) return;
    const box = this.#painting?.kind === "box" ? this.#mask.boxOf(this.#painting) : null;
    const half = this.tool === "box" ? 0 : this.sizePx / 2;
    const { x, y } = this.#pointer;
    const [left, top, right, bottom] = box ?? [x - half, y - half, x + half, y + half];
    const at = this.view.toStage({ x: left, y: top });
    this.cursor.hidden = false;
    this.cursor.classList.toggle("is-box", this.tool === "box");
    Object.assign(this.cursor.style, {
      transform: `translate(${at.x}px, ${at.y}px)`,
      width: `${(right - left) * this.view.scale}px`, height: `${(bottom - top) * this.view.scale}px`,
    });
  }
}
