/** The page around the painter: which image, which tool, and the way to the server (mimicbrush/app/mask_painter.py). */
import { MaskPainter } from "./painter.js";
import { ask } from "./server.js";
import { bindTools } from "./toolbar.js";

const at = (id) => document.getElementById(id);
const painter = new MaskPainter(at("stage"), { onChange: () => refresh() });
const refreshTools = bindTools(painter, at);
let current = null; // name of the image that is shown
let isBusy = false;
let maxUploadBytes = Infinity;

function say(text, isBad = false) {
  at("status").textContent = text;
  at("status").classList.toggle("bad", isBad);
}

function refresh() {
  refreshTools();
  at("save").disabled = current === null || isBusy || painter.isEmpty;
}

async function attempt(work) {
  if (isBusy) return;
  isBusy = true;
  at("upload").disabled = true;  // a file that is chosen meanwhile would be lost without a word
  try { await work(); } catch (error) { say(error.message, true); } finally { isBusy = false; at("upload").disabled = false; refresh(); }
}

async function list() {
  const { pictures, max_upload_bytes } = await (await ask("api/pictures")).json();
  maxUploadBytes = max_upload_bytes;
  at("images").replaceChildren(...pictures.map(({ name, masked }) => {
    const item = document.createElement("li");
    const button = item.appendChild(document.createElement("button"));
    button.textContent = name;
    button.classList.toggle("masked", masked);
    button.setAttribute("aria-current", name === current);
    button.addEventListener("click", () => attempt(() => open(name, masked)));
    return item;
  }));
}

async function open(name, masked) {
  if (painter.isUnsaved && !confirm("This mask is not saved. Discard it?")) return;
  const query = new URLSearchParams({ name });
  say(`Opening ${name} …`);
  const image = await (await ask(`api/picture?${query}`)).blob();
  const mask = masked ? await (await ask(`api/mask?${query}`)).blob() : null;
  await painter.load(image, mask);
  current = name;
  painter.sizePx = Math.max(painter.width, painter.height) / 16;
  await list();
  say(`${name}: ${painter.width} x ${painter.height} px${masked ? ", with its saved mask" : ""}`);
}

async function save() {
  const [name, revision] = [current, painter.revision];
  const body = await painter.toBlob();
  const headers = { "Content-Type": "image/png" };
  const answer = await (await ask(`api/mask?${new URLSearchParams({ name })}`, { method: "POST", headers, body })).json();
  painter.markSaved(revision);
  await list();
  say(`Saved as ${answer.saved}`);
}

async function upload(file) {
  if (file.size > maxUploadBytes) {
    const [given, limit] = [file.size, maxUploadBytes].map((bytes) => (bytes / 2 ** 20).toFixed());
    throw new Error(`${file.name} is too large: ${given} MiB; the limit is ${limit} MiB`);
  }
  say(`Uploading ${file.name} …`);
  const headers = { "Content-Type": "application/octet-stream" };
  const query = new URLSearchParams({ name: file.name });
  const answer = await (await ask(`api/upload?${query}`, { method: "POST", headers, body: file })).json();
  await list();
  await open(answer.name, answer.masked);
}

at("save").addEventListener("click", () => attempt(save));
at("upload").addEventListener("change", () => attempt(async () => {
  const file = at("upload").files[0];
  try { if (file) await upload(file); } finally { at("upload").value = ""; }
}));
addEventListener("keydown", (event) => {
  if (!(event.ctrlKey || event.metaKey) || event.key.toLowerCase() !== "s") return;
  event.preventDefault();
  at("save").click();
});
addEventListener("beforeunload", (event) => { if (painter.isUnsaved) event.preventDefault(); });
attempt(list);
