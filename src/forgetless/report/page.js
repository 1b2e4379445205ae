"use strict";
(() => {
  const { figures, hidden, paths } = JSON.parse(document.getElementById("data").textContent);
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const state = { axis: "near", hidden: new Set(hidden), touched: false };
  const isHidden = (name, method) => state.hidden.has(method) && (state.touched || name !== "equal"); // bars don't tangle: at first they show every method
  for (const button of all("[data-choose][aria-pressed=true]")) state[button.dataset.choose] = button.dataset.value;

  // --- theme: the system's, until someone presses the button
  const system = matchMedia("(prefers-color-scheme: dark)");
  let printing = false;
  const dark = () => !printing && (document.documentElement.dataset.theme ? document.documentElement.dataset.theme === "dark" : system.matches);
  const colour = (pair) => (typeof pair === "string" && pair.includes("|") ? pair.split("|")[dark() ? 1 : 0] : pair);
  const INK = "#16191d|#e8ebee", SOFT = "#56606a|#a3afba", LINE = "#e3e6e9|#2d3338", GROUND = "#ffffff|#14171a";
  const HEAT = ["#e6edf4|#1f262d", "#5a9bd0|#2a6ea8", "#06335c|#cfe8ff"]; // from what matters little to what matters most

  // --- figures
  const KEYS = { frontier: ["domain", "text"], equal: ["domain", "text", "share"], trade: [], control: [], curves: ["domain"], movement: ["domain"], heat: ["importance"] };
  const matches = (view, keys) => keys.every((key) => state[key] === undefined || view[key] === state[key]);
  const view = (name) => figures[name].find((one) => matches(one, KEYS[name]));

  const coloured = (value) => {
    if (Array.isArray(value)) return value;
    if (value && typeof value === "object") return Object.fromEntries(Object.entries(value).map(([key, inner]) => [key, coloured(inner)]));
    return colour(value);
  };
  const drawn = (trace) => ({ ...trace, ...Object.fromEntries(["marker", "line", "error_x", "error_y"].filter((key) => trace[key]).map((key) => [key, coloured(trace[key])])) });

  function layoutOf(name, figure) { // with what was chosen: the scale of the frontier, the bars that are shown
    const layout = structuredClone(figure.layout);
    layout.annotations = (layout.annotations || []).filter((note) => !isHidden(name, note.name));
    if (name === "frontier" && state.axis === "near") layout.xaxis.range = figure.near;
    if (name === "frontier" && state.axis === "log") layout.xaxis = { ...layout.xaxis, type: "log", rangemode: "normal" };
    if (figure.order) layout.yaxis.categoryarray = figure.order.filter(([method]) => !isHidden(name, method)).map(([, label]) => label);
    return layout;
  }

  function draw(name) {
    const target = document.querySelector(`[data-figure="${name}"]`), found = view(name), empty = document.querySelector(`[data-empty="${name}"]`);
    if (!target) return;
    const traces = found ? found.figure.traces.filter((trace) => !isHidden(name, trace.meta)) : [];
    target.hidden = !traces.length;
    empty.hidden = Boolean(traces.length);
    if (!traces.length) return;
    const figure = found.figure, layout = layoutOf(name, figure), width = printing ? 680 : Math.max(240, target.clientWidth);
    const height = figure.height + (figure.per || 0) * (figure.order ? layout.yaxis.categoryarray.length : 0);
    target.chart = { layout, traces }; // for whoever looks into the page
    Charts.draw(target, { name, layout, width, height, paths, loud: name === "equal", narrow: width < 560, traces: traces.map(drawn), family: getComputedStyle(document.body).fontFamily,
      colours: { ink: colour(INK), soft: colour(SOFT), line: colour(LINE), ground: colour(GROUND), heat: HEAT.map(colour) } });
  }
  const drawAll = () => Object.keys(figures).forEach(draw);

  // --- what is chosen
  function show() {
    for (const button of all("[data-choose]")) button.setAttribute("aria-pressed", String(state[button.dataset.choose] === button.dataset.value));
    for (const part of all(".view")) part.hidden = !matches(part.dataset, ["domain", "text"]);
    for (const part of all("[data-importance]")) part.hidden = part.dataset.importance !== state.importance && all("[data-choose=importance]").length > 0;
    for (const chip of all(".chip")) chip.setAttribute("aria-pressed", String(!state.hidden.has(chip.dataset.method)));
    for (const note of all("[data-axis-note]")) note.hidden = state.axis !== note.dataset.axisNote;
    for (const note of all("[data-first-note]")) note.hidden = state.touched;
    const button = document.getElementById("theme");
    button.textContent = dark() ? "Light" : "Dark";
    button.setAttribute("aria-label", dark() ? "Use the light theme" : "Use the dark theme");
    drawAll();
  }
  document.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    if (button.dataset.choose) state[button.dataset.choose] = button.dataset.value;
    else if (button.dataset.method !== undefined) toggle(button.dataset.method);
    else if (button.dataset.every) choose(button.dataset.every === "hide" ? all(".chip").map((chip) => chip.dataset.method) : []);
    else if (button.id === "theme") document.documentElement.dataset.theme = dark() ? "light" : "dark";
    else if (button.classList.contains("sort")) return sort(button.closest("th"));
    else if (button.classList.contains("copy")) return copy(button.closest(".table"));
    else return;
    show();
  });
  const choose = (hiding) => { state.touched = true; state.hidden = new Set(hiding); };
  const toggle = (method) => choose(state.hidden.has(method) ? [...state.hidden].filter((other) => other !== method) : [...state.hidden, method]);

  // --- tables
  const sortable = (cell) => (cell.dataset.value === undefined ? null : Number(cell.dataset.value));
  function sort(head) {
    const table = head.closest("table"), index = head.cellIndex, body = table.tBodies[0], numeric = head.classList.contains("number");
    const direction = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    for (const other of table.tHead.rows[0].cells) other.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", direction === 1 ? "ascending" : "descending");
    const compare = (a, b) => {
      if (!numeric) return direction * a.textContent.trim().localeCompare(b.textContent.trim(), undefined, { numeric: true });
      const [x, y] = [sortable(a), sortable(b)];
      return x === null || y === null ? (x === null) - (y === null) : direction * (x - y); // what was not measured stays at the end
    };
    body.append(...[...body.rows].sort((a, b) => compare(a.cells[index], b.cells[index])));
  }
  const quoted = (text) => {
    const safe = /^[=+\-@\t]/.test(text) ? `'${text}` : text; // spreadsheets would run it as a formula
    return /[",\n\r]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
  };
  function csv(table) {
    const heads = [...table.tHead.rows[0].cells], names = heads.flatMap((head) => {
      const name = quoted(head.textContent.trim());
      return "errors" in head.dataset ? [name, quoted(`${head.textContent.trim()}, standard error`)] : [name];
    });
    const text = (cell) => (cell.querySelector(".missing") ? "" : quoted(cell.textContent.trim()));
    const rows = [...table.tBodies[0].rows].map((row) => [...row.cells].flatMap((cell, i) => {
      const value = cell.dataset.value ?? text(cell);
      return "errors" in heads[i].dataset ? [value, cell.dataset.error ?? ""] : [value];
    }));
    return [names, ...rows].map((row) => row.join(",")).join("\n") + "\n";
  }
  async function copy(part) {
    const text = csv(part.querySelector("table")), said = part.querySelector(".copied");
    try {
      await navigator.clipboard.writeText(text);
      said.textContent = "copied";
    } catch {
      said.textContent = legacyCopy(text) ? "copied" : "could not copy: the browser does not allow it";
    }
    setTimeout(() => { said.textContent = ""; }, 4000);
  }
  function legacyCopy(text) { // for browsers that keep the clipboard from files
    const area = Object.assign(document.createElement("textarea"), { value: text });
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  }

  // --- the page around it
  let width = innerWidth;
  addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; drawAll(); } });
  addEventListener("beforeprint", () => { printing = true; for (const one of all("details")) one.open = true; drawAll(); });
  addEventListener("afterprint", () => { printing = false; drawAll(); });
  system.addEventListener("change", show);
  show();
  document.documentElement.dataset.ready = "yes";
})();
