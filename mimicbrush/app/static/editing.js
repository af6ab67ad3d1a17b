/** The editing page: what is given, what is asked for, and what comes of it. */
import { ReferencePanel, SourcePanel } from "./panels.js";
import { ResultPanel } from "./results.js";
import { ask, askForEdit, cancel, listen, readFile, readMaps } from "./server.js";
import { deleteAll, isAllKept, keep, readAll } from "./store.js";

const at = (id) => document.getElementById(id);
const options = await (await ask("/options")).json();
const controls = Object.fromEntries([...document.querySelectorAll("#settings [name]")].map((each) => [each.name, each]));
let isReady = false; // nothing is kept before what was kept is there
let job = null; // the edit that is asked for

const context = { options, onChange: () => { if (isReady) { results.refresh(fingerprint()); placeExamples(); } } };
const source = new SourcePanel(at("source"), context);
const reference = new ReferencePanel(at("reference"), context);
const results = new ResultPanel(at("result"), { reference, line: at("line"), use: useAsSource });

function fingerprint() { return JSON.stringify([source.fingerprint, reference.fingerprint]); }

function say(text, isBad = false) {
  at("said").textContent = text;
  at("said").classList.toggle("bad", isBad);
}

// ---- settings

function chooseSettings(values) {
  for (const [name, value] of Object.entries(values)) {
    if (controls[name]?.type === "checkbox") controls[name].checked = value; else if (controls[name]) controls[name].value = value;
  }
  showSettings();
}

function readSettings() {
  return Object.fromEntries(Object.entries(controls).map(([name, each]) => [name, each.type === "checkbox" ? each.checked && !each.disabled : each.value]));
}

function showSettings() {
  for (const each of Object.values(controls)) {
    const output = each.parentElement.querySelector("output");
    if (output) output.textContent = each.value;
  }
  const { count, steps, guidance, seed, keep_shape, around, auto_zoom } = readSettings();
  at("chosen").textContent = [
    `${count} ${count === "1" ? "result" : "results"}`, `${steps} ${steps === "1" ? "step" : "steps"}`, `guidance ${guidance}`, seed === "" ? "a new seed each time" : `seed ${seed}`,
    keep_shape && "keep the shape", around && "area around the mask", auto_zoom && "auto-zoom",
  ].filter(Boolean).join(" · ");
}

// ---- the edit

/** What is asked for; the server has the images by then. */
async function makeRequest() {
  const { count, steps, guidance, seed, keep_shape, around, auto_zoom } = readSettings();
  return {
    source: await source.given?.haveToken() ?? "", mask: await source.askMask(), references: await reference.asked(),
    steps: Number(steps), guidance: Number(guidance), seed: seed === "" ? null : Number(seed), count: Number(count),
    keep_shape, crop: around ? "auto" : "full", auto_zoom,
  };
}

async function edit() {
  if (job) return;
  job = { name: null, isCancelled: false };
  say("");
  showProgress({ text: "Sending the images …" });
  at("result").querySelector("[data-role=stage]").scrollIntoView({ block: "nearest" });
  const asked = {
    fingerprint: fingerprint(), before: source.given?.shown, references: reference.all.map(({ id }) => id), isSeedChosen: controls.seed.value === "",
  };
  try {
    let answer;
    try {
      answer = await askForEdit(await makeRequest());
    } catch (error) {
      if (error.status !== 410) throw error; // the server forgot an image; it is still here
      source.forgetTokens();
      reference.forgetTokens();
      answer = await askForEdit(await makeRequest());
    }
    job.name = answer.job;
    keep("job", () => ({ name: answer.job, seed: answer.seed, asked }), 0);
    if (job.isCancelled) await cancel(job.name);
    await follow(answer.job, answer.seed, asked);
  } catch (error) {
    say(`Could not edit: ${error.message}`, true);
  } finally {
    end();
  }
}

/** Wait for an edit, and take what comes of it. */
async function follow(name, seed, asked) {
  const last = await listen(name, showProgress);
  if (last.error) throw new Error(last.error);
  if (last.cancelled) { say("Cancelled."); return; }
  const { width, height } = last.result;
  const when = Date.now();
  const entries = await Promise.all(last.result.results.map(async ({ token, ...each }) => (
    { ...each, ...asked, width, height, when, blob: await readFile(token), maps: each.places?.maps ? await readMaps(each.places.maps) : null })));
  await results.add(entries);
  const hint = entries.some((each) => each.places) ? " Point at the repainted area, or tap it, to see where in the reference it comes from." : "";
  say(`Done.${asked.isSeedChosen ? ` Seed ${seed} was used.` : ""}${hint}`);
}

function end() {
  job = null;
  keep("job", () => null, 0);
  at("bar").hidden = true;
  at("left").textContent = "";
  [at("go").disabled, at("stop").disabled] = [false, true];
  results.preview(null);
  results.refresh(fingerprint());
}

