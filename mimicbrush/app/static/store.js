/** What the page keeps in this browser, so that a reload loses nothing: images as they are, and plain values. */
const NAME = "mimicbrush", KEPT = "kept";

function settle(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

async function work(mode, ask) {
  const opening = indexedDB.open(NAME, 1);
  opening.onupgradeneeded = () => opening.result.createObjectStore(KEPT);
  const database = await settle(opening);
  try {
    return await settle(ask(database.transaction(KEPT, mode).objectStore(KEPT)));
  } finally {
    database.close();
  }
}

function holdsBlob(value) {
  return value instanceof Blob || (typeof value === "object" && value !== null && Object.values(value).some(holdsBlob));
}

/** The same value, with the bytes of each Blob in its place: WebKit keeps no Blob in a private window, and Firefox cannot send one that it kept. */
async function pack(value) {
  if (value instanceof Blob) return { bytes: await value.arrayBuffer(), type: value.type, name: value.name };
  if (!holdsBlob(value)) return value;
  const packed = Array.isArray(value) ? [] : {};
  for (const [name, each] of Object.entries(value)) packed[name] = await pack(each);
  return packed;
}

function unpack(value) {
  if (value?.bytes instanceof ArrayBuffer) {
    const { bytes, type, name } = value;
    return name === undefined ? new Blob([bytes], { type }) : new File([bytes], name, { type });
  }
  if (typeof value !== "object" || value === null || value instanceof Blob) return value;
  for (const [name, each] of Object.entries(value)) value[name] = unpack(each);
  return value;
}

async function put(name, value) {
  const packed = await pack(value);
  await work("readwrite", (store) => store.put(packed, name));
}

const pending = new Map(); // name -> timer
let isFailing = false;

/** Whether everything that was to be kept is kept. */
export function isAllKept() { return !pending.size && !isFailing; }

/** Keep a value under a name; `read` makes it when there is time. Null deletes. */
export function keep(name, read, delayMs = 300) {
  clearTimeout(pending.get(name));
  pending.set(name, setTimeout(async () => {
    try {
      const value = await read();
      if (value === null) await work("readwrite", (store) => store.delete(name)); else await put(name, value);
      isFailing = false;
    } catch { isFailing = true; } finally { pending.delete(name); }
  }, delayMs));
}

/** All that is kept, by name; empty where this browser keeps nothing. */
export async function readAll() {
  try {
    const [names, values] = [await work("readonly", (store) => store.getAllKeys()), await work("readonly", (store) => store.getAll())];
    return new Map(names.map((name, number) => [name, unpack(values[number])]));
  } catch {
    isFailing = true;
    return new Map();
  }
}

export async function deleteAll() {
  for (const timer of pending.values()) clearTimeout(timer);
  pending.clear();
  await work("readwrite", (store) => store.clear());
}
