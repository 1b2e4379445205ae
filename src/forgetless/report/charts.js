"use strict";
// Charts as SVG, of the traces and layouts that drawing.py describes: lines with marks and whiskers,
// lying bars, heat maps, each in one or several panels, on linear, logarithmic or named axes.
//
//     Charts.draw(element, { traces, layout, height, width, narrow, colours, paths, family, name })
//
// Text is set as text, never as HTML: of what drawing.py writes, <b> and <br> alone are read.
globalThis.Charts = (() => {
  const SVG = "http://www.w3.org/2000/svg";
  const DASHES = { dash: "7 5", dot: "2 4", dashdot: "7 4 2 4" };
  const REACH = 28; // pixels around a point in which it answers to the pointer
  const SIDES = { left: "start", center: "middle", right: "end" };
  const canvas = document.createElement("canvas").getContext("2d");

  function make(tag, attributes, parent, text) {
    const element = document.createElementNS(SVG, tag);
    for (const [key, value] of Object.entries(attributes)) if (value !== undefined && value !== null) element.setAttribute(key, value);
    if (text !== undefined) element.textContent = text;
    parent?.append(element);
    return element;
  }
  const plain = (text) => text.replaceAll("&lt;", "<").replaceAll("&gt;", ">").replaceAll("&amp;", "&");
  const id = (key) => key.replace("axis", ""); // xaxis2 is x2 in a trace

  // --- text
  function widthOf(text, size, family) {
    canvas.font = `${size}px ${family}`;
    return canvas.measureText(text).width;
  }
  function wrapped(text, width, size, family) { // words that are too long are broken
    const lines = [""];
    for (const word of plain(text).split(" ")) {
      const longer = lines.at(-1) ? `${lines.at(-1)} ${word}` : word;
      if (widthOf(longer, size, family) <= width) { lines[lines.length - 1] = longer; continue; }
      if (lines.at(-1)) lines.push("");
      for (const letter of word) {
        if (lines.at(-1) && widthOf(lines.at(-1) + letter, size, family) > width) lines.push("");
        lines[lines.length - 1] += letter;
      }
    }
    return lines;
  }

  // --- axes
  function limits(axis, values, bars) {
    if (axis.range) return axis.range;
    let [low, high] = [Math.min(...values), Math.max(...values)];
    if (axis.type !== "log" && (axis.rangemode === "tozero" || bars)) [low, high] = [Math.min(low, 0), Math.max(high, 0)];
    if (!(high > low)) { const some = Math.abs(low) * 0.1 || 1; [low, high] = [low - some, high + some]; }
    const edge = bars ? 0 : 0.04 * (high - low);
    return [low - (low === 0 && bars ? 0 : edge), high + (bars ? 0.02 * (high - low) : edge)];
  }
  function scaleOf(axis, values, from, to, bars) { // value -> pixel; from and to are pixels
    if (axis.type === "category") {
      const names = axis.categoryarray || [...new Set(values)], step = (to - from) / Math.max(names.length, 1);
      const at = (name) => from + (names.indexOf(name) + 0.5) * step;
      return { at, step: Math.abs(step), ticks: names.map((name) => [name, at(name)]) };
    }
    const log = axis.type === "log", known = values.filter((value) => Number.isFinite(value) && (!log || value > 0)).map((value) => (log ? Math.log10(value) : value));
    const [low, high] = known.length || axis.range ? limits(axis, known, bars) : [0, 1];
    const at = (value) => from + ((log ? Math.log10(value) : value) - low) / (high - low) * (to - from);
    const room = Math.max(2, Math.floor(Math.abs(to - from) / (from > to ? 42 : 78)));
    const ticks = (log ? logTicks(low, high, room) : linearTicks(low, high, Math.min(room, axis.nticks || room))).map((value) => [value, at(value)]);
    return { at, low, high, ticks, log };
  }
  function linearTicks(low, high, room) {
    const rough = (high - low) / room, power = 10 ** Math.floor(Math.log10(rough));
    const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough * 0.999), ticks = [];
    for (let n = Math.ceil(low / step - 1e-9); n * step <= high + 1e-9 * step; n += 1) ticks.push(Number((n * step).toPrecision(10)));
    return ticks;
  }
  function logTicks(low, high, room) {
    if (high - low < 0.7) return linearTicks(10 ** low, 10 ** high, room).filter((value) => value > 0);
    const ticks = (factors, every) => {
      const found = [];
      for (let n = Math.floor(low); n <= high; n += 1) {
        for (const factor of factors) if (n % every === 0 && Math.log10(factor) + n >= low && Math.log10(factor) + n <= high) found.push(Number(`${factor}e${n}`));
      }
      return found;
    };
    const fine = ticks([1, 2, 5], 1);
    return fine.length <= room + 1 ? fine : ticks([1], Math.max(1, Math.ceil((high - low) / room)));
  }
  function shown(value) {
    if (typeof value !== "number") return plain(String(value));
    const size = Math.abs(value);
    return size !== 0 && (size < 1e-4 || size >= 1e7) ? value.toExponential().replace("e+", "e") : String(Number(value.toPrecision(6)));
  }

  // --- where everything lies
  const whisker = (error, i) => [error?.symmetric === false ? error.arrayminus[i] : error?.array[i] ?? 0, error?.array[i] ?? 0];
  function extent(traces, axis, letter) { // all values on an axis, with their whiskers
    const error = `error_${letter}`, other = letter === "x" ? "xaxis" : "yaxis";
    return traces.filter((trace) => (trace[other] || letter) === axis).flatMap((trace) => trace[letter].flatMap((value, i) => {
      if (typeof value !== "number") return value === null ? [] : [value];
      const [below, above] = whisker(trace[error], i);
      return [value - below, value + above];
    }));
  }
  function arranged(chart) {
    const { traces, layout, height, width, family, size, small } = chart, top = chart.bar ? 66 : 14;
    const axes = Object.keys(layout).filter((key) => /^[xy]axis\d*$/.test(key));
    const ys = axes.filter((key) => key[0] === "y"), xs = axes.filter((key) => key[0] === "x");
    const bars = traces.some((trace) => trace.type === "bar" && trace.orientation === "h");
    const has = (key) => traces.some((trace) => (trace[key.startsWith("x") ? "xaxis" : "yaxis"] || key[0]) === id(key));
    // The x axis first with a guess of the left margin: how many lines its names take decides the height.
    const xTitles = Object.fromEntries(xs.map((key) => [key, layout[key].title ? wrapped(layout[key].title.text, (width - 70) * span(layout[key]), size, family) : []]));
    const columns = layout.xaxis.type === "category" ? [...new Set(traces.filter((trace) => (trace.xaxis || "x") === "x").flatMap((trace) => trace.x))] : [];
    const widest = Math.max(0, ...columns.map((name) => widthOf(plain(name), small, family)));
    const turned = columns.length > 0 && widest > (width - 60) * span(layout.xaxis) / columns.length - 6;
    const bottom = 14 + (turned ? widest : small) + Math.max(0, ...xs.map((key) => xTitles[key].length)) * size * 1.3;
    const tall = height - top - bottom, scales = {}, yTitles = {}, names = {};
    let left = 0;
    for (const key of ys.filter(has)) {
      const [low, high] = layout[key].domain || [0, 1], from = top + (1 - low) * tall, to = top + (1 - high) * tall;
      const reversed = layout[key].autorange === "reversed";
      scales[id(key)] = { ...scaleOf(layout[key], extent(traces, id(key), "y"), reversed ? to : from, reversed ? from : to, false), top: to, bottom: from };
      yTitles[key] = layout[key].title ? wrapped(layout[key].title.text, from - to, size, family) : [];
      names[key] = scales[id(key)].ticks.map(([value]) => (layout[key].type === "category" ? wrapped(shown(value), 0.36 * width, small, family) : [shown(value)]));
      const labels = Math.max(0, ...names[key].flat().map((line) => widthOf(line, small, family)));
      left = Math.max(left, labels + 10 + yTitles[key].length * size * 1.3 + (yTitles[key].length ? 6 : 0));
    }
    const right = width - roomForNotes(chart, left, extent(traces, "x", "x"));
    for (const key of xs.filter(has)) {
      const [low, high] = layout[key].domain || [0, 1], wide = right - left;
      scales[id(key)] = { ...scaleOf(layout[key], extent(traces, id(key), "x"), left + low * wide, left + high * wide, bars && layout[key].rangemode === "tozero"), left: left + low * wide, right: left + high * wide };
    }
    return { scales, left, right, top, bottom: height - bottom, xs: xs.filter(has), ys: ys.filter(has), xTitles, yTitles, names, turned, widest };
  }
  const span = (axis) => (axis.domain ? axis.domain[1] - axis.domain[0] : 1);
  function roomForNotes({ layout, width, small, family }, left, values) { // what stands beside bars has its place
    const notes = (layout.annotations || []).filter((note) => note.xref !== "paper" && note.yref !== "paper" && typeof note.y === "string");
    const low = Math.min(0, ...values), high = Math.max(...values, 0) || 1, wide = width - left - 16;
    let fits = wide;
    for (const note of notes) {
      const part = (note.x - low) / (1.02 * (high - low));
      if (part > 0) fits = Math.min(fits, (wide - widthOf(plain(note.text), small, family) - 12) / part);
    }
    return width - left - Math.max(fits, 0.3 * wide);
  }

  // --- drawing
  function axesOf(svg, chart, place) {
    const { layout, colours, size, small } = chart, grid = make("g", { stroke: colours.line, "stroke-width": 1 }, svg);
    for (const key of place.ys) {
      const { ticks, top, bottom } = place.scales[id(key)];
      for (const [i, [value, y]] of ticks.entries()) {
        if (layout[key].showgrid !== false) make("line", { x1: place.left, x2: place.right, y1: y, y2: y, "stroke-width": value === 0 ? 2 : 1 }, grid);
        const lines = place.names[key][i], tick = make("g", { class: "tick ytick", "font-size": small, fill: colours.soft, "text-anchor": "end" }, svg);
        lines.forEach((line, n) => make("text", { x: place.left - 8, y: y + small * (0.35 + 1.15 * (n - (lines.length - 1) / 2)) }, tick, line));
      }
      const lines = place.yTitles[key], middle = (top + bottom) / 2;
      lines.forEach((line, n) => make("text", { class: "title", transform: `translate(${size * (1 + 1.3 * n)} ${middle}) rotate(-90)`, "text-anchor": "middle", "font-size": size, fill: colours.soft }, svg, line));
    }
    for (const key of place.xs) {
      const { ticks, left, right } = place.scales[id(key)], base = place.bottom;
      for (const [value, x] of ticks) {
        for (const other of place.ys) if (layout[key].showgrid !== false) make("line", { x1: x, x2: x, y1: place.scales[id(other)].top, y2: place.scales[id(other)].bottom, "stroke-width": value === 0 ? 2 : 1 }, grid);
        const where = place.turned && layout[key].type === "category" ? { transform: `translate(${x + small * 0.35} ${base + 8}) rotate(-90)`, "text-anchor": "end" } : { x, y: base + small + 6, "text-anchor": "middle" };
        make("text", { class: "tick xtick", "font-size": small, fill: colours.soft, ...where }, svg, shown(value));
      }
      const under = base + 8 + (place.turned ? place.widest : small);
      place.xTitles[key].forEach((line, n) => make("text", { class: "title", x: (left + right) / 2, y: under + size * 1.3 * (n + 1), "text-anchor": "middle", "font-size": size, fill: colours.soft }, svg, line));
    }
  }
  function scatter(group, trace, x, y, chart, spots) {
    const points = trace.x.map((value, i) => [x.at(value), y.at(trace.y[i]), i]).filter(([a, b]) => Number.isFinite(a) && Number.isFinite(b));
    const line = trace.line || {}, marker = trace.marker || {}, colour = line.color || marker.color;
    if (trace.mode.includes("lines") && points.length > 1) {
      make("path", { d: `M${points.map(([a, b]) => `${a.toFixed(1)} ${b.toFixed(1)}`).join("L")}`, fill: "none", stroke: colour, "stroke-width": line.width, "stroke-dasharray": DASHES[line.dash], "stroke-linejoin": "round" }, group);
    }
    for (const [a, b, i] of points) {
      whiskers(group, trace, i, { a, b, x, y, colour });
      if (trace.mode.includes("markers")) mark(group, chart.paths, marker, a, b);
      spots.push({ x: a, y: b, text: trace.head ? `${trace.head}<br>${trace.hovertext[i]}` : trace.hovertext[i] });
    }
  }
  function whiskers(group, trace, i, { a, b, x, y, colour }) {
    for (const [error, way] of [[trace.error_x, "x"], [trace.error_y, "y"]]) {
      const [below, above] = whisker(error, i);
      if (!error || !(below || above)) continue;
      const value = trace[way][i], scale = way === "x" ? x : y, from = scale.at(value - below), to = scale.at(value + above);
      if (!Number.isFinite(from) || !Number.isFinite(to)) continue;
      const ends = way === "x" ? { x1: from, x2: to, y1: b, y2: b } : { x1: a, x2: a, y1: from, y2: to };
      make("line", { class: "whisker", ...ends, stroke: error.color || colour, "stroke-width": error.thickness }, group);
      for (const end of error.width ? [from, to] : []) make("line", { x1: end, x2: end, y1: b - error.width, y2: b + error.width, stroke: error.color || colour, "stroke-width": error.thickness }, group);
    }
  }
  function mark(group, paths, { symbol, size, color, line }, a, b) {
    const scale = size / 12, thin = symbol === "x-thin";
    make("path", { class: "point", d: thin ? "M1 1L11 11M11 1L1 11" : paths[symbol || "circle"], transform: `translate(${(a - 6 * scale).toFixed(1)} ${(b - 6 * scale).toFixed(1)}) scale(${scale})`,
      fill: thin ? "none" : color, stroke: thin ? line.color : undefined, "stroke-width": thin ? line.width / scale : undefined }, group);
  }
  function bar(group, trace, x, y, chart, spots) {
    for (const [i, value] of trace.x.entries()) {
      const middle = y.at(trace.y[i]), tall = trace.width * y.step, zero = x.at(0), end = x.at(value);
      if (value === null || !Number.isFinite(middle) || !Number.isFinite(end)) continue;
      const box = { x: Math.min(zero, end), y: middle - tall / 2, width: Math.abs(end - zero), height: tall };
      make("rect", { class: "point", ...box, fill: trace.marker.color }, group);
      whiskers(group, { ...trace, error_x: trace.error_x && { color: chart.colours.ink, ...trace.error_x } }, i, { a: end, b: middle, x, y });
      spots.push({ box: { ...box, x: x.left, width: x.right - x.left }, x: end, y: middle, text: trace.hovertext[i] });
    }
  }
  function mixed(stops, part) { // a colour between others, given as #rrggbb
    const place = Math.min(part, 1) * (stops.length - 1), n = Math.min(Math.floor(place), stops.length - 2), between = place - n;
    const channel = (colour, i) => parseInt(colour.slice(1 + 2 * i, 3 + 2 * i), 16);
    return `rgb(${[0, 1, 2].map((i) => Math.round(channel(stops[n], i) * (1 - between) + channel(stops[n + 1], i) * between)).join(" ")})`;
  }
  function heat(group, trace, x, y, chart, spots) {
    const known = trace.z.flat().filter((value) => value !== null), low = Math.min(...known), high = Math.max(...known);
    for (const [row, values] of trace.z.entries()) {
      for (const [column, value] of values.entries()) {
        const box = { x: x.at(trace.x[column]) - x.step / 2 + 1, y: y.at(trace.y[row]) - y.step / 2 + 1, width: Math.max(x.step - 2, 1), height: Math.max(y.step - 2, 1) };
        if (value !== null) make("rect", { class: "point", ...box, fill: mixed(chart.colours.heat, high > low ? (value - low) / (high - low) : 1) }, group);
        spots.push({ box, x: box.x + box.width / 2, y: box.y, text: trace.hovertext[row][column] });
      }
    }
    if (!known.length) return;
    const wide = Math.min(220, x.right - x.left), ends = make("g", { class: "bar", "font-size": chart.small, fill: chart.colours.soft }, group.ownerSVGElement);
    make("text", { x: x.left, y: 16 }, ends, plain(trace.colorbar.title.text));
    for (let n = 0; n < 44; n += 1) make("rect", { x: x.left + n * wide / 44, y: 24, width: wide / 44 + 0.5, height: 9, fill: mixed(chart.colours.heat, n / 43) }, ends);
    make("text", { x: x.left, y: 37 + chart.small }, ends, low.toFixed(1));
    make("text", { x: x.left + wide, y: 37 + chart.small, "text-anchor": "end" }, ends, high.toFixed(1));
  }
  const across = (part, from, to) => from + part * (to - from);
  function shapesAndNotes(svg, chart, place) {
    const { layout, colours, small } = chart, { x, y } = place.scales;
    for (const shape of layout.shapes || []) {
      const xs = [shape.x0, shape.x1].map((value) => ((shape.xref || "x") === "x" ? x.at(value) : across(value, place.left, place.right)));
      const ys = [shape.y0, shape.y1].map((value) => ((shape.yref || "y") === "y" ? y.at(value) : across(value, place.bottom, place.top)));
      if ([...xs, ...ys].every(Number.isFinite)) make("line", { x1: xs[0], x2: xs[1], y1: ys[0], y2: ys[1], stroke: colours.soft, "stroke-width": shape.line.width, "stroke-dasharray": DASHES[shape.line.dash] }, svg);
    }
    for (const note of layout.annotations || []) {
      const a = note.xref === "paper" ? across(note.x, place.left, place.right) : x.at(note.x);
      const b = note.yref === "paper" ? across(note.y, place.bottom, place.top) : y.at(note.y);
      if (!Number.isFinite(a) || !Number.isFinite(b)) continue;
      make("text", { class: "note", x: a + (note.xshift || 0), y: note.yanchor === "bottom" ? b - 4 : b + small * 0.35, "text-anchor": SIDES[note.xanchor], "font-size": small, fill: chart.loud ? colours.ink : colours.soft }, svg, plain(note.text));
    }
  }
  const DRAWN = { scatter, bar, heatmap: heat };

  function draw(target, given) {
    const chart = { ...given, size: given.narrow ? 11 : 13, small: given.narrow ? 10 : 12, bar: given.traces.some((trace) => trace.type === "heatmap") };
    const place = arranged(chart), spots = [];
    const svg = make("svg", { class: "chart", xmlns: SVG, width: chart.width, height: chart.height, viewBox: `0 0 ${chart.width} ${chart.height}`, "font-family": chart.family });
    axesOf(svg, chart, place);
    shapesAndNotes(svg, chart, place);
    for (const [n, trace] of chart.traces.entries()) {
      const x = place.scales[trace.xaxis || "x"], y = place.scales[trace.yaxis || "y"], clip = `clip-${chart.name}-${n}`;
      const box = make("clipPath", { id: clip }, svg);
      make("rect", { x: x.left - 6, y: y.top - 6, width: x.right - x.left + 12, height: y.bottom - y.top + 12 }, box);
      DRAWN[trace.type](make("g", { class: "trace", opacity: trace.opacity, "clip-path": `url(#${clip})` }, svg), trace, x, y, chart, spots);
    }
    target.replaceChildren(svg, saving(svg, chart));
    target.style.height = `${chart.height}px`;
    hovering(target, svg, chart, spots.filter((spot) => spot.text));
  }

  // --- what the pointer finds
  function hovering(target, svg, chart, spots) {
    const ring = make("circle", { r: 8, fill: "none", stroke: chart.colours.ink, "stroke-width": 1.5, visibility: "hidden" }, svg);
    const card = Object.assign(document.createElement("div"), { className: "hover", hidden: true });
    target.append(card);
    const inside = ({ box }, x, y) => box && x >= box.x && x <= box.x + box.width && y >= box.y && y <= box.y + box.height;
    const far = (spot, x, y) => (spot.box ? Infinity : Math.hypot(spot.x - x, spot.y - y));
    const find = (x, y) => {
      const nearest = spots.reduce((best, spot) => (far(spot, x, y) < far(best, x, y) ? spot : best), { x: Infinity, y: Infinity });
      return far(nearest, x, y) <= REACH ? nearest : spots.find((spot) => inside(spot, x, y));
    };
    const hide = () => { card.hidden = true; ring.setAttribute("visibility", "hidden"); };
    const look = (event) => {
      const bounds = svg.getBoundingClientRect(), spot = find(event.clientX - bounds.x, event.clientY - bounds.y);
      if (!spot) { hide(); return; }
      card.replaceChildren(...spot.text.split("<br>").map((line) => {
        const bold = line.match(/^<b>(.*?)<\/b>(.*)$/s), part = document.createElement("div");
        if (bold) part.append(Object.assign(document.createElement("b"), { textContent: plain(bold[1]) }), plain(bold[2]));
        else part.textContent = plain(line);
        return part;
      }));
      card.hidden = false;
      const left = Math.max(0, Math.min(spot.x + 14, chart.width - card.offsetWidth));
      card.style.left = `${left}px`;
      card.style.top = `${Math.max(0, spot.y - card.offsetHeight - 12 >= 0 ? spot.y - card.offsetHeight - 12 : spot.y + 14)}px`;
      for (const [key, value] of Object.entries({ cx: spot.x, cy: spot.y, visibility: spot.box ? "hidden" : "visible" })) ring.setAttribute(key, value);
    };
    svg.addEventListener("pointermove", look);
    svg.addEventListener("pointerdown", look);
    svg.addEventListener("pointerleave", hide);
  }
  function saving(svg, chart) { // the chart as a file of its own, on the ground of the theme
    const button = Object.assign(document.createElement("button"), { type: "button", className: "save", textContent: "Save as SVG" });
    button.addEventListener("click", () => {
      const whole = svg.cloneNode(true);
      whole.prepend(make("rect", { width: "100%", height: "100%", fill: chart.colours.ground }));
      const link = Object.assign(document.createElement("a"), { download: `forgetless-${chart.name}.svg`, href: URL.createObjectURL(new Blob([new XMLSerializer().serializeToString(whole)], { type: "image/svg+xml" })) });
      link.click();
      URL.revokeObjectURL(link.href);
    });
    return button;
  }
  return { draw };
})();