function showProgress({ text, waiting, done, of, left_s, preview }) {
  [at("go").disabled, at("stop").disabled] = [true, false];
  if (preview) results.preview(preview);
  at("bar").hidden = false;
  if (of) at("bar").value = done / of; else at("bar").removeAttribute("value");
  if (waiting > 0) text = `${waiting === 1 ? "One edit is" : `${waiting} edits are`} ahead of yours`;
  if (waiting === 0) text = "Your edit is next";
  if (of) text = done ? `Step ${done} of ${of}${left_s === undefined ? "" : `, ${left(left_s)} left`}` : "Reading the images …";
  if (text) at("left").textContent = text;
}

function left(seconds) {
  return seconds < 90 ? `about ${Math.max(1, Math.round(seconds))} s` : `about ${Math.round(seconds / 60)} minutes`;
}

async function stop() {
  if (!job) return;
  job.isCancelled = true; // it may have no name yet
  if (job.name) try { await cancel(job.name); } catch (error) { say(error.message, true); }
}

async function useAsSource(entry) {
  await source.attempt(async () => {
    await source.take([new File([entry.blob], `edited_seed${entry.seed}.png`, { type: "image/png" })]);
    at("source").scrollIntoView({ block: "start" });
  });
}

// ---- examples

/** Above what is empty, and below the images once there are some. */
function placeExamples() {
  const panels = document.querySelector(".panels"), isFresh = !source.given && !reference.all.length && !results.chosen;
  if (isFresh === Boolean(at("examples").compareDocumentPosition(panels) & Node.DOCUMENT_POSITION_FOLLOWING)) return;
  if (isFresh) panels.before(at("examples")); else panels.after(at("examples"));
}

options.examples.forEach(({ title, keep_shape }, number) => {
  const button = document.createElement("button");
  button.dataset.example = number;
  button.append(Object.assign(new Image(), { src: `/examples/${number}/source`, alt: "" }), Object.assign(document.createElement("span"), { textContent: title }));
  button.addEventListener("click", () => source.attempt(async () => {
    const [image, mask, other] = await Promise.all(["source", "mask", "reference"].map(
      async (name) => new File([await (await ask(`/examples/${number}/${name}`)).blob()], `example_${name}.png`)));
    await source.take([image], mask);
    at("source").scrollIntoView({ block: "start" });
    while (reference.all.length > 1) await reference.remove();
    await reference.take([other]);
    chooseSettings({ keep_shape });
    keep("settings", readSettings);
    source.say("Now press Edit.");
    at("go").focus({ preventScroll: true });
  }));
  document.querySelector(".examples").append(button);
});

// ---- everything else that happens on the page

function panelOf(target) {
  if (target.closest?.("#source")) return source;
  if (target.closest?.("#reference")) return reference;
  return source.given && !reference.all.length ? reference : source;
}

at("go").addEventListener("click", edit);
at("stop").addEventListener("click", stop);
at("settings").addEventListener("input", () => { showSettings(); keep("settings", readSettings); });
at("start-over").addEventListener("click", async () => {
  if (!confirm("Delete all images, masks and results from this browser?")) return;
  await stop();
  isReady = false;
  await deleteAll();
  removeEventListener("beforeunload", warn);
  location.reload();
});
addEventListener("paste", (event) => {
  const files = [...event.clipboardData?.files ?? []].filter((each) => each.type.startsWith("image/"));
  if (!files.length) return;
  event.preventDefault();
  const panel = panelOf(document.querySelector("#source:hover, #reference:hover") ?? event.target);
  panel.attempt(() => panel.take(files));
});
addEventListener("dragover", (event) => event.preventDefault()); // a file beside the panels does not replace the page
addEventListener("drop", (event) => {
  if (event.defaultPrevented) return;
  event.preventDefault();
  const [files, panel] = [[...event.dataTransfer.files], panelOf(event.target)];
  if (files.length) panel.attempt(() => panel.take(files));
});
addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); edit(); }
});
function warn(event) { if (job || !isAllKept()) event.preventDefault(); }
addEventListener("beforeunload", warn);

// ---- what was here before

[at("go").disabled, at("stop").disabled] = [false, true]; // Firefox keeps over a reload what they were
at("about").textContent = options.about;
at("examples").hidden = !options.examples.length;
for (const [name, most] of [["count", options.max_results], ["steps", options.max_steps]]) controls[name].max = most;
for (const [name, isPossible] of [["auto_zoom", options.can_zoom], ["keep_shape", options.can_keep_shape]]) {
  controls[name].disabled = !isPossible;
  controls[name].closest("label").hidden = !isPossible;
}
chooseSettings({ steps: options.steps, guidance: options.guidance });
const kept = await readAll();
if (kept.has("settings")) chooseSettings(kept.get("settings"));
try {
  if (kept.get("source")) await source.restore(kept.get("source"));
  if (kept.get("references")) await reference.restore(kept.get("references"));
  await results.restore([...kept.entries()].filter(([name]) => name.startsWith("result ")).map(([, entry]) => entry));
} catch (error) {
  say(`Some of the stored images cannot be shown: ${error.message}`, true);
}
isReady = true;
results.refresh(fingerprint());
placeExamples();
document.body.dataset.state = "ready";
if (kept.get("job")) {
  const { name, seed, asked } = kept.get("job");
  job = { name, isCancelled: false };
  showProgress({ text: "Reconnecting to the edit …" });
  try { await follow(name, seed, asked); } catch (error) { say(`Could not edit: ${error.message}`, true); } finally { end(); }
}
