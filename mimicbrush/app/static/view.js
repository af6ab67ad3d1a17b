/**
 * An image on a stage, zoomed and moved: Ctrl and the wheel, the middle button, two fingers, or the hand.
 *
 * `content` holds what moves along, placed in pixels of the image. Widths in CSS may divide by --scale.
 */
const MOST_ENLARGED = 4; // where an image is fitted; by hand it is MOST_ZOOM
const MOST_ZOOM = 40;

export class View {
  isHand = false; // the first button moves the image
  scale = 1;
  #x = 0;
  #y = 0;
  #width = 0;
  #height = 0;
  #isFitted = true;
  #fingers = new Map(); // touches that are down, by their pointer
  #isGesture = false;
  #dragged = null; // pointer that moves the image, and where it was
  #onChange;
  #onGesture;

  /** `onGesture` is called where a second finger comes down: what the first one does then is no stroke. */
  constructor(stage, { onChange = () => {}, onGesture = () => {} } = {}) {
    [this.stage, this.#onChange, this.#onGesture] = [stage, onChange, onGesture];
    stage.classList.add("view");
    this.content = stage.appendChild(document.createElement("div"));
    this.content.className = "view-content";
    stage.addEventListener("wheel", (event) => this.#wheel(event), { passive: false });
    stage.addEventListener("pointerdown", (event) => this.#press(event), true);
    stage.addEventListener("mousedown", (event) => { if (event.button === 1) event.preventDefault(); }); // or some browsers scroll
    stage.addEventListener("pointermove", (event) => this.#move(event), true);
    for (const kind of ["pointerup", "pointercancel"]) stage.addEventListener(kind, (event) => this.#release(event), true);
    new ResizeObserver(() => { if (this.#isFitted) this.fit(); else this.#place(); }).observe(stage);
  }

  get isEmpty() { return !this.#width; }

  /** Say how large the image is, and show all of it. */
  setSize(width, height) {
    [this.#width, this.#height] = [width, height];
    Object.assign(this.content.style, { width: `${width}px`, height: `${height}px` });
    this.fit();
  }

  get #fitting() {
    return Math.min(this.stage.clientWidth / this.#width, this.stage.clientHeight / this.#height, MOST_ENLARGED);
  }

  fit() {
    if (this.isEmpty || !this.stage.clientWidth) return;
    this.scale = this.#fitting;
    this.#isFitted = true;
    this.#place();
  }

  /** Zoom; the place of the stage that is given stays where it is, or else its middle. */
  zoom(factor, x = this.stage.clientWidth / 2, y = this.stage.clientHeight / 2) {
    if (this.isEmpty) return;
    const scale = Math.min(MOST_ZOOM, Math.max(this.#fitting, this.scale * factor));
    [this.#x, this.#y] = [x - (x - this.#x) * scale / this.scale, y - (y - this.#y) * scale / this.scale];
    [this.scale, this.#isFitted] = [scale, scale === this.#fitting];
    this.#place();
  }

  /** Where an event is, in pixels of the image. */
  toImage({ clientX, clientY }) {
    const box = this.stage.getBoundingClientRect();
    return {
      x: (clientX - box.left - this.stage.clientLeft - this.#x) / this.scale,
      y: (clientY - box.top - this.stage.clientTop - this.#y) / this.scale,
    };
  }

  /** Where a place of the image is, in pixels of the stage. */
  toStage({ x, y }) { return { x: x * this.scale + this.#x, y: y * this.scale + this.#y }; }

  /** Move the image so that one of its places can be seen. */
  reveal(place) {
    const { x, y } = this.toStage(place);
    this.#x -= Math.min(0, x) + Math.max(0, x - this.stage.clientWidth);
    this.#y -= Math.min(0, y) + Math.max(0, y - this.stage.clientHeight);
    this.#place();
  }

  #place() {
    const keep = (at, shown, room) => shown <= room ? (room - shown) / 2 : Math.min(0, Math.max(room - shown, at));
    this.#x = keep(this.#x, this.#width * this.scale, this.stage.clientWidth);
    this.#y = keep(this.#y, this.#height * this.scale, this.stage.clientHeight);
    this.content.style.transform = `translate(${this.#x}px, ${this.#y}px) scale(${this.scale})`;
    this.content.style.setProperty("--scale", this.scale);
    this.#onChange();
  }

  #wheel(event) {
    if (!event.ctrlKey || this.isEmpty) return;
    event.preventDefault();
    const box = this.stage.getBoundingClientRect();
    this.zoom(Math.exp(-event.deltaY / 200), event.clientX - box.left, event.clientY - box.top);
  }

  #press(event) {
    if (event.pointerType === "touch") this.#fingers.set(event.pointerId, event);
    if (this.#fingers.size === 2 && !this.#isGesture) {
      this.#isGesture = true;
      this.#onGesture();
    }
    const isDrag = event.button === 1 || (this.isHand && event.button === 0 && !this.#isGesture);
    if (isDrag && !this.isEmpty) {
      event.preventDefault();
      this.stage.setPointerCapture(event.pointerId);
      this.#dragged = event;
    }
    if (this.#isGesture || isDrag) event.stopPropagation();
  }

  #move(event) {
    if (this.#isGesture && this.#fingers.has(event.pointerId)) {
      event.stopPropagation();
      const before = spread([...this.#fingers.values()]);
      this.#fingers.set(event.pointerId, event);
      const after = spread([...this.#fingers.values()]);
      const box = this.stage.getBoundingClientRect();
      [this.#x, this.#y] = [this.#x + after.x - before.x, this.#y + after.y - before.y];
      this.zoom(before.apart ? after.apart / before.apart : 1, after.x - box.left, after.y - box.top);
    } else if (this.#dragged?.pointerId === event.pointerId) {
      event.stopPropagation();
      [this.#x, this.#y] = [this.#x + event.clientX - this.#dragged.clientX, this.#y + event.clientY - this.#dragged.clientY];
      this.#dragged = event;
      this.#place();
    }
  }

  #release(event) {
    const isOurs = this.#isGesture || this.#dragged?.pointerId === event.pointerId;
    this.#fingers.delete(event.pointerId);
    if (!this.#fingers.size) this.#isGesture = false;
    if (this.#dragged?.pointerId === event.pointerId) this.#dragged = null;
    if (isOurs) event.stopPropagation();
  }
}

/** The middle of two fingers, and how far they are apart; of one, where it is. */
function spread([one, other = one]) {
  return {
    x: (one.clientX + other.clientX) / 2, y: (one.clientY + other.clientY) / 2,
    apart: Math.hypot(one.clientX - other.clientX, one.clientY - other.clientY),
  };
}
