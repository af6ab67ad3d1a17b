/** What came of the edits: the result that is shown beside its source, where it comes from, and the history. */
import { Maps, drawCells } from "./maps.js";
import { makeId, placeRing, thumb } from "./panels.js";
import { keep } from "./store.js";
import { View } from "./view.js";

const MOST_KEPT = 24;

export class ResultPanel {
  entries = []; // newest first; each is kept under a name of its own
  chosen = null;
  #shown = undefined; // place of the hole whose map was drawn last; undefined: none

  /** `reference` is the panel that lines lead to; `use` takes an entry as the next source. */
  constructor(element, { reference, line, use }) {
    [this.element, this.reference, this.line] = [element, reference, line];
    this.at = (role) => element.querySelector(`[data-role=${role}]`);
    this.view = new View(this.at("stage"), { onChange: () => this.#unpoint() });
    const add = (name, className) => Object.assign(this.view.content.appendChild(document.createElement(name)), { className });
    this.before = Object.assign(add("img", ""), { alt: "the source", draggable: false, hidden: true });
    this.after = Object.assign(add("img", ""), { alt: "the result", draggable: false, hidden: true });
    this.before.dataset.role = "before";
    this.after.dataset.role = "after";
    [this.divider, this.ring] = [add("div", "divider"), add("div", "ring")];
    this.divider.hidden = this.ring.hidden = true;
    this.at("where").addEventListener("input", () => this.#slide());
    const stage = this.at("stage");
    for (const kind of ["pointermove", "pointerdown"]) stage.addEventListener(kind, (event) => this.#point(this.view.toImage(event)));
    stage.addEventListener("pointerleave", () => this.#unpoint());
    stage.addEventListener("keydown", (event) => this.#key(event));
    addEventListener("scroll", () => this.#unpoint(), { passive: true });
    this.at("zoom-in").addEventListener("click", () => this.view.zoom(1.5));
    this.at("zoom-out").addEventListener("click", () => this.view.zoom(1 / 1.5));
    this.at("fit").addEventListener("click", () => this.view.fit());
    this.at("use").addEventListener("click", () => use(this.chosen));
    this.at("forget").addEventListener("click", () => this.#forget(this.chosen));
    for (const role of ["heat", "heads"]) {
      this.at(role).addEventListener("click", () => {
        this.at(role).setAttribute("aria-pressed", !this.#isPressed(role));
        this.refresh();
      });
    }
  }

  #isPressed(role) { return this.at(role).getAttribute("aria-pressed") === "true"; }

  say(text, isBad = false) {
    this.at("said").textContent = text;
    this.at("said").classList.toggle("bad", isBad);
  }

  /** What the edit looks like so far; null: nothing. */
  preview(address) {
    this.at("preview").hidden = !address;
    if (address) this.at("preview").src = address;
    this.at("empty").hidden = Boolean(address || this.chosen);
  }

  /** Add results of one edit, the first of which is shown. */
  async add(results) {
    const entries = results.map((each, number) => ({ ...each, name: `result ${String(Date.now()).padStart(15, "0")} ${number} ${makeId()}` }));
    for (const entry of entries) keep(entry.name, () => entry, 0);
    this.entries.unshift(...entries);
    for (const old of this.entries.splice(MOST_KEPT)) keep(old.name, () => null, 0);
    await this.choose(entries[0]);
  }

  async restore(entries) {
    this.entries = entries.sort((one, other) => other.when - one.when || one.seed - other.seed);
    if (this.entries.length) await this.choose(this.entries[0]);
  }

  async choose(entry) {
    this.chosen = entry;
    this.number = null;
    this.maps = entry.maps ? new Maps(entry.maps, entry.places) : null;
    for (const [image, blob] of [[this.before, entry.before], [this.after, entry.blob]]) {
      if (image.src) URL.revokeObjectURL(image.src);
      image.src = URL.createObjectURL(blob);
      image.hidden = false;
    }
    if (this.at("download").href) URL.revokeObjectURL(this.at("download").href);
    Object.assign(this.at("download"), { href: URL.createObjectURL(entry.blob), download: `edited_seed${entry.seed}.png` });
    this.view.setSize(entry.width, entry.height);
    for (const role of ["slide", "tools", "forget"]) this.at(role).hidden = false;
    this.element.classList.remove("is-empty");
    this.at("empty").hidden = true;
    this.at("where").value = 0;
    this.#slide();
    this.refresh();
    await Promise.all([this.before.decode(), this.after.decode()]);
  }

  /** Show the history again, and whether what is shown came of what is given now. */
  refresh(fingerprint = this.fingerprint) {
    this.fingerprint = fingerprint;
    this.at("history").replaceChildren(...this.entries.map((each) => thumb(each.blob, {
      name: `Result with seed ${each.seed}`, isPressed: each === this.chosen, act: () => this.choose(each),
    })));
    if (!this.chosen) { this.#unpoint(); return; }
    const isOld = this.chosen.fingerprint !== fingerprint;
    this.element.classList.toggle("is-old", isOld);
    this.say(isOld ? "This result was made from other images or with another mask." : this.chosen.zoomed ? "Auto-zoom used only this part of the reference: "
      + this.chosen.zoomed.join(", ") + " px." : "");
    for (const role of ["heat", "heads"]) this.at(role).disabled = !this.maps;
    this.#shown = undefined;
    this.#unpoint();
  }

  /** The reference that a place comes from. */
  #idOf(number) { return this.chosen.references[this.chosen.places.of[number]]; }

  /** Show over the reference where a place of the hole looked, or (null, where it is asked for) the whole hole. */
  #showMap(place = null) {
    const reference = this.chosen?.references.indexOf(this.reference.current?.id) ?? -1;
    const { heat, painter } = this.reference, isHeads = this.#isPressed("heads");
    heat.hidden = !this.maps || reference < 0 || (place === null && !this.#isPressed("heat"));
    if (heat.hidden || this.#shown === place) return;
    this.#shown = place;
    const cells = place === null ? this.maps.meanCells(reference, isHeads) : this.maps.cells(place, reference, isHeads);
    drawCells(heat, cells, this.maps.boxes[reference], painter, isHeads);
    heat.style.opacity = place === null || isHeads ? 0.85 : 0.45 + 0.45 * this.maps.agreement(place);
  }

  #isShown(number) { return this.#idOf(number) === this.reference.current?.id; }

  #forget(entry) {
    keep(entry.name, () => null, 0);
    this.entries = this.entries.filter((each) => each !== entry);
    if (this.entries.length) { this.choose(this.entries[0]); return; }
    this.chosen = this.maps = null;
    this.before.hidden = this.after.hidden = this.divider.hidden = true;
    for (const role of ["slide", "tools", "forget"]) this.at(role).hidden = true;
    this.at("empty").hidden = false;
    this.element.classList.add("is-empty");
    this.element.classList.remove("is-old");
    this.say("");
    this.refresh();
  }

  /** To the left of the line lies what was before, to the right of it what is after; only what is seen is named. */
  #slide() {
    const where = Number(this.at("where").value);
    this.after.style.clipPath = `inset(0 0 0 ${where}%)`;
    this.divider.style.left = `${where}%`;
    this.divider.hidden = where === 0 || where === 100;
    this.at("left-side").classList.toggle("unseen", where === 0);
    this.at("right-side").classList.toggle("unseen", where === 100);
  }

  // ---- where in the reference a place of the hole comes from

  #point({ x, y }) {
    const places = this.chosen?.places;
    if (!places) return;
    let [nearest, least] = [-1, places.source_px];
    places.source.forEach(([left, top], number) => {
      const distance = Math.hypot(left - x, top - y);
      if (distance < least) [nearest, least] = [number, distance];
    });
    if (nearest < 0) { this.#unpoint(); return; }
    this.#show(nearest);
  }

  #show(number) {
    const { source, reference, source_px, reference_px } = this.chosen.places;
    const [from, to] = [source[number], reference[number]].map(([x, y]) => ({ x, y }));
    this.number = number;
    this.#showMap(number);
    this.ring.hidden = false;
    placeRing(this.ring, from, Math.max(source_px, 10 / this.view.scale));
    this.reference.ring.hidden = true;
    const isShown = this.#isShown(number);
    if (isShown) this.reference.point(to, reference_px);
    const target = isShown ? !this.reference.ring.hidden && this.reference.ring : this.reference.thumbOf(this.#idOf(number));
    this.line.toggleAttribute("hidden", !target);
    if (!target) return;
    const [start, end] = [this.ring, target].map((each) => each.getBoundingClientRect());
    for (const each of this.line.children) {
      for (const [name, box] of [["1", start], ["2", end]]) {
        each.setAttribute(`x${name}`, box.x + box.width / 2);
        each.setAttribute(`y${name}`, box.y + box.height / 2);
      }
    }
  }

  #unpoint() {
    if (!this.ring) return;
    this.ring.hidden = this.reference.ring.hidden = true;
    this.line.toggleAttribute("hidden", true);
    this.#showMap();
  }

  #key(event) {
    const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    const places = this.chosen?.places;
    if (!(event.key in steps) || !places?.source.length) return;
    event.preventDefault();
    const [dx, dy] = steps[event.key].map((step) => step * places.source_px);
    const [x, y] = places.source[this.number ?? 0] ?? places.source[0];
    let [nearest, least] = [0, Infinity];
    places.source.forEach(([left, top], number) => {
      const distance = Math.hypot(left - x - dx, top - y - dy);
      if (distance < least) [nearest, least] = [number, distance];
    });
    this.#show(nearest);
    const [from, to] = [places.source[nearest], places.reference[nearest]].map((place) => place.map(Math.round).join(", "));
    const which = this.chosen.references.length > 1 ? `reference ${places.of[nearest] + 1}` : "the reference";
    const heads = this.maps ? ` ${Math.round(100 * this.maps.agreement(nearest))} % of the attention heads agree.` : "";
    this.say(`The place at ${from} comes from ${to} in ${which}.${heads}`);
  }
}
