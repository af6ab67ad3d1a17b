/**
 * Where in the references each place of the hole looked: for each place a grid of cells over every reference.
 *
 * Twice: the mean attention of all heads, and the heads one by one, each at the cell where it looks most.
 */
const MOST_PX = 512; // longer side of what is drawn

export class Maps {
  /** `bytes` as the server packs them (editing_service.py), and the places that they belong to. */
  constructor(bytes, { grid, boxes, share }) {
    [this.grid, this.boxes, this.share] = [grid, boxes, share];
    this.tables = [0, 1].map((number) => new Uint8Array(bytes, number * bytes.byteLength / 2, bytes.byteLength / 2));
  }

  #cells(place, reference, isHeads) {
    const size = this.grid ** 2;
    return this.tables[Number(isHeads)].subarray((place * this.boxes.length + reference) * size).subarray(0, size);
  }

  /** What a place looked at in a reference, 0..1. Of the mean attention, 1 is the most that it paid to any cell. */
  cells(place, reference, isHeads) { return Float32Array.from(this.#cells(place, reference, isHeads), (each) => each / 255); }

  /** The mean over all places of the hole, 0..1. */
  meanCells(reference, isHeads) {
    const sums = this.boxes.map(() => new Float32Array(this.grid ** 2));
    this.share.forEach((share, place) => {
      const cells = this.boxes.map((_, each) => this.#cells(place, each, isHeads));
      const total = cells.flatMap((each) => [...each]).reduce((sum, each) => sum + each, 0) || 1;
      cells.forEach((each, number) => each.forEach((value, cell) => { sums[number][cell] += value * share / total; }));
    });
    const all = sums.flatMap((each) => [...each]);
    const most = (isHeads ? all.reduce((sum, each) => sum + each, 0) : Math.max(...all)) || 1;
    return sums[reference].map((each) => each / most);
  }

  /** The share of the heads that look where a place looks most, or beside it; each counts as much as it reads. */
  agreement(place) {
    const cells = this.boxes.map((_, reference) => this.cells(place, reference, false));
    const most = cells.map((each) => Math.max(...each));
    const reference = most.indexOf(Math.max(...most)), peak = cells[reference].indexOf(most[reference]);
    const [x, y] = [peak % this.grid, Math.floor(peak / this.grid)];
    return Math.min(1, this.cells(place, reference, true).reduce((sum, each, cell) => (
      Math.abs(cell % this.grid - x) <= 1 && Math.abs(Math.floor(cell / this.grid) - y) <= 1 ? sum + each : sum), 0));
  }
}

/** Draw cells over an image of this size; `box` is where their grid lies on it, in its pixels. */
export function drawCells(canvas, cells, box, { width, height }, isHeads) {
  const scale = MOST_PX / Math.max(width, height), grid = Math.sqrt(cells.length);
  [canvas.width, canvas.height] = [Math.ceil(width * scale), Math.ceil(height * scale)];
  const [left, top, right] = box.map((each) => each * scale);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  if (isHeads) drawDots(context, cells, grid, left, top, (right - left) / grid);
  else drawSmooth(context, cells, grid, left, top, right - left);
}

/** A disc in every cell where heads look, of an area like their share. */
function drawDots(context, cells, grid, left, top, px) {
  [context.fillStyle, context.strokeStyle, context.lineWidth] = ["#e82e6a", "#fff", 1.5];
  cells.forEach((value, cell) => {
    if (!value) return;
    context.beginPath();
    context.arc(left + (cell % grid + 0.5) * px, top + (Math.floor(cell / grid) + 0.5) * px, Math.max(2.5, px * Math.sqrt(value)), 0, 2 * Math.PI);
    context.fill();
    context.stroke();
  });
}

/** A surface through the cells, from dark blue over red to yellow; it is clear where nothing is looked at. */
function drawSmooth(context, cells, grid, left, top, px) {
  const { canvas } = context;
  const small = Object.assign(document.createElement("canvas"), { width: grid, height: grid });
  const image = new ImageData(grid, grid);
  cells.forEach((value, cell) => { image.data[4 * cell + 3] = Math.round(255 * value); });
  small.getContext("2d").putImageData(image, 0, 0);
  context.imageSmoothingQuality = "high";
  context.drawImage(small, left, top, px, px);
  const drawn = context.getImageData(0, 0, canvas.width, canvas.height);
  for (let n = 0; n < drawn.data.length; n += 4) {
    const heat = drawn.data[n + 3] / 255;
    drawn.data.set([Math.min(255, 510 * heat), Math.max(0, 510 * heat - 255), 120 * (1 - heat)], n);
  }
  context.putImageData(drawn, 0, 0);
}
