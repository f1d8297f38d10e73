// Thresholds that can be moved: everything on the page follows, from the per-input table that lies in it.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("play-data").textContent);
  const E = data.exits.length, N = data.images;
  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const confidence = new Float64Array(bytes(data.confidence).buffer); // N * E
  const correct = bytes(data.correct); // N * (E + 1)
  const spent = new Float64Array(bytes(data.spent).buffer); // without heads: N * (E + 1), or E + 1 where all are alike
  const label = new Uint16Array(bytes(data.label).buffer); // N
  const alike = spent.length === E + 1;
  const $ = (id) => document.getElementById(id);
  const names = [...data.exits, "end"];
  const state = { thresholds: data.thresholds.map(number), label: -1, exit: -1, axis: data.leaving_ms ? "ms" : "macs" };

  function number(threshold) {
    return threshold === "inf" ? Infinity : threshold === "-inf" ? -Infinity : threshold;
  }

  // A sample leaves at the first exit whose confidence reaches its threshold; what is no number never does.
  function route(thresholds, rows) {
    const running = thresholds.map((t) => data.every_vote || t !== Infinity);
    const heads = [];
    let sum = 0;
    for (let e = 0; e <= E; e++) {
      if (e < E && running[e]) sum += data.heads[e];
      heads.push(sum);
    }
    const found = { count: 0, right: 0, macs: 0, ms: 0, left: new Array(E + 1).fill(0), hits: new Array(E + 1).fill(0), exit: new Uint8Array(N) };
    for (let n = 0; n < N; n++) {
      let e = 0;
      while (e < E && !(confidence[n * E + e] >= thresholds[e])) e++;
      found.exit[n] = e;
      if (!rows(n)) continue;
      const hit = correct[n * (E + 1) + e];
      found.count++;
      found.right += hit;
      found.left[e]++;
      found.hits[e] += hit;
      found.macs += (alike ? spent[e] : spent[n * (E + 1) + e]) + heads[e];
      if (data.leaving_ms) found.ms += data.leaving_ms[e];
    }
    return found;
  }

  const everybody = () => true;
  const chosen = (n) => state.label < 0 || label[n] === state.label;
  const percent = (x, digits = 2) => (100 * x).toFixed(digits) + "%";

  // Positions of an exit's slider are shares of the images that are sure enough of it.
  const sorted = data.exits.map((_, e) => {
    const column = new Float64Array(N);
    for (let n = 0; n < N; n++) column[n] = confidence[n * E + e];
    return column.filter((c) => !Number.isNaN(c)).sort();
  });
  const STEPS = 200;

  function thresholdAt(e, position) {
    if (position === 0) return Infinity;
    if (position === STEPS) return -Infinity;
    const column = sorted[e], at = Math.round((1 - position / STEPS) * column.length);
    return column[Math.min(column.length - 1, at)];
  }

  function positionOf(e, threshold) {
    if (threshold === Infinity) return 0;
    if (threshold === -Infinity) return STEPS;
    const column = sorted[e];
    let low = 0, high = column.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (column[middle] < threshold) low = middle + 1; else high = middle;
    }
    return Math.max(1, Math.min(STEPS - 1, Math.round(STEPS * (1 - low / column.length))));
  }

  const shown = (t) => (t === Infinity ? "off" : t === -Infinity ? "all leave" : t.toPrecision(4));

  // The fitted trade-off and what leaving at one exit gives, once for all.
  const points = data.points.map((thresholds) => {
    const t = thresholds.map(number), r = route(t, everybody);
    return { thresholds: t, accuracy: r.right / r.count, macs: r.macs / r.count, ms: r.ms / r.count };
  }).sort((a, b) => a.macs - b.macs);
  const single = names.map((name, e) => {
    const t = data.exits.map((_, i) => (i === e ? -Infinity : Infinity)), r = route(t, everybody);
    return { name, accuracy: r.right / r.count, macs: r.macs / r.count, ms: r.ms / r.count, thresholds: t };
  });

  function element(name, attributes, ...inside) {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    for (const one of inside) made.append(one);
    return made;
  }

  function ticks(low, high, count) {
    const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].map((f) => f * power).find((s) => s >= raw);
    const found = [];
    for (let at = Math.ceil(low / step - 1e-9) * step; at <= high + 1e-9; at += step) found.push(+at.toPrecision(12));
    return found;
  }

  function chart(now) {
    const box = $("play-chart"), width = Math.max(300, box.clientWidth), height = Math.min(380, Math.max(260, width * 0.6));
    const unit = state.axis === "ms" ? 1 : 1e-6, x = (p) => p[state.axis] * unit;
    const others = data.static.filter((s) => s[state.axis] != null);
    const dense = { macs: data.dense_macs, ms: data.dense_ms, accuracy: data.dense_accuracy };
    const lines = state.axis === "macs" ? others.flatMap((s) => s.line) : [];
    const all = [...points, ...single, ...others, ...lines, dense, now];
    const left = 52, right = 14, top = 12, bottom = 42;
    const xs = all.map(x), ys = all.map((p) => p.accuracy);
    const high = Math.max(...xs) * 1.04;
    const floor = Math.max(0, Math.min(...points.map((p) => p.accuracy), now.accuracy, ...others.map((p) => p.accuracy)) - 0.01);
    const low = Math.min(floor, now.accuracy), ceiling = Math.min(1, Math.max(...ys) + 0.005);
    const X = (v) => left + ((width - left - right) * v) / high;
    const Y = (v) => top + ((height - top - bottom) * (ceiling - Math.max(v, low))) / (ceiling - low || 1);
    const svg = element("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img",
      "aria-label": `Accuracy against ${state.axis === "ms" ? "milliseconds" : "MMAC"} of an image; now ${percent(now.accuracy)} at ${x(now).toPrecision(3)}` });
    for (const v of ticks(low, ceiling, 5)) {
      svg.append(element("line", { x1: left, x2: width - right, y1: Y(v), y2: Y(v), class: "grid" }),
        element("text", { x: left - 8, y: Y(v) + 4, "text-anchor": "end", class: "tick" }, percent(v, ceiling - low < 0.05 ? 1 : 0)));
    }
    for (const v of ticks(0, high, Math.max(3, Math.floor(width / 110)))) {
      svg.append(element("line", { x1: X(v), x2: X(v), y1: top, y2: height - bottom, class: "grid" }),
        element("text", { x: X(v), y: height - bottom + 18, "text-anchor": "middle", class: "tick" }, String(v)));
    }
    const told = state.axis === "ms" ? `ms an image in ${data.engine}` : "MMAC an image (MFLOP = 2 × MMAC)";
    svg.append(element("text", { x: (left + width - right) / 2, y: height - 6, "text-anchor": "middle", class: "tick" }, told));
    const line = (list, css) => svg.append(element("path", { d: list.map((p, i) => `${i ? "L" : "M"}${X(x(p))} ${Y(p.accuracy)}`).join(""), class: css }));
    if (E) line(single.filter((p) => p.accuracy >= low), "single");
    // Of others only MACs are known all along their lines.
    if (state.axis === "macs") for (const other of others) if (other.line.length > 1) line(other.line, "other");
    if (points.length > 1) line([...points].sort((a, b) => x(a) - x(b)), "fitted");
    const dot = (p, css, title, click, r = 5) => {
      const made = element("circle", { cx: X(x(p)), cy: Y(p.accuracy), r, class: css }, element("title", {}, title));
      if (click) {
        made.setAttribute("tabindex", "0");
        made.setAttribute("role", "button");
        made.setAttribute("aria-label", `take ${title}`);
        made.addEventListener("click", click);
        made.addEventListener("keydown", (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); click(); } });
      }
      svg.append(made);
    };
    const at = (p) => `${percent(p.accuracy)} at ${x(p).toPrecision(3)} ${state.axis === "ms" ? "ms" : "MMAC"}`;
    if (E) for (const p of single) if (p.accuracy >= low) dot(p, "single", `all leave at ${p.name}: ${at(p)}`, () => set(p.thresholds), 4);
    for (const p of points) dot(p, "fitted", `fitted: ${at(p)}`, () => set(p.thresholds));
    for (const p of others) dot(p, p.dynamic ? "other" : "static", `${p.what}: ${at(p)}`, null);
    dot(dense, "dense", `bare backbone: ${at(dense)}`, null, 6);
    dot(now, "now", `now: ${at(now)}`, null, 8);
    box.replaceChildren(svg);
  }

  function bars(found) {
    const rows = names.map((name, e) => {
      const row = document.createElement("button"), share = found.count ? found.left[e] / found.count : 0;
      const hit = found.left[e] ? found.hits[e] / found.left[e] : 0;
      row.type = "button";
      row.className = "bar" + (state.exit === e ? " picked" : "");
      row.setAttribute("aria-pressed", String(state.exit === e));
      row.title = "show the inputs that leave here";
      row.innerHTML = "<span class=name></span><span class=track><i class=right></i><i class=wrong></i></span><span class=share></span>";
      row.querySelector(".name").textContent = name;
      row.querySelector(".right").style.width = percent(share * hit);
      row.querySelector(".wrong").style.width = percent(share * (1 - hit));
      row.querySelector(".share").textContent = percent(share, 1) + (found.left[e] ? `, ${percent(hit, 1)} right` : "");
      row.addEventListener("click", () => { state.exit = state.exit === e ? -1 : e; draw(); });
      return row;
    });
    $("play-bars").replaceChildren(...rows);
  }

  function gallery(found) {
    const wanted = data.thumbs.filter((one) => chosen(one.row) && (state.exit < 0 || found.exit[one.row] === state.exit));
    // Of every exit as many, as far as there are.
    const groups = names.map((_, e) => wanted.filter((one) => found.exit[one.row] === e)).filter((group) => group.length);
    const each = Math.ceil(48 / Math.max(1, groups.length));
    const made = groups.flatMap((group) => group.slice(0, each)).map((one) => {
      const e = found.exit[one.row], hit = correct[one.row * (E + 1) + e];
      const figure = document.createElement("figure"), image = document.createElement("img"), said = document.createElement("figcaption");
      figure.className = hit ? "right" : "wrong";
      image.src = one.src;
      image.alt = `${data.classes[label[one.row]]}, leaves at ${names[e]}, ${hit ? "right" : "wrong"}`;
      said.textContent = `${data.classes[label[one.row]]} · ${E ? names[e] : hit ? "right" : "wrong"}`;
      figure.append(image, said);
      return figure;
    });
    $("play-gallery").replaceChildren(...made);
    $("play-shown").textContent = made.length ? `${made.length} of the ${data.thumbs.length} inputs that are in this page as pictures` : "none of the pictures in this page";
  }

  function tile(id, text, value) {
    $(id).textContent = text;
    $(id).dataset.value = value;
  }

  function draw() {
    const found = route(state.thresholds, chosen), count = Math.max(1, found.count);
    const now = { accuracy: found.right / count, macs: found.macs / count, ms: found.ms / count };
    tile("play-accuracy", percent(now.accuracy), now.accuracy);
    tile("play-macs", `${percent(now.macs / data.dense_macs, 1)}`, now.macs);
    $("play-macs-told").textContent = `of the bare backbone's MACs: ${(now.macs / 1e6).toFixed(2)} of ${(data.dense_macs / 1e6).toFixed(2)} MMAC an input`;
    if (data.leaving_ms) {
      tile("play-ms", `${now.ms.toPrecision(3)} ms`, now.ms);
      $("play-ms-told").textContent = `an input in ${data.engine}; the bare backbone ${data.dense_ms.toPrecision(3)} ms, ${(data.dense_ms / now.ms).toFixed(2)}×`;
    }
    data.exits.forEach((_, e) => {
      const slider = $(`play-exit-${e}`);
      if (document.activeElement !== slider) slider.value = positionOf(e, state.thresholds[e]);
      slider.setAttribute("aria-valuetext", shown(state.thresholds[e]));
      $(`play-value-${e}`).textContent = shown(state.thresholds[e]);
    });
    const plain = state.thresholds.map((t) => (t === Infinity ? 'float("inf")' : t === -Infinity ? '-float("inf")' : String(t)));
    $("play-code").textContent = `model.thresholds = [${plain.join(", ")}]`;
    chart(now);
    bars(found);
    gallery(found);
  }

  function set(thresholds) {
    state.thresholds = [...thresholds];
    draw();
  }

  async function copy(text, button) {
    const before = button.textContent;
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      const area = document.createElement("textarea");
      area.value = text;
      document.body.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
    }
    button.textContent = "copied";
    setTimeout(() => { button.textContent = before; }, 1200);
  }

  data.exits.forEach((name, e) => {
    const row = document.createElement("label");
    row.className = "slider";
    row.innerHTML = `<span></span><input type="range" id="play-exit-${e}" min="0" max="${STEPS}" step="1"><output id="play-value-${e}"></output>`;
    row.querySelector("span").textContent = name;
    row.querySelector("input").addEventListener("input", (event) => {
      state.thresholds[e] = thresholdAt(e, +event.target.value);
      draw();
    });
    $("play-exits").append(row);
  });
  const joint = $("play-joint");
  joint.max = String(Math.max(0, points.length - 1));
  joint.disabled = points.length < 2;
  joint.value = String(points.reduce((best, p, i) => (Math.abs(p.macs - data.mean_macs) < Math.abs(points[best].macs - data.mean_macs) ? i : best), 0));
  joint.addEventListener("input", () => set(points[+joint.value].thresholds));
  $("play-reset").addEventListener("click", () => set(data.thresholds.map(number)));
  data.classes.forEach((name, i) => $("play-class").append(new Option(name, String(i))));
  $("play-class").addEventListener("change", (event) => { state.label = +event.target.value; draw(); });
  for (const button of document.querySelectorAll("[data-axis]")) {
    button.addEventListener("click", () => {
      state.axis = button.dataset.axis;
      for (const one of document.querySelectorAll("[data-axis]")) one.setAttribute("aria-pressed", String(one === button));
      draw();
    });
    button.setAttribute("aria-pressed", String(button.dataset.axis === state.axis));
  }
  const json = (t) => (t === Infinity ? "inf" : t === -Infinity ? "-inf" : t);
  $("play-copy-code").addEventListener("click", (event) => copy($("play-code").textContent, event.target));
  $("play-copy-json").addEventListener("click", (event) => copy(JSON.stringify({ thresholds: state.thresholds.map(json) }), event.target));
  let waiting = 0;
  window.addEventListener("resize", () => { cancelAnimationFrame(waiting); waiting = requestAnimationFrame(draw); });
  $("play").hidden = false;
  draw();
  window.dynnet = { state, set, route, data };
})();
