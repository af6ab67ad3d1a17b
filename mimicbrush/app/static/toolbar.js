/** The tools of a painter: the buttons that a page has for them, and the keys. */
const KEYS = { b: "brush", r: "box", e: "erase", h: "hand", i: "invert", "+": "zoom-in", "=": "zoom-in", "-": "zoom-out", 0: "fit" };

/** `at` finds the control of a name. Returns what shows the painter's state on the controls. */
export function bindTools(painter, at) {
  function choose(tool) {
    painter.view.isHand = tool === "hand";
    if (tool !== "hand") painter.tool = tool;
    painter.stage.classList.toggle("is-hand", painter.view.isHand);
    refresh();
  }

  const actions = {
    brush: () => choose("brush"),
    box: () => choose("box"),
    hand: () => choose(painter.view.isHand ? painter.tool : "hand"),
    erase: () => { painter.erasing = !painter.erasing; refresh(); },
    undo: () => painter.undo(),
    redo: () => painter.redo(),
    invert: () => painter.invert(),
    clear: () => painter.clear(),
    "zoom-in": () => painter.view.zoom(1.5),
    "zoom-out": () => painter.view.zoom(1 / 1.5),
    fit: () => painter.view.fit(),
  };
  for (const [name, act] of Object.entries(actions)) at(name).addEventListener("click", act);
  at("size").addEventListener("input", () => { painter.sizePx = Number(at("size").value); });

  function refresh() {
    for (const tool of ["brush", "box"]) at(tool).setAttribute("aria-pressed", !painter.view.isHand && painter.tool === tool);
    at("hand").setAttribute("aria-pressed", painter.view.isHand);
    at("erase").setAttribute("aria-pressed", painter.erasing);
    at("undo").disabled = !painter.canUndo;
    at("redo").disabled = !painter.canRedo;
    at("size").max = painter.maxSizePx;
    at("size").value = painter.sizePx;
    at("size-shown").textContent = `${painter.sizePx} px`;
  }

  addEventListener("keydown", (event) => {
    if (event.altKey || event.target.closest("input:is([type=number], [type=text], [type=password]), textarea, select")) return;
    const key = event.key.toLowerCase();
    if (event.ctrlKey || event.metaKey) {
      if (key !== "z" && key !== "y") return;
      event.preventDefault();
      if (key === "y" || event.shiftKey) painter.redo(); else painter.undo();
    } else if (key === "[" || key === "]") {
      painter.sizePx = key === "[" ? painter.sizePx * 0.8 : painter.sizePx * 1.25 + 1;
    } else if (Object.hasOwn(KEYS, key)) {
      actions[KEYS[key]]();
    }
  });
  refresh();
  return refresh;
}
