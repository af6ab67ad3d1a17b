/** The images of an edit: the source with its mask, and the references with their boxes. */
import { MaskPainter } from "./painter.js";
import { readShown, upload } from "./server.js";
import { keep } from "./store.js";
import { bindTools } from "./toolbar.js";

export function makeId() { return crypto.getRandomValues(new Uint32Array(3)).join("-"); }

/** An image that was given: the file itself, and how it is shown. It has a token while the server has it. */
class Given {
  token = null;

  constructor({ id = makeId(), file, name, shown, ...more }) { Object.assign(this, { id, file, name, shown }, more); }

  /** Send a file to the server, and get back how it is shown. */
  static async send(file, most) {
    const name = file.name ?? "image.png";
    if (file.size > most) {
      const [given, limit] = [file.size, most].map((bytes) => (bytes / 2 ** 20).toFixed());
      throw new Error(`${name} is too large: ${given} MiB; the limit is ${limit} MiB`);
    }
    const token = await upload(file);
    const given = new Given({ file, name, shown: await readShown(token) });
    given.token = token;
    return given;
  }

  async haveToken() { return this.token ??= await upload(this.file); }

  /** What is kept in the browser. */
  get kept() { const { token, ...kept } = this; return kept; }
}

class Panel {
  constructor(element, { options, onChange }, painter) {
    [this.element, this.options, this.onChange] = [element, options, onChange];
    this.at = (role) => element.querySelector(`[data-role=${role}]`);
    this.painter = new MaskPainter(this.at("stage"), { ...painter, onChange: () => this.refresh?.() });
    this.ring = this.painter.view.content.appendChild(document.createElement("div"));
    this.ring.className = "ring";
    this.ring.hidden = true;
    this.at("empty").addEventListener("click", () => this.at("picture").click());
    this.at("picture").addEventListener("change", () => this.chosen("picture", (files) => this.take(files)));
    element.addEventListener("dragover", (event) => { event.preventDefault(); element.classList.add("is-over"); });
    element.addEventListener("dragleave", (event) => { if (!element.contains(event.relatedTarget)) element.classList.remove("is-over"); });
    element.addEventListener("drop", (event) => {
      event.preventDefault();
      element.classList.remove("is-over");
      const files = [...event.dataTransfer.files];
      if (files.length) this.attempt(() => this.take(files));
    });
  }

  say(text, isBad = false) {
    this.at("said").textContent = text;
    this.at("said").classList.toggle("bad", isBad);
  }

  /** The tools come with the image. */
  setEmpty(isEmpty) {
    this.element.classList.toggle("is-empty", isEmpty);
    this.at("empty").hidden = !isEmpty;
  }

  async attempt(work) { try { await work(); } catch (error) { this.say(error.message, true); } }

  chosen(role, work) {
    const input = this.at(role);
    const files = [...input.files];
    return files.length && this.attempt(async () => { try { await work(files); } finally { input.value = ""; } });
  }

  async send(file) {
    this.say("Uploading …");
    return Given.send(file, this.options.max_upload_bytes);
  }

  /** A ring at a place of the image, in its pixels; none where the place is beside it, on the padding. */
  point({ x, y }, sizePx) {
    this.ring.hidden = x < 0 || y < 0 || x > this.painter.width || y > this.painter.height;
    placeRing(this.ring, { x, y }, Math.max(sizePx, 10 / this.painter.view.scale));
  }
}

export function placeRing(ring, { x, y }, sizePx) {
  Object.assign(ring.style, { left: `${x}px`, top: `${y}px`, width: `${sizePx}px`, height: `${sizePx}px` });
}

export class SourcePanel extends Panel {
  given = null;
  #mask = { revision: null, token: null }; // at the server

  constructor(element, context) {
    super(element, context, { label: "Mask of the source. Arrow keys move the brush, and the space bar paints." });
    const refreshTools = bindTools(this.painter, this.at);
    let revision = this.painter.revision;
    this.refresh = () => {
      refreshTools();
      if (this.painter.revision === revision) return;
      revision = this.painter.revision;
      this.keep();
      this.onChange();
    };
    this.at("mask").addEventListener("change", () => this.chosen("mask", async ([file]) => {
      if (!this.given) throw new Error("Choose the image to edit first, then its mask.");
      await this.painter.load(this.given.shown, file);
      this.say(`The mask was loaded from ${file.name}.`);
    }));
  }

  keep() {
    keep("source", () => this.given && { ...this.given.kept, painting: this.painter.painting });
  }

  async take([file], mask = null) { await this.show(await this.send(file), mask); }

  async show(given, mask = null, painting = null) {
    await this.painter.load(given.shown, painting?.base ?? mask, painting);
    this.given = given;
    this.setEmpty(false);
    this.ring.hidden = true;
    this.painter.sizePx = Math.max(this.painter.width, this.painter.height) / 10;
    this.say(`${this.painter.width} x ${this.painter.height} px. ${this.painter.isEmpty ? "Paint over the part that you want to replace." : ""}`);
    this.keep();
    this.onChange();
  }

  async restore({ painting, ...kept }) { await this.show(new Given(kept), null, painting); }

