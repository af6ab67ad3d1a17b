/** The editing page's three panels (mimicbrush/app/editing_service.py): what is painted, what is asked for, what came of it. */
import { MaskPainter } from "./painter.js";

const panels = {}; // name -> Panel
let job = null; // the edit that was asked for last

async function ask(path, options = {}) {
  const answer = await fetch(path, options);
  if (answer.ok) return answer;
  const text = await answer.text();
  let reason = text;
  try { reason = JSON.parse(text).error; } catch { /* not ours: shown as it came */ }
  throw new Error(reason || `the server answered ${answer.status}`);
}

async function upload(blob) {
  const headers = { "Content-Type": "application/octet-stream" };
  return (await (await ask("/upload", { method: "POST", headers, body: blob })).json()).token;
}

/** An image that is painted on: the source with its mask, or the reference with its box. */
class Panel {
  token = null; // of the image, at the server

  /** `label` is what a screen reader calls the canvas. */
  constructor(element, label) {
    this.at = (role) => element.querySelector(`[data-role=${role}]`);
    this.painter = new MaskPainter(this.at("stage"), { label, onChange: () => { this.refresh(); panels.result?.age(); } });
    this.ring = this.at("stage").appendChild(document.createElement("div"));
    this.ring.className = "mb-ring";
    this.ring.hidden = true;
    this.at("picture").addEventListener("change", () => this.chosen("picture", (file) => this.show(file)));
    this.at("clear").addEventListener("click", () => this.painter.clear());
  }

  say(text, isBad = false) {
    this.at("said").textContent = text;
    this.at("said").classList.toggle("bad", isBad);
  }

  async attempt(work) { try { await work(); } catch (error) { this.say(error.message, true); } }

  chosen(role, work) {
    const input = this.at(role);
    const file = input.files[0];
    return file && this.attempt(async () => { try { await work(file); } finally { input.value = ""; } });
  }

  /** Upload an image; returns its token. */
  async upload(file) {
    const most = Number(this.at("picture").dataset.maxBytes);
    if (file.size > most) {
      const [given, limit] = [file.size, most].map((bytes) => (bytes / 2 ** 20).toFixed());
      throw new Error(`${file.name ?? "this file"}: too large, ${given} MiB; at most ${limit} MiB are taken`);
    }
    this.say("Uploading …");
    return upload(file);
  }

  /** Upload an image, and show it as the server reads it. */
  async show(file, mask = null) {
    const token = await this.upload(file);
    await this.painter.load(await (await ask(`/shown/${token}`)).blob(), mask);
    this.token = token;
    this.painter.sizePx = Math.max(1, Math.round(Math.max(this.painter.width, this.painter.height) / 10));
    this.ring.hidden = true;
    this.refresh();
    this.say(`${this.painter.width} x ${this.painter.height} px`);
  }

  /** A circle at a place of the image, in its pixels; none where the place is beside it, on the padding. */
  point({ x, y }, sizePx) {
    this.ring.hidden = x < 0 || y < 0 || x > this.painter.width || y > this.painter.height;
    if (this.ring.hidden) return;
    const shown = this.painter.image.getBoundingClientRect();
    circle(this.ring, x / this.painter.width, y / this.painter.height, sizePx / this.painter.width * shown.width);
  }

  refresh() {}
}

class SourcePanel extends Panel {
  constructor(element) {
    super(element, "Mask over the source: arrow keys move the brush, the space bar paints");
    for (const tool of ["brush", "box"]) this.at(tool).addEventListener("click", () => { this.painter.tool = tool; this.refresh(); });
    this.at("erase").addEventListener("click", () => { this.painter.erasing = !this.painter.erasing; this.refresh(); });
    this.at("size").addEventListener("input", () => { this.painter.sizePx = Number(this.at("size").value); });
    this.at("undo").addEventListener("click", () => this.painter.undo());
    this.at("redo").addEventListener("click", () => this.painter.redo());
    this.at("mask").addEventListener("change", () => this.chosen("mask", async (file) => {
      if (!this.token) throw new Error("choose an image first, then its mask");
      await this.painter.load(await (await ask(`/shown/${this.token}`)).blob(), file);
      this.say(`the mask of ${file.name}`);
    }));
    this.refresh();
  }

  refresh() {
    this.at("undo").disabled = !this.painter.canUndo;
    this.at("redo").disabled = !this.painter.canRedo;
    for (const tool of ["brush", "box"]) this.at(tool).setAttribute("aria-pressed", this.painter.tool === tool);
    this.at("erase").setAttribute("aria-pressed", this.painter.erasing);
    this.at("size").max = Math.max(20, Math.round(Math.max(this.painter.width, this.painter.height) / 3));
    this.at("size").value = this.painter.sizePx;
  }
}

class ReferencePanel extends Panel {
  others = []; // further references: { token, image, ring }

  constructor(element) {
    super(element, "Box around a part of the reference: arrow keys move, the space bar sets a corner");
    this.painter.tool = "box";
    // One box at a time: a new one takes the place of the old.
    this.painter.overlay.addEventListener("pointerdown", () => { if (this.painter.count()) this.painter.clear(); }, true);
    this.at("another").addEventListener("change", () => this.chosen("another", (file) => this.add(file)));
  }

  /** One more reference, as the server reads it; a button takes it away again. */
  async add(file) {
    if (this.others.length === 3) throw new Error("at most three more references are taken; remove one first");
    const other = { token: await this.upload(file), image: new Image(), ring: document.createElement("div") };
    other.image.src = `/shown/${other.token}`;
    other.image.alt = `one more reference: ${file.name}`;
    await other.image.decode();
    Object.assign(other.ring, { className: "mb-ring", hidden: true });
    const remove = Object.assign(document.createElement("button"), { textContent: "×" });
    remove.setAttribute("aria-label", `Remove ${file.name}`);
    const figure = document.createElement("figure");
    figure.append(other.image, other.ring, remove);
    const change = (others) => { this.others = others; panels.result?.age(); };
    remove.addEventListener("click", () => { figure.remove(); change(this.others.filter((each) => each !== other)); });
    this.at("others").append(figure);
    change([...this.others, other]);
    this.say(`${file.name} was added`);
  }

