"use strict";
(() => {
  const Plotly = globalThis.Plotly;
  const { figures, hidden } = JSON.parse(document.getElementById("data").textContent);
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const state = { axis: "near", hidden: new Set(hidden), touched: false };
  const isHidden = (name, method) => state.hidden.has(method) && (state.touched || name !== "equal"); // bars don't tangle: at first they show every method
  for (const button of all("[data-choose][aria-pressed=true]")) state[button.dataset.choose] = button.dataset.value;

  // --- theme: the system's, until someone presses the button
  const system = matchMedia("(prefers-color-scheme: dark)");
  let printing = false;
  const dark = () => !printing && (document.documentElement.dataset.theme ? document.documentElement.dataset.theme === "dark" : system.matches);
  const colour = (pair) => (typeof pair === "string" && pair.includes("|") ? pair.split("|")[dark() ? 1 : 0] : pair);
  const INK = "#16191d|#e8ebee", SOFT = "#56606a|#a3afba", LINE = "#e3e6e9|#2d3338", GROUND = "#ffffff|#14171a", RAISED = "#ffffff|#23282d";

  // --- figures
  const KEYS = { frontier: ["domain", "text"], equal: ["domain", "text", "share"], trade: [], control: [], curves: ["domain"], movement: ["domain"], heat: ["importance"] };
  const matches = (view, keys) => keys.every((key) => state[key] === undefined || view[key] === state[key]);
  const view = (name) => figures[name].find((one) => matches(one, KEYS[name]));

  const coloured = (value) => {
    if (Array.isArray(value)) return value;
    if (value && typeof value === "object") return Object.fromEntries(Object.entries(value).map(([key, inner]) => [key, coloured(inner)]));
    return colour(value);
  };
  const drawn = (name, trace) => ({
    ...trace, visible: !isHidden(name, trace.meta),
    ...(trace.marker && { marker: coloured(trace.marker) }), ...(trace.line && { line: coloured(trace.line) }),
    ...(trace.error_x && { error_x: { color: colour(INK), ...coloured(trace.error_x) } }), ...(trace.error_y && { error_y: coloured(trace.error_y) }),
    ...(trace.colorbar && { colorbar: { ...trace.colorbar, tickfont: { color: colour(SOFT) }, title: { ...trace.colorbar.title, font: { color: colour(SOFT) } } } }),
  });

  function layoutOf(name, figure, width) {
    const narrow = width < 560, layout = structuredClone(figure.layout);
    for (const key of Object.keys(layout).filter((one) => /^[xy]axis/.test(one))) {
      layout[key] = { gridcolor: colour(LINE), zerolinecolor: colour(LINE), linecolor: colour(LINE), automargin: true, tickfont: { color: colour(SOFT) }, ...layout[key] };
      if (layout[key].title) layout[key].title = { ...layout[key].title, font: { color: colour(SOFT), size: narrow ? 11 : 13 }, standoff: 10 };
      if (layout[key].type === "log") Object.assign(layout[key], { exponentformat: "power", dtick: "D2" });
    }
    for (const shape of layout.shapes || []) shape.line.color = colour(SOFT);
    layout.annotations = (layout.annotations || []).filter((note) => !isHidden(name, note.name))
      .map((note) => ({ ...note, font: { size: narrow ? 10 : 12, color: colour(name === "equal" ? INK : SOFT) } }));
    if (name === "frontier" && state.axis === "near") layout.xaxis.range = figure.near;
    if (name === "frontier" && state.axis === "log") layout.xaxis = { ...layout.xaxis, type: "log", rangemode: "normal", exponentformat: "none" };
    if (figure.order) layout.yaxis.categoryarray = figure.order.filter(([method]) => !isHidden(name, method)).map(([, label]) => label);
    const height = figure.height + (figure.per || 0) * (figure.order ? layout.yaxis.categoryarray.length : 0);
    return {
      ...layout, height, width, showlegend: false, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", hovermode: "closest",
      font: { family: getComputedStyle(document.body).fontFamily, size: narrow ? 11 : 13, color: colour(INK) },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: colour(SOFT), activecolor: colour(INK) },
      margin: { l: narrow ? 44 : 60, r: name === "equal" ? (narrow ? 70 : 140) : 16, t: name === "heat" ? 70 : 14, b: 48 },
      hoverlabel: { bgcolor: colour(RAISED), bordercolor: colour(LINE), align: "left", font: { color: colour(INK), size: 13 } },
    };
  }

  function draw(name) {
    const target = document.querySelector(`[data-figure="${name}"]`), found = view(name), empty = document.querySelector(`[data-empty="${name}"]`);
    if (!target) return undefined;
    target.hidden = !found;
    empty.hidden = Boolean(found);
    if (!found) return undefined;
    const config = { displaylogo: false, displayModeBar: "hover", modeBarButtons: [["toImage", "resetScale2d"]], doubleClick: "reset",
      toImageButtonOptions: { format: "svg", filename: `forgetless-${name}` } };
    const width = printing ? 680 : target.clientWidth;
    return Plotly.react(target, found.figure.traces.map((trace) => drawn(name, trace)), layoutOf(name, found.figure, width), config);
  }
  const drawAll = () => Promise.all(Object.keys(figures).map(draw));

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
    return drawAll();
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
  show().then(() => { document.documentElement.dataset.ready = "yes"; });
})();
