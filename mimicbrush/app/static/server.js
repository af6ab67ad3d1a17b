/** The way of a page to its server; all but `ask` is the editing page's (mimicbrush/app/page_routes.py). */

/** An answer that is no success; `status` is that of HTTP. */
export class Refusal extends Error {
  constructor(message, status) { super(message); this.status = status; }
}

export async function ask(path, options = {}) {
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    throw new Refusal("the server does not answer; check that it is still running, then try again", 0);
  }
  if (answer.ok) return answer;
  const text = await answer.text();
  let reason = text;
  try { reason = JSON.parse(text).error; } catch { /* not ours: shown as it came */ }
  throw new Refusal(reason || `the server returned status ${answer.status}`, answer.status);
}

export async function upload(blob) {
  const headers = { "Content-Type": "application/octet-stream" };
  return (await (await ask("/upload", { method: "POST", headers, body: blob })).json()).token;
}

/** An image as the server reads it: browsers know neither all formats nor all rotations. */
export async function readShown(token) { return (await ask(`/shown/${token}`)).blob(); }

export async function readFile(token) { return (await ask(`/files/${token}`)).blob(); }

export async function readMaps(token) { return (await ask(`/maps/${token}`)).arrayBuffer(); }

/** Ask for an edit; its name and the seed that was chosen. */
export async function askForEdit(request) {
  const headers = { "Content-Type": "application/json" };
  return (await ask("/edit", { method: "POST", headers, body: JSON.stringify(request) })).json();
}

/** Hear how an edit goes, until it ends; a connection that breaks comes again. Returns its last state. */
export function listen(job, onState) {
  return new Promise((resolve, reject) => {
    const stream = new EventSource(`/edit/${job}`);
    stream.addEventListener("message", ({ data }) => {
      const state = JSON.parse(data);
      onState(state);
      if (!(state.result || state.error || state.cancelled)) return;
      stream.close();
      resolve(state);
    });
    stream.addEventListener("error", () => {
      if (stream.readyState === EventSource.CLOSED) reject(new Refusal("this edit is no longer on the server; press Edit again", 404));
    });
  });
}

export async function cancel(job) { await ask(`/cancel/${job}`, { method: "POST" }); }