  /** A circle at a place of one of the references, by its token; none where that is shown no more. */
  pointAt(token, { x, y }, sizePx) {
    for (const ring of [this.ring, ...this.others.map((each) => each.ring)]) ring.hidden = true;
    if (token === this.token) this.point({ x, y }, sizePx);
    const { image, ring } = this.others.find((each) => each.token === token) ?? {};
    if (!image || x < 0 || y < 0 || x > image.naturalWidth || y > image.naturalHeight) return;
    circle(ring, x / image.naturalWidth, y / image.naturalHeight, 20);
  }
}

function circle(ring, x, y, diameterPx) {
  ring.hidden = false;
  const size = `${Math.max(10, diameterPx)}px`;
  Object.assign(ring.style, { left: `${100 * x}%`, top: `${100 * y}%`, width: size, height: size });
}

export function source(element) { panels.source = new SourcePanel(element); }
export function reference(element) { panels.reference = new ReferencePanel(element); }

/** Shows what the server answers, and where in the reference each place of the hole comes from. */
export function result(element, { props, watch }) {
  const at = (role) => element.querySelector(`[data-role=${role}]`);
  let answer = null;
  let chosen = null;

  /** What is shown came of other images, or of another mask. */
  function age(isOld = true) {
    if (!answer) return;
    at("results").closest(".mb-panel").classList.toggle("mb-old", isOld);
    at("said").textContent = isOld ? "This is the result of other images or of another mask." : "";
  }

  function choose(number) {
    chosen = answer.results[number];
    at("after").src = `/files/${chosen.token}`;
    [...at("results").querySelectorAll("button")].forEach((each, n) => each.setAttribute("aria-pressed", n === number));
    at("results").querySelector("a").href = `/files/${chosen.token}`;
    at("results").querySelector("a").download = `edited_seed${chosen.seed}.png`;
    at("ring").hidden = true;
  }

  /** At "before" nothing of the result is shown, at "after" all of it. */
  function slide() { at("after").style.clipPath = `inset(0 ${100 - at("where").value}% 0 0)`; }

  function show() {
    if (!props.value?.results) return;
    answer = props.value;
    at("before").src = `/shown/${answer.source}`;
    const buttons = answer.results.map(({ token, seed }, number) => {
      const button = document.createElement("button");
      button.append(Object.assign(new Image(), { src: `/files/${token}`, alt: `seed ${seed}` }));
      button.addEventListener("click", () => choose(number));
      return button;
    });
    at("results").replaceChildren(...buttons, Object.assign(document.createElement("a"), { textContent: "Download" }));
    [at("compare").hidden, at("slide").hidden, at("where").value] = [false, false, 100];
    slide();
    age(false);
    choose(0);
  }

  function point(event) {
    if (!chosen?.places) return;
    const box = at("compare").getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width * answer.width;
    const y = (event.clientY - box.top) / box.height * answer.height;
    const { source, reference, index, source_px, reference_px } = chosen.places;
    let nearest = -1, least = source_px;
    source.forEach(([left, top], number) => {
      const distance = Math.hypot(left - x, top - y);
      if (distance < least) [nearest, least] = [number, distance];
    });
    at("ring").hidden = nearest < 0;
    panels.reference.pointAt(null, {}, 0);
    if (nearest < 0) return;
    circle(at("ring"), source[nearest][0] / answer.width, source[nearest][1] / answer.height, source_px / answer.width * box.width);
    const [left, top] = reference[nearest];
    panels.reference.pointAt(answer.references[index[nearest]], { x: left, y: top }, reference_px);
  }

  at("where").addEventListener("input", slide);
  at("compare").addEventListener("pointermove", point);
  at("compare").addEventListener("pointerdown", point);
  panels.result = { age };
  watch("value", show);
  show();
}

/** Have screen readers say what is said of an edit: gradio's text is none of their status lines by itself. */
export function announce() {
  const said = document.querySelector("#mb-said");
  said?.setAttribute("role", "status");
  said?.setAttribute("aria-live", "polite");
}

/** Images to begin with. */
export function examples(element) {
  for (const button of element.querySelectorAll("[data-example]")) {
    button.addEventListener("click", () => panels.source.attempt(async () => {
      const blobs = await Promise.all(["source", "mask", "reference"].map(
        async (name) => (await ask(`/examples/${button.dataset.example}/${name}`)).blob()));
      await panels.source.show(blobs[0], blobs[1]);
      await panels.reference.show(blobs[2]);
      const keep = document.querySelector("#mb-keep-shape input");
      if (keep.checked !== (button.dataset.keepShape === "1")) keep.click();
    }));
  }
}

/** What is asked for, as text: the server has the images by then. */
export async function request() {
  const { source, reference } = panels;
  announce();
  job = crypto.getRandomValues(new Uint32Array(4)).join("-");
  const asked = { job, source: source.token, reference: reference.token, reference_crop: reference.painter.bounds() };
  asked.other_references = reference.others.map((each) => each.token);
  try {
    if (source.token) asked.mask = await upload(await source.painter.toBlob());
  } catch (error) {
    asked.trouble = error.message;
  }
  return JSON.stringify(asked);
}

/** End the edit that was asked for last. */
export function cancel() { if (job) ask(`/cancel/${job}`, { method: "POST" }).catch((error) => panels.source.say(error.message, true)); }