  async askMask() {
    if (!this.given) return "";
    const { revision } = this.painter;
    if (this.#mask.revision !== revision) this.#mask = { revision, token: await upload(await this.painter.toBlob()) };
    return this.#mask.token;
  }

  forgetTokens() {
    this.#mask = { revision: null, token: null };
    if (this.given) this.given.token = null;
  }

  get fingerprint() { return [this.given?.id, this.painter.revision]; }
}

export class ReferencePanel extends Panel {
  all = []; // Given, each with its box
  current = null;

  constructor(element, context) {
    super(element, context, {
      label: "Box around a part of the reference. Arrow keys move, and the space bar sets a corner.", isSingle: true,
    });
    this.painter.tool = "box";
    let revision = this.painter.revision;
    this.refresh = () => {
      if (this.painter.revision === revision || !this.current) return;
      revision = this.painter.revision;
      this.current.box = this.painter.bounds();
      this.#changed();
    };
    this.at("all").addEventListener("click", () => this.painter.clear());
    this.at("remove").addEventListener("click", () => this.remove());
    this.at("zoom-in").addEventListener("click", () => this.painter.view.zoom(1.5));
    this.at("zoom-out").addEventListener("click", () => this.painter.view.zoom(1 / 1.5));
    this.at("fit").addEventListener("click", () => this.painter.view.fit());
    this.heat = this.painter.view.content.appendChild(document.createElement("canvas"));
    this.heat.className = "heat";
    this.heat.hidden = true;
  }

  /** One file takes the place of the reference that is shown, unless `isMore`; several come beside it. */
  async take(files, isMore = files.length > 1) {
    const room = this.options.max_references - (isMore ? this.all.length : this.all.length - 1);
    for (const file of files.slice(0, Math.max(0, room))) await this.add(await this.send(file), isMore);
    if (files.length > room) throw new Error(`An edit takes at most ${this.options.max_references} references. Remove one first.`);
  }

  async add(given, isMore) {
    const at = this.all.indexOf(this.current);
    if (isMore || at < 0) this.all.push(given); else this.all[at] = given;
    await this.show(given);
  }

  async show(given) {
    this.current = null; // what changes meanwhile is not its box
    const box = given.box;
    const corners = box && { kind: "box", value: 1, from: { x: box[0] + 0.5, y: box[1] + 0.5 }, to: { x: box[2] - 0.5, y: box[3] - 0.5 } };
    await this.painter.load(given.shown, null, corners && { done: [corners], undone: [], revision: this.painter.revision + 1 });
    this.current = given;
    this.ring.hidden = this.heat.hidden = true;
    this.setEmpty(false);
    this.say(`${this.painter.width} x ${this.painter.height} px`);
    this.#changed();
  }

  async remove() {
    const at = this.all.indexOf(this.current);
    if (at < 0) return;
    this.all.splice(at, 1);
    if (this.all.length) { await this.show(this.all[Math.max(0, at - 1)]); return; }
    this.current = null;
    this.painter.unload();
    this.setEmpty(true);
    this.ring.hidden = this.heat.hidden = true;
    this.#changed();
  }

  #changed() {
    keep("references", () => this.all.map((each) => each.kept));
    const thumbs = this.all.length > 1 || this.options.max_references > 1 && this.all.length ? this.all : [];
    const items = thumbs.map((each, number) => thumb(each.shown, {
      name: `Reference ${number + 1}: ${each.name}`, isPressed: each === this.current, act: () => this.attempt(() => this.show(each)),
    }));
    if (thumbs.length && this.all.length < this.options.max_references) {
      const more = Object.assign(document.createElement("label"), { className: "button", textContent: "Add another" });
      const input = Object.assign(document.createElement("input"), { type: "file", accept: "image/*", multiple: true });
      input.dataset.role = "more";
      input.setAttribute("aria-label", "Add another reference");
      input.addEventListener("change", () => this.attempt(() => this.take([...input.files], true)));
      more.append(input);
      items.push(Object.assign(document.createElement("li"), {}));
      items.at(-1).append(more);
    }
    this.at("thumbs").replaceChildren(...items);
    this.at("all").disabled = !this.current?.box;
    this.onChange();
  }

  /** The small image of a reference, or undefined where it is here no more. */
  thumbOf(id) { return this.at("thumbs").querySelectorAll("button")[this.all.findIndex((each) => each.id === id)]; }

  async restore(kept) {
    for (const each of kept) await this.add(new Given(each), true);
  }

  async asked() {
    return Promise.all(this.all.map(async (each) => ({ image: await each.haveToken(), box: each.box ?? null })));
  }

  forgetTokens() { for (const each of this.all) each.token = null; }

  get fingerprint() { return this.all.map(({ id, box }) => [id, box ?? null]); }
}

/** An item of a list of images, each a button. */
export function thumb(blob, { name, isPressed, act }) {
  const item = document.createElement("li");
  const button = item.appendChild(Object.assign(document.createElement("button"), { type: "button" }));
  button.setAttribute("aria-pressed", isPressed);
  const image = button.appendChild(Object.assign(new Image(), { alt: name }));
  image.src = URL.createObjectURL(blob);
  image.addEventListener("load", () => URL.revokeObjectURL(image.src));
  button.addEventListener("click", act);
  return item;
}
